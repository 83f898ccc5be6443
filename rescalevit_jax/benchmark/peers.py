"""Peers to compare with: other implementations of the same model and recipe.

Each peer trains on one batch that stays on the device: SGD with momentum,
clipping by global norm, cross-entropy, and dropout at the same sites as ours.
"""

from collections.abc import Callable
import contextlib
import importlib.util
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.benchmark import memory
from rescalevit_jax.config import keys

_CLASSES = 10
# Keys of work that the peers leave out.
_NOT_IN_PEERS = (
  *("optimizer", "agc", "ema_decay", "sam_rho", "spectral_cap", "accum_steps"),
  *("mixup", "cutmix", "model.pool", "model.stochastic_depth", "model.remat"),
  *("model.residual", "model.qk_norm", "model.sigma_reparam"),
  "model.logit_cap",
  *("model.norm_position", "model.norm_depth_scaling", "model.embedding_norm"),
  *("model.representation_size", "model.gelu"),
)


class FlaxViT(nn.Module):
  """A plain ViT from the layers of flax.linen."""

  config: Any  # Of our model.

  @nn.compact
  def __call__(self, x, deterministic):
    c, dtype = self.config, jnp.dtype(self.config.dtype)

    def drop(x):
      return nn.Dropout(c.dropout_rate)(x, deterministic=deterministic)

    patch = (c.patch_size, c.patch_size)
    x = nn.Conv(c.hidden_size, patch, patch, "VALID", dtype=dtype)(x)
    x = x.reshape(len(x), -1, c.hidden_size)
    cls = self.param("cls", nn.initializers.zeros, (1, 1, c.hidden_size))
    cls = jnp.tile(cls.astype(x.dtype), (len(x), 1, 1))
    x = jnp.concatenate([cls, x], axis=1)
    initializer = nn.initializers.normal(0.02)
    x += self.param("pos", initializer, (1, *x.shape[1:])).astype(x.dtype)
    x = drop(x)
    for _ in range(c.num_layers):
      y = nn.LayerNorm(dtype=dtype)(x)
      x += nn.MultiHeadDotProductAttention(c.num_heads, dtype=dtype)(y)
      y = nn.LayerNorm(dtype=dtype)(x)
      y = nn.Dense(c.mlp_dim, dtype=dtype)(y)
      y = drop(nn.gelu(y, approximate=False))
      x += drop(nn.Dense(c.hidden_size, dtype=dtype)(y))
    x = nn.LayerNorm(dtype=dtype)(x)[:, 0]
    return nn.Dense(_CLASSES)(x.astype(jnp.float32))


class FlaxRecipe:
  """Model, optimizer and training step of `FlaxPeer`."""

  def __init__(self, config: Any):
    self.model = FlaxViT(model_of(config).config)
    self._optimizer = optax.chain(
      optax.clip_by_global_norm(config.grad_norm_clip or np.inf),
      optax.sgd(config.base_lr, config.momentum),
    )
    self.train_step = jax.jit(self._train_step, donate_argnums=0)

  def init(self, images: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
    """Return parameters and optimizer state, and a PRNG key."""
    params = self.model.init(jax.random.key(0), images, True)
    return (params, self._optimizer.init(params)), jax.random.key(1)

  def _train_step(self, state, key, images, labels):
    params, opt_state = state
    key, next_key = jax.random.split(key)

    def loss_fn(params):
      logits = self.model.apply(params, images, False, rngs={"dropout": key})
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels
      ).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = self._optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), next_key, loss


class FlaxPeer:
  """flax.linen's layers under `jax.jit`."""

  def __init__(self, config):
    self.batch = config.batch
    recipe = FlaxRecipe(config)
    self._data = jax.tree.map(jnp.asarray, _batch(config))
    self._state, self._key = recipe.init(self._data[0])
    self._train_step = recipe.train_step
    self._forward = jax.jit(
      lambda params, x: recipe.model.apply(params, x, True)
    )

  def train(self, steps: int) -> None:
    """Run a number of training steps and wait for their end."""
    for _ in range(steps):
      self._state, self._key, loss = self._train_step(
        self._state, self._key, *self._data
      )
    jax.block_until_ready((self._state, loss))

  def evaluate(self, batches: int) -> None:
    """Classify a number of batches and wait for the result."""
    for _ in range(batches):
      logits = self._forward(self._state[0], self._data[0])
    logits.block_until_ready()

  def memory_bytes(self) -> int:
    """Return the device memory of a step."""
    step = self._train_step.lower(self._state, self._key, *self._data)
    return memory.used(step.compile())


class TimmPeer:
  """timm's VisionTransformer with torch.compile and its default attention.

  Uses autocast if our dtype is bfloat16.
  """

  def __init__(self, config):
    from timm.models import vision_transformer
    import torch

    self._torch = torch
    ours = model_of(config).config
    self.batch = config.batch
    self._device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = vision_transformer.VisionTransformer(
      img_size=config.image_size,
      patch_size=ours.patch_size,
      num_classes=_CLASSES,
      embed_dim=ours.hidden_size,
      depth=ours.num_layers,
      num_heads=ours.num_heads,
      mlp_ratio=ours.mlp_dim / ours.hidden_size,
      pos_drop_rate=config.model.dropout_rate,
      proj_drop_rate=config.model.dropout_rate,
    ).to(self._device)
    for block in model.blocks:
      # Our attention output has no dropout.
      block.attn.proj_drop = torch.nn.Identity()
    self._model = torch.compile(model)
    images, labels = _batch(config)
    images = images.transpose(0, 3, 1, 2).copy()  # Contiguous.
    self._images = torch.tensor(images, device=self._device)
    self._labels = torch.tensor(labels, dtype=torch.long, device=self._device)
    self._optimizer = torch.optim.SGD(
      model.parameters(), lr=config.base_lr, momentum=config.momentum
    )
    self._parameters = list(model.parameters())
    self._clip = config.grad_norm_clip or float("inf")
    self._autocast: Callable[[], Any] = contextlib.nullcontext
    if ours.dtype != "float32":
      dtype = getattr(torch, str(ours.dtype))
      self._autocast = lambda: torch.autocast(self._device, dtype)

  def train(self, steps: int) -> None:
    """Run a number of training steps and wait for their end."""
    torch = self._torch
    self._model.train()
    for _ in range(steps):
      self._optimizer.zero_grad(set_to_none=True)
      with self._autocast():
        logits = self._model(self._images)
        loss = torch.nn.functional.cross_entropy(logits, self._labels)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
      self._optimizer.step()
    self._wait()

  def evaluate(self, batches: int) -> None:
    """Classify a number of batches and wait for the result."""
    self._model.eval()
    with self._torch.no_grad(), self._autocast():
      for _ in range(batches):
        self._model(self._images)
    self._wait()

  def memory_bytes(self) -> int | None:
    """Return the device memory of a step; None on a CPU."""
    if self._device == "cpu":
      return None
    return self._torch.cuda.max_memory_allocated()

  def _wait(self):
    if self._device == "cuda":
      self._torch.cuda.synchronize()


def model_of(config: Any) -> nn.Module:
  """Return our model of a config, with LayerNorm."""
  return models.create(
    config.model_name,
    num_classes=_CLASSES,
    image_size=config.image_size,
    dtype=config.dtype,
    **{**config.model, "norm": "LN", "alpha_init": None},
  )


def _batch(config):
  rng = np.random.default_rng(0)
  size = config.image_size
  images = rng.standard_normal((config.batch, size, size, 3), np.float32)
  return images, rng.integers(0, _CLASSES, config.batch, np.int32)


def check_recipe(config: Any) -> None:
  """Raise UserError if a config has options that the peers lack."""
  values = config_lib.flatten(config)
  for key in _NOT_IN_PEERS:
    default = keys.KEYS[key].default
    if values[key] not in (default, "plain"):  # LN's residual is plain.
      raise errors.UserError(
        f"--peer: peers train without {key}={values[key]}; set it to {default},"
        " or leave out --peer"
      )


PEERS = {"flax": FlaxPeer, "timm": TimmPeer}  # By name of the package.


def is_installed(subject: str) -> bool:
  """Return False for a peer whose package is missing."""
  return subject == "ours" or importlib.util.find_spec(subject) is not None
