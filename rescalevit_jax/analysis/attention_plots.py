"""Draw the attention of one or more models side by side.

All panels of a picture share one colour scale.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import textwrap
from typing import Any

from jaxtyping import Float, UInt8
import matplotlib
from matplotlib import figure as figure_lib
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_maps
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import image_files
from rescalevit_jax.training import experiment as experiment_lib

_COLUMNS = 8
_ORIGINAL_BLOCKS = (0, 3, 6, 9)
_COLORMAP = "viridis"


@dataclasses.dataclass(frozen=True)
class _Panel:
  """A map with its title, drawn over the image `over` if given."""

  title: str
  values: Float[np.ndarray, "H W"]
  over: Float[np.ndarray, "S S 3"] | None = None


def draw_during_training(
  step: int,
  experiment: experiment_lib.Experiment,
  variables: Mapping[str, Any],
) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
  """Draw the attention on the first test image, for `trainer.DrawAttention`."""
  model = trained_model.TrainedModel(
    f"step {step}",
    experiment.model,
    variables,
    experiment.config.image_size,
    experiment.dataset.class_names,
  )
  return draw_all(model, experiment.dataset.test.images[0])


def draw(
  kind: str,
  models: Sequence[trained_model.TrainedModel],
  image: image_files.Source,
  block: int = 0,
) -> figure_lib.Figure:
  """Draw the attention of models on an image.

  Args:
    kind: a key of `KINDS`.
    models: at least one model.
    image: a path, a Pillow image, or a uint8 array [H, W, 3].
    block: index of the block, for 'heads'.

  Raises:
    UserError: a model has no such block, or the image cannot be read.
  """
  rows = []
  for model in models:
    if not 0 <= block < model.model.config.num_layers:
      raise errors.UserError(
        f"{model.name}: has no block {block}; choose one of 0 to"
        f" {model.model.config.num_layers - 1}"
      )
    x = model.inputs([image])
    maps = np.asarray(
      attention_maps.collect_probabilities(model.model, model.variables, x)
    )[:, 0]
    rows.append((model, (x[0] + 1) / 2, KINDS[kind].panels(maps, x[0], block)))
  return _figure(rows, KINDS[kind])


def draw_all(
  model: trained_model.TrainedModel, image: image_files.Source
) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
  """Return the pictures of all kinds, by 'attention/KIND'."""
  return {
    f"attention/{kind}": plots.pixels(draw(kind, [model], image))
    for kind in KINDS
  }


def _tokens(maps, picture, block):
  """Return the maps of head 0 in the blocks that RescaleViT shows."""
  del picture, block
  return [
    _Panel(f"block {i}", maps[i, 0]) for i in _ORIGINAL_BLOCKS if i < len(maps)
  ]


def _heads(maps, picture, block):
  del picture
  return [_Panel(f"head {i}", head) for i, head in enumerate(maps[block])]


def _class_token(maps, picture, block):
  """Return the class token's attention to patches, relative to uniform."""
  del block
  share = maps.mean(axis=1)[:, 0, 1:] * maps.shape[-1]
  return [
    _Panel(f"block {i}", _square(row), picture) for i, row in enumerate(share)
  ]


def _rollout(maps, picture, block):
  del block
  share = attention_maps.rollout(maps)[0, 1:]
  return [_Panel("rollout", _square(share / share.mean()), picture)]


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of picture.

  Attributes:
    title: title of the picture.
    scale: label of the colour scale.
    panels: function from maps, model input and block to panels.
  """

  title: str
  scale: str
  panels: Callable[
    [Float[np.ndarray, "L h N N"], Float[np.ndarray, "S S 3"], int],
    list[_Panel],
  ]


KINDS: Mapping[str, Kind] = {
  "tokens": Kind(
    "Attention of each token (row) to each token (column), head 0",
    "attention",
    _tokens,
  ),
  "heads": Kind(
    "Attention of each token (row) to each token (column), by head",
    "attention",
    _heads,
  ),
  "class_token": Kind(
    "Attention of the class token to the image, mean of the heads",
    "attention / uniform",
    _class_token,
  ),
  "rollout": Kind(
    "Attention rollout from the class token to the image",
    "rollout / its mean",
    _rollout,
  ),
}


def _square(row):
  edge = math.isqrt(len(row))
  return row.reshape(edge, edge)


def _figure(rows, kind):
  """Draw rows of (model, picture, panels), a subfigure for each model."""
  cells = [
    [picture, *panels] if panels[0].over is not None else panels
    for _, picture, panels in rows
  ]
  columns = min(_COLUMNS, max(map(len, cells)))
  lines = max(math.ceil(len(row) / columns) for row in cells)
  beside = min(len(rows), _COLUMNS // columns)
  below = math.ceil(len(rows) / beside)
  size = 1.5 if columns * beside > 4 else 2.0  # Inches per panel.
  width = max(4.0, size * columns * beside) + 1.0
  # The widest letters of this size, W and @, are 0.12 inches wide.
  letters = int((width - 1.0) / beside / 0.125)
  names = [textwrap.wrap(model.name, letters) for model, _, _ in rows]
  name_lines = max(map(len, names))
  title = 0.3 + 0.15 * name_lines
  height = below * ((size + 0.25) * lines + title) + 0.3
  figure = figure_lib.Figure(figsize=(width, height), layout="constrained")
  figure.suptitle(kind.title, fontsize="medium")
  left, right = figure.subfigures(1, 2, width_ratios=[width - 1.0, 1.0])
  every = np.concatenate([p.values.ravel() for _, _, ps in rows for p in ps])
  # Clip outliers, which would leave the rest dark.
  scale = matplotlib.colors.Normalize(0, np.percentile(every, 99.5))
  parts = left.subfigures(below, beside, squeeze=False).flat
  for part, (model, _, _), name, row in zip(
    parts, rows, names, cells, strict=False
  ):
    norm = model.model.config.norm
    part.suptitle(
      # Equal heights align the panels.
      plots.plain("\n".join([norm, *name, *[""] * (name_lines - len(name))])),
      fontsize="small",
      color=plots.norm_color(norm),
    )
    axes = list(part.subplots(lines, columns, squeeze=False).flat)
    for ax in axes:
      ax.set(xticks=[], yticks=[])
      ax.spines[:].set_visible(False)
    for ax, cell in zip(axes, row, strict=False):
      _draw_cell(ax, cell, scale)
  bar = min(0.7, 3.0 / height)
  right.colorbar(
    matplotlib.cm.ScalarMappable(scale, _COLORMAP),
    cax=right.add_axes((0.1, (1 - bar) / 2, 0.2, bar)),
    label=kind.scale,
    extend="max",
  )
  return figure


def _draw_cell(ax, cell, scale):
  if not isinstance(cell, _Panel):
    ax.imshow(np.clip(cell, 0, 1))
    ax.set_title("image", fontsize="small")
    return
  ax.set_title(cell.title, fontsize="small")
  if cell.over is None:
    ax.imshow(cell.values, cmap=_COLORMAP, norm=scale)
    return
  edge = len(cell.over)
  grey = np.clip((cell.over.mean(axis=-1) + 1) / 2, 0, 1)
  ax.imshow(grey, cmap="gray", vmin=0, vmax=1)
  ax.imshow(
    cell.values,
    cmap=_COLORMAP,
    norm=scale,
    alpha=0.6,
    extent=(-0.5, edge - 0.5, edge - 0.5, -0.5),
    interpolation="bilinear",
  )
