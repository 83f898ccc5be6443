"""Load trained models from a run's folder or an `.npz`, and classify images.

model = trained_model.load("runs/a")
probabilities = model(["cat.png", "dog.jpeg"])
names = model.top(probabilities[0])
"""

from collections.abc import Iterable, Mapping, Sequence
import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
from jaxtyping import Float, Float32
import numpy as np
from PIL import Image

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.analysis import imagenet_names
from rescalevit_jax.data import image_files
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit_config
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import fold as fold_lib
from rescalevit_jax.pretrained import load as load_lib
from rescalevit_jax.pretrained import npz
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder
from rescalevit_jax.training import experiment


class TrainedModel:
  """A model with its weights.

  Attributes:
    name: name for titles: the run's folder, or the file without its suffix.
    model: a `VisionTransformer`.
    variables: the collections `params` and `batch_stats`.
    image_size: height and width of the model's input, in pixels.
    class_names: names in the order of the probabilities; empty without a head.
    resize: the first resizing of images, as in the run's dataset.
    step: training step of a run's checkpoint; None for a file.
  """

  def __init__(
    self,
    name: str,
    model: nn.Module,
    variables: Mapping[str, Any],
    image_size: int,
    class_names: Sequence[str],
    resize: image_files.Resize = image_files.Resize(),  # noqa: B008 - frozen.
    step: int | None = None,
  ):
    self.name = name
    self.model = model
    self.variables = variables
    self.image_size = image_size
    self.class_names = tuple(class_names)
    self.resize = resize
    self.step = step

  def __call__(
    self, images: Iterable[image_files.Source], batch: int = 64
  ) -> Float32[np.ndarray, "M classes"]:
    """Return the class probabilities of images of any size.

    Args:
      images: M images, each a path, a Pillow image, or a uint8 array [H, W, 3],
        [H, W, 1] or [H, W].
      batch: images per step.

    Raises:
      UserError: an image cannot be read, or the model has no head.
    """
    single = isinstance(images, str | os.PathLike | Image.Image)
    # An array would be split into its rows.
    if single or getattr(images, "ndim", None) == 3:
      raise errors.UserError("images: got one image; pass a list of images")
    images = list(images)
    batch = max(1, min(batch, len(images)))
    rows = [np.zeros((0, len(self.class_names)), np.float32)]
    for start in range(0, len(images), batch):
      x = self.inputs(images[start : start + batch])
      rows.append(self.probabilities(x, batch))
    return np.concatenate(rows)

  def inputs(
    self, images: Sequence[image_files.Source]
  ) -> Float32[np.ndarray, "M S S 3"]:
    """Return images as model inputs.

    Raises:
      UserError: an image cannot be read.
    """
    return np.stack(
      [
        image_files.model_input(image, self.image_size, self.resize)
        for image in images
      ]
    )

  def probabilities(
    self, inputs: Float32[np.ndarray, "M S S 3"], batch: int
  ) -> Float32[np.ndarray, "M classes"]:
    """Return the class probabilities of a batch of model inputs.

    Args:
      inputs: result of `inputs`, with M <= `batch`.
      batch: size to pad to; each size is compiled once.

    Raises:
      UserError: the model has no head.
    """
    if not self.class_names:
      raise errors.UserError(
        f"{self.name}: has no head; fine-tune it to classify images"
      )
    filled = np.zeros((batch, *inputs.shape[1:]), np.float32)
    filled[: len(inputs)] = inputs
    return np.asarray(self._softmax(self.variables, filled))[: len(inputs)]

  def top(
    self, probabilities: Float[np.ndarray, " classes"], count: int = 5
  ) -> list[tuple[str, float]]:
    """Return the most probable classes with their probabilities, sorted.

    Args:
      probabilities: probabilities of one image.
      count: maximum number of classes.
    """
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(self.class_names[i], float(probabilities[i])) for i in order]

  def fold(self) -> "TrainedModel":
    """Return the equivalent model without norms; see `pretrained.fold`.

    Raises:
      UserError: the norm does not fold.
    """
    config = self.model.config
    if norms.NORMS[config.norm].FINAL and not self.class_names:
      raise errors.UserError(
        f"{self.name}: has no head to fold the final norm into; export without"
        " --fold"
      )
    params, batch_stats = fold_lib.fold(
      config.norm,
      self.variables["params"],
      self.variables.get("batch_stats", {}),
      depth_scaling=config.norm_depth_scaling,
      epsilon=config.norm_epsilon,
    )
    config = dataclasses.replace(
      config,
      norm="Identity",
      norm_schedule=None,
      norm_depth_scaling=False,
      alpha_init=None,
      sigma_reparam=False,
    )
    folded = copy.copy(self)
    folded.model = self.model.clone(config=config)
    folded.variables = {"params": params, "batch_stats": batch_stats}
    return folded

  @functools.cached_property
  def _softmax(self):
    return jax.jit(
      lambda variables, x: jax.nn.softmax(
        self.model.apply(variables, x, train=False)
      )
    )


def load(workdir: str | os.PathLike[str], which: str = "best") -> TrainedModel:
  """Load the model of a run.

  Args:
    workdir: the run's folder.
    which: 'best' or 'latest' checkpoint.

  Raises:
    UserError: there is no run or no checkpoint yet, or the checkpoint is
      damaged or does not match the run's config.
  """
  workdir = pathlib.Path(workdir)
  config = folder.require_config(workdir)
  config.model.attention = "auto"  # This device may differ from the run's.
  params, batch_stats, step = checkpoint.load_variables(workdir, which)
  num_classes = np.size(params.get("head", {}).get("bias", ()))
  model = experiment.create_model(config, num_classes)
  variables = {"params": params, "batch_stats": batch_stats}
  if problem := _difference(variables, _shapes(model, config.image_size)):
    raise errors.UserError(
      f"{workdir}: the checkpoint does not match config.json: {problem}"
    )
  return TrainedModel(
    workdir.resolve().name,
    model,
    variables,
    config.image_size,
    _class_names(workdir, num_classes),
    image_files.Resize(
      config.data.image_size, config.data.resize, config.data.crop_ratio
    ),
    step,
  )


def load_npz(
  path: str | os.PathLike[str],
  norm: str | None = None,
  gelu: str = "erf",
  pool: str = "cls",
  residual_c: float | None = None,
  **constants: Any,
) -> TrainedModel:
  """Load a checkpoint file; the shapes of its arrays determine the model.

  Classes have ImageNet's names if there are as many, otherwise their indices.
  Some options cannot be inferred from the arrays.

  Args:
    path: an `.npz` in Google's format.
    norm: norm of the model; None to infer it from the names of the arrays.
      GN cannot be told from LN: pass 'GN'.
    gelu: 'erf' as in RescaleViT, or 'tanh' as in Google's code.
    pool: `model.pool` of the model.
    residual_c: `model.residual_c` of the model.
    **constants: other fields of `ViTConfig` that the arrays do not show:
      `norm_epsilon`, `gn_groups`, `norm_depth_scaling`, `residual` (convex).

  Raises:
    UserError: the file cannot be read, holds no complete ViT, or holds a ViT
      with another norm.
  """
  path = pathlib.Path(path)
  arrays = npz.read(os.fspath(path)).arrays
  sizes = detect.sizes(arrays)
  positions = arrays.get("Transformer/posembed_input/pos_embedding")
  patch_size = sizes["patch_size"]
  if (
    patch_size is None
    or None in sizes.values()
    or positions is None
    or positions.ndim != 3
  ):
    raise errors.UserError(
      f"{path}: does not hold a complete Vision Transformer"
    )
  found = detect.settings(arrays)
  norm = norm or found["norm"]
  if residual_c is not None and found["residual"] != "rescalenet":
    raise errors.UserError(
      f"{path}: has no residual with a constant c; leave c out"
    )
  if "gn_groups" in constants and norm != "GN":
    raise errors.UserError(
      f"{path}: groups are of GN; add GN, or leave them out"
    )
  image_size = math.isqrt(positions.shape[1]) * patch_size
  num_classes = np.size(arrays.get("head/bias", ()))
  pre_logits = arrays.get("pre_logits/bias")
  try:
    model = models.create(
      next(iter(vit_config.VARIANTS)),
      num_classes=num_classes or 1,
      image_size=image_size,
      gelu=gelu,
      pool=pool,
      representation_size=None if pre_logits is None else pre_logits.size,
      residual_c=residual_c,
      dtype="auto",
      **found | {"norm": norm} | constants,
      **sizes,
    )
  except errors.UserError as e:
    raise errors.UserError(f"{path}: {e}") from e
  if norm not in detect.same_arrays(found["norm"]):
    raise errors.UserError(
      f"{path}: holds a model with {found['norm']}, not {norm}; change the norm"
    )
  like = _shapes(model, image_size)
  params, batch_stats, report = load_lib.load(
    path, like["params"], like.get("batch_stats", {})
  )
  if report.initial:
    raise errors.UserError(
      f"{path}: lacks {report.initial[0]}; use a complete checkpoint"
    )
  if report.unsupported:
    raise errors.UserError(
      f"{path}: the model has no place for {report.unsupported[0]}; leave out"
      f" {model.config.residual}"
    )
  return TrainedModel(
    path.stem,
    model,
    jax.device_put({"params": params, "batch_stats": batch_stats}),
    image_size,
    imagenet_names.find(num_classes) or [str(i) for i in range(num_classes)],
  )


def _shapes(model, image_size):
  """Return a model's variables as shapes and dtypes."""
  return jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32),
  )


def _difference(variables, like):
  """Return a description of a variable whose shape differs, or None."""
  ours, theirs = (
    {key: x.shape for key, x in traverse_util.flatten_dict(v, sep="/").items()}
    for v in (variables, like)
  )
  for key in sorted(ours | theirs):
    if key not in ours:
      return f"{key} is missing in the checkpoint"
    if key not in theirs:
      return f"{key} is not in the model"
    if ours[key] != theirs[key]:
      return f"{key} has shape {ours[key]}, not {theirs[key]}"
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
      f"{path}: is not a list of {num_classes} names; delete it"
    )
  return names
