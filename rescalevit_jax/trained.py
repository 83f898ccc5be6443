"""Trained models, from a run's folder or from an `.npz`, ready to be called.

model = trained.load("runs/a")
probabilities = model(["cat.png", "dog.jpeg"])
"""

from collections.abc import Sequence
import functools
import json
import os
import pathlib
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from rescalevit_jax import checkpoint
from rescalevit_jax import errors
from rescalevit_jax import experiment
from rescalevit_jax import identify
from rescalevit_jax import images as images_lib
from rescalevit_jax import models
from rescalevit_jax import npz
from rescalevit_jax import pretrained
from rescalevit_jax.models import variants


class TrainedModel:
  """A model with its weights.

  Attributes:
    name: for titles: the run's folder or the file, without its suffix.
    model: a `VisionTransformer`.
    variables: the collections `params` and `batch_stats`.
    image_size: edge of the model's input, in pixels.
    class_names: in the order of the probabilities.
  """

  def __init__(
    self,
    name: str,
    model: nn.Module,
    variables: dict[str, Any],
    image_size: int,
    class_names: Sequence[str],
  ):
    self.name = name
    self.model = model
    self.variables = variables
    self.image_size = image_size
    self.class_names = tuple(class_names)

  def __call__(
    self, images: Sequence[images_lib.Source], batch: int = 64
  ) -> np.ndarray:
    """Classifies images of any size.

    Args:
      images: M of them: paths, Pillow images, or uint8 arrays [H, W, 3].
      batch: images a step of the device.

    Returns:
      Probabilities [M, classes], float32; each row sums to 1.

    Raises:
      UserError: a file cannot be read as an image.
    """
    batch = max(1, min(batch, len(images)))
    rows = []
    for start in range(0, len(images), batch):
      x = self.inputs(images[start : start + batch])
      # One shape, one compilation.
      filled = np.concatenate([x, np.zeros((batch - len(x), *x.shape[1:]))])
      rows.append(np.asarray(self._probabilities(self.variables, filled)))
      rows[-1] = rows[-1][: len(x)]
    return np.concatenate(
      [np.zeros((0, len(self.class_names)), np.float32), *rows]
    )

  def inputs(self, images: Sequence[images_lib.Source]) -> np.ndarray:
    """Returns images as the model takes them, [M, S, S, 3] float32."""
    return np.stack(
      [images_lib.model_input(image, self.image_size) for image in images]
    )

  @functools.cached_property
  def _probabilities(self):
    return jax.jit(
      lambda variables, x: jax.nn.softmax(
        self.model.apply(variables, x.astype(np.float32), train=False)
      )
    )


def load(workdir: str | os.PathLike[str], which: str = "best") -> TrainedModel:
  """Loads the model of a run.

  Args:
    workdir: the run's folder.
    which: 'best' or 'latest' checkpoint.

  Raises:
    UserError: there is no run, or no checkpoint yet, or it is damaged.
  """
  workdir = pathlib.Path(workdir)
  config = experiment.read_config(workdir)
  if config is None:
    raise errors.UserError(
      f"{workdir}: no run there (no config.json); give the folder of a run"
    )
  params, batch_stats, _ = checkpoint.load_variables(workdir, which)
  num_classes = len(params["head"]["bias"])
  return TrainedModel(
    workdir.resolve().name,
    experiment.create_model(config, num_classes),
    {"params": params, "batch_stats": batch_stats},
    config.image_size,
    _class_names(workdir, num_classes),
  )


def load_npz(
  path: str | os.PathLike[str], norm: str | None = None, gelu: str = "erf"
) -> TrainedModel:
  """Loads a checkpoint file; the arrays' shapes say which model it holds.

  Args:
    path: an `.npz` of Google's, or one that `pretrained.save` wrote.
    norm: 'GN' has to be said; None: what the arrays' names say, else LN.
    gelu: 'erf' as in RescaleViT, 'tanh' as in Google's code.

  Raises:
    UserError: the file cannot be read or holds no whole ViT.
  """
  path = pathlib.Path(path)
  arrays = npz.read(os.fspath(path)).arrays
  sizes = identify.sizes(arrays)
  positions = arrays.get("Transformer/posembed_input/pos_embedding")
  if None in sizes.values() or positions is None or positions.ndim != 3:
    raise errors.UserError(f"{path}: does not hold a whole Vision Transformer")
  grid = round((positions.shape[1] - 1) ** 0.5)
  num_classes = len(arrays.get("head/bias", [0]))
  pre_logits = arrays.get("pre_logits/bias")
  model = models.create(
    next(iter(variants.VARIANTS)),
    num_classes=num_classes,
    norm=norm or _norm(arrays),
    image_size=grid * sizes["patch_size"],
    gelu=gelu,
    representation_size=None if pre_logits is None else len(pre_logits),
    dtype="auto",
    **sizes,
  )
  image_size = grid * model.patch_size
  like = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32),
  )
  params, batch_stats, _ = pretrained.load(
    path, like["params"], like.get("batch_stats", {})
  )
  return TrainedModel(
    path.stem,
    model,
    jax.device_put({"params": params, "batch_stats": batch_stats}),
    image_size,
    [str(i) for i in range(num_classes)],
  )


def _class_names(workdir, num_classes):
  path = workdir / "class_names.json"
  try:
    names = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return [str(i) for i in range(num_classes)]
  except ValueError as e:
    raise errors.UserError(f"{path}: damaged ({e}); delete it") from e
  if len(names) != num_classes:
    raise errors.UserError(
      f"{path}: has {len(names)} names for {num_classes} classes; delete it"
    )
  return names


def _norm(arrays):
  if any("/Rescale_0/" in key for key in arrays):
    return "Rescale"
  return "BN" if any(key.startswith(npz.STATS) for key in arrays) else "LN"
