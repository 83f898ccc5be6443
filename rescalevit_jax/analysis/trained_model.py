"""A trained model that classifies images, and its loading from a run.

model = trained_model.load("runs/a")
probabilities = model(["cat.png", "dog.jpeg"])
names = model.top(probabilities[0])
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
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
from rescalevit_jax.data import image_files
from rescalevit_jax.models import norms
from rescalevit_jax.pretrained import fold as fold_lib
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder
from rescalevit_jax.training import experiment


@dataclasses.dataclass(eq=False)
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

  name: str
  model: nn.Module
  variables: Mapping[str, Any]
  image_size: int
  class_names: Sequence[str]
  resize: image_files.Resize = image_files.Resize()
  step: int | None = None

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
    # One image given as an array would be split into rows. Any other array
    # [N, H, W] is a batch of gray images.
    shape: tuple[int, ...] = getattr(images, "shape", ())
    if single or len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)):
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
    """Return images as model inputs."""
    return np.stack(
      [
        image_files.model_input(image, self.image_size, self.resize)
        for image in images
      ]
    )

  def probabilities(
    self, inputs: Float32[np.ndarray, "M S S 3"], batch: int
  ) -> Float32[np.ndarray, "M classes"]:
    """Return the class probabilities of model inputs, padded to `batch`.

    Each size of batch is compiled once.
    """
    if not self.class_names:
      raise errors.UserError(
        f"{self.name}: has no head; fine-tune it to classify images"
      )
    filled = np.zeros((batch, *inputs.shape[1:]), np.float32)
    filled[: len(inputs)] = inputs
    return np.asarray(self._softmax(self.variables, filled))[: len(inputs)]

  @functools.cached_property
  def _softmax(self):
    return jax.jit(
      lambda variables, x: jax.nn.softmax(
        self.model.apply(variables, x, train=False)
      )
    )

  def top(
    self, probabilities: Float[np.ndarray, " classes"], count: int = 5
  ) -> list[tuple[str, float]]:
    """Return an image's most probable classes with probabilities, sorted."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(self.class_names[i], float(probabilities[i])) for i in order]

  def fold(self) -> "TrainedModel":
    """Return the equivalent model without norms; see `pretrained.fold`."""
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
    return dataclasses.replace(
      self,
      model=self.model.clone(config=config),
      variables={"params": params, "batch_stats": batch_stats},
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
  ours, theirs = (
    {key: x.shape for key, x in traverse_util.flatten_dict(v, sep="/").items()}
    for v in (variables, shapes(model, config.image_size))
  )
  if differing := {key for key, _ in ours.items() ^ theirs.items()}:
    key = min(differing)
    raise errors.UserError(
      f"{workdir}: the checkpoint does not match config.json: {key} is"
      f" {ours.get(key, 'missing')} in the checkpoint and"
      f" {theirs.get(key, 'missing')} in the model"
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


def shapes(model: nn.Module, image_size: int) -> Mapping[str, Any]:
  """Return a model's variables as shapes and dtypes."""
  return jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32),
  )


def _class_names(workdir, num_classes):
  names = folder.read_class_names(workdir)
  if names is None:
    return tuple(map(str, range(num_classes)))
  if len(names) != num_classes:
    raise errors.UserError(
      f"{workdir / folder.CLASS_NAMES}: is not a list of {num_classes} names;"
      " delete it"
    )
  return tuple(names)
