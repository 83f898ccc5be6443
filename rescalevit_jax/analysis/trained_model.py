"""Trained models, from a run's folder or from an `.npz`, ready to be called.

model = trained_model.load("runs/a")
probabilities = model(["cat.png", "dog.jpeg"])
names = model.top(probabilities[0])
"""

from collections.abc import Iterable, Sequence
import functools
import json
import math
import os
import pathlib
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np
from PIL import Image

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.data import image_files
from rescalevit_jax.models import variants
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import load as load_lib
from rescalevit_jax.pretrained import npz
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder
from rescalevit_jax.training import experiment


class TrainedModel:
  """A model with its weights.

  Attributes:
    name: for titles: the run's folder or the file, without its suffix.
    model: a `VisionTransformer`.
    variables: the collections `params` and `batch_stats`.
    image_size: edge of the model's input, in pixels.
    class_names: in the order of the probabilities; none if there is no head.
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
    self, images: Iterable[image_files.Source], batch: int = 64
  ) -> np.ndarray:
    """Classifies images of any size.

    Args:
      images: M of them, each a path, a Pillow image, or a uint8 array
        [H, W, 3], [H, W, 1] or [H, W].
      batch: images a step of the device.

    Returns:
      Probabilities [M, classes], float32; each row sums to 1.

    Raises:
      UserError: one cannot be read as an image, or the model has no head.
    """
    single = isinstance(images, str | os.PathLike | Image.Image)
    # An array would be taken apart into its rows.
    if single or getattr(images, "ndim", None) == 3:
      raise errors.UserError(
        "one image is given where several are expected: put it into a list"
      )
    images = list(images)
    batch = max(1, min(batch, len(images)))
    rows = [np.zeros((0, len(self.class_names)), np.float32)]
    for start in range(0, len(images), batch):
      x = self.inputs(images[start : start + batch])
      rows.append(self.probabilities(x, batch))
    return np.concatenate(rows)

  def inputs(self, images: Sequence[image_files.Source]) -> np.ndarray:
    """Returns images as the model takes them, [M, S, S, 3] float32.

    Raises:
      UserError: one cannot be read as an image.
    """
    return np.stack(
      [image_files.model_input(image, self.image_size) for image in images]
    )

  def probabilities(self, inputs: np.ndarray, batch: int) -> np.ndarray:
    """Classifies one batch of what `inputs` returns.

    Args:
      inputs: [M, S, S, 3] float32, M at most `batch`.
      batch: images that the device computes; one number, one compilation.

    Returns:
      Probabilities [M, classes], float32.

    Raises:
      UserError: the model has no head.
    """
    if not self.class_names:
      raise errors.UserError(
        f"{self.name}: has no head, so that it knows no classes; fine-tune it"
      )
    filled = np.zeros((batch, *inputs.shape[1:]), np.float32)
    filled[: len(inputs)] = inputs
    return np.asarray(self._softmax(self.variables, filled))[: len(inputs)]

  def top(
    self, probabilities: np.ndarray, count: int = 5
  ) -> list[tuple[str, float]]:
    """Returns the most probable classes, the first one first.

    Args:
      probabilities: [classes], of one image.
      count: how many at most.

    Returns:
      Class names with their probabilities.
    """
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(self.class_names[i], float(probabilities[i])) for i in order]

  @functools.cached_property
  def _softmax(self):
    return jax.jit(
      lambda variables, x: jax.nn.softmax(
        self.model.apply(variables, x, train=False)
      )
    )


def load(workdir: str | os.PathLike[str], which: str = "best") -> TrainedModel:
  """Loads the model of a run.

  Args:
    workdir: the run's folder.
    which: 'best' or 'latest' checkpoint.

  Raises:
    UserError: there is no run, or no checkpoint yet, or it is damaged, or not
      of the run's config.
  """
  workdir = pathlib.Path(workdir)
  config = folder.require_config(workdir)
  config.model.attention = "auto"  # The run's machine may not be this one.
  params, batch_stats, _ = checkpoint.load_variables(workdir, which)
  num_classes = np.size(params.get("head", {}).get("bias", ()))
  model = experiment.create_model(config, num_classes)
  variables = {"params": params, "batch_stats": batch_stats}
  if problem := _difference(variables, _shapes(model, config.image_size)):
    raise errors.UserError(
      f"{workdir}: the checkpoint is not of the model in config.json: {problem}"
    )
  return TrainedModel(
    workdir.resolve().name,
    model,
    variables,
    config.image_size,
    _class_names(workdir, num_classes),
  )


def load_npz(
  path: str | os.PathLike[str],
  norm: str | None = None,
  gelu: str = "erf",
  pool: str = "cls",
  residual_c: float | None = None,
) -> TrainedModel:
  """Loads a checkpoint file; the arrays' shapes say which model it holds.

  Its classes have no names there: they are called by their numbers.

  Args:
    path: an `.npz` of Google's, or one that `pretrained.save` wrote.
    norm: 'GN' has to be said; None: what the arrays' names say, else LN.
    gelu: 'erf' as in RescaleViT, 'tanh' as in Google's code.
    pool: 'gap' has to be said where it was `model.pool`.
    residual_c: has to be said where it was not None.

  Raises:
    UserError: the file cannot be read, holds no whole ViT, or one of another
      norm.
  """
  path = pathlib.Path(path)
  arrays = npz.read(os.fspath(path)).arrays
  sizes = detect.sizes(arrays)
  positions = arrays.get("Transformer/posembed_input/pos_embedding")
  if None in sizes.values() or positions is None or positions.ndim != 3:
    raise errors.UserError(f"{path}: does not hold a whole Vision Transformer")
  found = detect.settings(arrays)
  norm = norm or found["norm"]
  image_size = math.isqrt(positions.shape[1]) * sizes["patch_size"]
  num_classes = np.size(arrays.get("head/bias", ()))
  pre_logits = arrays.get("pre_logits/bias")
  try:
    model = models.create(
      next(iter(variants.VARIANTS)),
      num_classes=num_classes or 1,
      image_size=image_size,
      gelu=gelu,
      pool=pool,
      representation_size=None if pre_logits is None else pre_logits.size,
      residual_c=residual_c,
      dtype="auto",
      **found | {"norm": norm},
      **sizes,
    )
  except errors.UserError as e:
    raise errors.UserError(f"{path}: {e}") from e
  if norm != found["norm"] and (norm, found["norm"]) != ("GN", "LN"):
    raise errors.UserError(
      f"{path}: holds a model with {found['norm']}, not {norm}"
    )
  like = _shapes(model, image_size)
  params, batch_stats, report = load_lib.load(
    path, like["params"], like.get("batch_stats", {})
  )
  if report.initial:
    raise errors.UserError(f"{path}: lacks {report.initial[0]}")
  return TrainedModel(
    path.stem,
    model,
    jax.device_put({"params": params, "batch_stats": batch_stats}),
    image_size,
    [str(i) for i in range(num_classes)],
  )


def _shapes(model, image_size):
  """Returns a model's collections of variables, their shapes and types."""
  return jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32),
  )


def _difference(variables, like):
  """Names a variable whose shape differs; None if there is none."""
  ours, theirs = (
    {key: x.shape for key, x in traverse_util.flatten_dict(v, sep="/").items()}
    for v in (variables, like)
  )
  for key in sorted(ours | theirs):
    if ours.get(key) != theirs.get(key):
      return f"{key} is {ours.get(key)} there, {theirs.get(key)} in the model"
  return None


def _class_names(workdir, num_classes):
  path = workdir / folder.CLASS_NAMES
  try:
    names = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return [str(i) for i in range(num_classes)]
  except (RecursionError, ValueError) as e:
    raise errors.UserError(f"{path}: damaged ({e}); delete it") from e
  if (
    not isinstance(names, list)
    or not all(isinstance(name, str) for name in names)
    or len(names) != num_classes
  ):
    raise errors.UserError(
      f"{path}: is no list of {num_classes} names; delete it"
    )
  return names
