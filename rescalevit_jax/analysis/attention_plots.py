"""Draw the attention of one or more models side by side.

All panels of a picture share one color scale.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import textwrap
from typing import Any

from jaxtyping import UInt8
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
# Title, and label of the color scale, of each kind of picture.
KINDS: Mapping[str, tuple[str, str]] = {
  "tokens": (
    "Attention of each token (row) to each token (column), head 0",
    "attention",
  ),
  "heads": (
    "Attention of each token (row) to each token (column), by head",
    "attention",
  ),
  "class_token": (
    "Attention of the class token to the image, mean of the heads",
    "attention / uniform",
  ),
  "rollout": (
    "Attention rollout from the class token to the image",
    "rollout / its mean",
  ),
}
_OVER_IMAGE = ("class_token", "rollout")


def draw_during_training(
  step: int,
  experiment: experiment_lib.Experiment,
  variables: Mapping[str, Any],
) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
  """Draw the attention on the first test image, for `trainer.DrawAttention`.

  The keys are 'attention/KIND'.
  """
  model = trained_model.TrainedModel(
    f"step {step}",
    experiment.model,
    variables,
    experiment.config.image_size,
    experiment.dataset.class_names,
  )
  image = experiment.dataset.test.images[0]
  return {
    f"attention/{kind}": plots.pixels(draw(kind, [model], [image]))
    for kind in KINDS
  }


def draw(
  kind: str,
  models: Sequence[trained_model.TrainedModel],
  images: Sequence[image_files.Source],
  block: int = 0,
) -> figure_lib.Figure:
  """Draw the attention of models on an image.

  Args:
    kind: a key of `KINDS`.
    models: at least one model.
    images: one for each model: a path, a Pillow image, or a uint8 array
      [H, W, 3] of a split. Runs with different first resizing need different
      arrays of one test image.
    block: index of the block, for 'heads'.
  """
  rows = []
  for model, image in zip(models, images, strict=True):
    if not 0 <= block < model.model.config.num_layers:
      raise errors.UserError(
        f"{model.name}: has no block {block}; choose one of 0 to"
        f" {model.model.config.num_layers - 1}"
      )
    x = _inputs(model, image)
    maps = attention_maps.collect_probabilities(model.model, model.variables, x)
    picture = x[0] if kind in _OVER_IMAGE else None
    rows.append((model, picture, _panels(kind, np.asarray(maps)[:, 0], block)))
  return _figure(rows, *KINDS[kind])


def _inputs(model, image):
  """Return the model's input.

  An array of `data.image_size` pixels comes from a split, which is resized.
  """
  edge = model.resize.image_size
  if isinstance(image, np.ndarray) and image.shape[:2] == (edge, edge):
    model = dataclasses.replace(model, resize=image_files.Resize())
  return model.inputs([image])


def _panels(kind, maps, block):
  """Return the maps [H, W] of a kind, by title."""
  if kind == "tokens":  # The blocks that RescaleViT shows.
    return {f"block {i}": maps[i, 0] for i in _ORIGINAL_BLOCKS if i < len(maps)}
  if kind == "heads":
    return {f"head {i}": head for i, head in enumerate(maps[block])}
  if kind == "class_token":
    shares = maps.mean(axis=1)[:, 0, 1:] * maps.shape[-1]
    return {f"block {i}": _square(share) for i, share in enumerate(shares)}
  share = attention_maps.rollout(maps)[0, 1:]
  return {"rollout": _square(share / share.mean())}


def _square(row):
  edge = math.isqrt(len(row))
  return row.reshape(edge, edge)


def _figure(rows, title, scale_label):
  """Draw rows of (model, picture or None, panels), a subfigure per model."""
  cells = [len(panels) + (picture is not None) for _, picture, panels in rows]
  columns = min(_COLUMNS, max(cells))
  lines = math.ceil(max(cells) / columns)
  beside = min(len(rows), _COLUMNS // columns)
  below = math.ceil(len(rows) / beside)
  size = 1.5 if columns * beside > 4 else 2.0  # Inches per panel.
  width = max(4.0, size * columns * beside) + 1.0
  # The widest letters of this size, W and @, are 0.12 inches wide.
  letters = int((width - 1.0) / beside / 0.125)
  names = [textwrap.wrap(model.name, letters) for model, _, _ in rows]
  name_lines = max(map(len, names))
  title_height = 0.3 + 0.15 * name_lines
  height = below * ((size + 0.25) * lines + title_height) + 0.3
  figure = figure_lib.Figure(figsize=(width, height), layout="constrained")
  figure.suptitle(title, fontsize="medium")
  left, right = figure.subfigures(1, 2, width_ratios=[width - 1.0, 1.0])
  every = [x.ravel() for _, _, panels in rows for x in panels.values()]
  # Clip outliers, which would leave the rest dark.
  top = np.percentile(np.concatenate(every), 99.5)
  scale = matplotlib.colors.Normalize(0, top)
  parts = left.subfigures(below, beside, squeeze=False).flat
  for part, (model, picture, panels), name in zip(
    parts, rows, names, strict=False
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
    if picture is not None:
      ax = axes.pop(0)
      ax.imshow(np.clip((picture + 1) / 2, 0, 1))
      ax.set_title("image", fontsize="small")
    for ax, (panel_title, values) in zip(axes, panels.items(), strict=False):
      ax.set_title(panel_title, fontsize="small")
      _draw_map(ax, values, picture, {"cmap": _COLORMAP, "norm": scale})
  bar = min(0.7, 3.0 / height)
  right.colorbar(
    matplotlib.cm.ScalarMappable(scale, _COLORMAP),
    cax=right.add_axes((0.1, (1 - bar) / 2, 0.2, bar)),
    label=scale_label,
    extend="max",
  )
  return figure


def _draw_map(ax, values, picture, colors):
  if picture is None:
    ax.imshow(values, **colors)
    return
  gray = np.clip((picture.mean(axis=-1) + 1) / 2, 0, 1)
  ax.imshow(gray, cmap="gray", vmin=0, vmax=1)
  # The map's pixels are patches.
  extent = ax.images[0].get_extent()
  ax.imshow(
    values, **colors, alpha=0.6, extent=extent, interpolation="bilinear"
  )
