"""Measurements of a model in training, block by block: pure functions.

A model has L + 2 parts: `embedding` (patches, class token, positions),
`block_00`, `block_01`, … (`encoderblock_0`, …), and `head` (final norm to
logits). A quantity is a scalar, or a vector over all parts [L + 2], embedding
and blocks [L + 1], or blocks [L].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32
import numpy as np

from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models import vit
from rescalevit_jax.models.norms import traits
from rescalevit_jax.optim import groups

_SITES = {"0": "attention", "2": "mlp"}  # By the numbers of modules.
_RESIDUAL_SLOTS = {R.SLOT for R in residuals.RESIDUALS.values() if R.SLOT}
_ATTENTION = "MultiHeadDotProductAttention_1"


def block_name(number: int) -> str:
  """Return 'block_03' for `encoderblock_3`."""
  return f"block_{number:02}"


def parts(num_layers: int) -> list[str]:
  """Return the names of the L + 2 parts, from input to output."""
  return ["embedding", *map(block_name, range(num_layers)), "head"]


def by_name(
  found: Mapping[str, np.ndarray], num_layers: int
) -> dict[str, float]:
  """Return measurements as floats, by names such as 'block_03/grad_norm'.

  Non-finite values are omitted: JSON cannot represent them.
  """
  numbers = {}
  for quantity, values in found.items():
    if np.ndim(values) == 0:
      numbers[quantity] = float(values)
      continue
    first = 1 if len(values) == num_layers else 0
    for part, value in zip(parts(num_layers)[first:], values, strict=False):
      numbers[f"{part}/{quantity}"] = float(value)
  return {key: x for key, x in numbers.items() if np.isfinite(x)}


def after_step(before: Any, after: Any) -> dict[str, jax.Array]:
  """Measure the update of a step from the parameters before and after it.

  Returns:
    `update_ratio` [L + 2]: |w_after - w_before| / |w_before| for the vector w
    of all parameters of a part.
  """
  updates = jax.tree.map(jnp.subtract, after, before)
  squares, weights = sums_of_squares(updates), sums_of_squares(before)
  return {"update_ratio": jnp.sqrt(squares / weights)}


def gradient_norms(grads: Any) -> dict[str, jax.Array]:
  """Compute the gradient norm of each part, before clipping.

  Returns:
    `grad_norm` [L + 2] of all parameters of a part; its squares add up to the
    square of the global norm. `grad_norm_qk` [L] of the query and key layers
    and their norms.
  """

  def of_queries_and_keys(path):
    layers = ("query", "key", "query_norm", "key_norm")
    return any(name in layers for name in path)

  squares = sums_of_squares(grads, of_queries_and_keys)
  return {
    "grad_norm": jnp.sqrt(sums_of_squares(grads)),
    "grad_norm_qk": jnp.sqrt(squares[1:-1]),
  }


def sums_of_squares(
  tree: Any, wanted: Callable[[Sequence[str]], bool] = lambda path: True
) -> Float32[Array, " parts"]:
  """Compute the sum of squares of each of the L + 2 parts.

  Only leaves whose path satisfies `wanted` count.
  """
  num_layers = groups.num_layers(tree)
  sums = [jnp.zeros(())] * (num_layers + 2)
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if wanted([key.key for key in path]):
      part = groups.layer(path, num_layers)
      sums[part] += jnp.square(x.astype(jnp.float32)).sum()
  return jnp.stack(sums)


def scalars(params: Any) -> dict[str, jax.Array]:
  """Return the learned scalars of norms, residuals and sigmaReparam.

  Returns:
    The value of each one-element parameter, and the root mean square of each
    vector other than a bias, by block [L], such as `alpha_mlp`,
    `scale_attention` or `gamma_query`. `branch_attention` and `branch_mlp` are
    the residual's, `alpha_peri_mlp` is of a norm after a branch. Those of the
    final norm are scalars, such as `head/alpha`.
  """
  transformer = params["Transformer"]
  blocks = [
    traverse_util.flatten_dict(transformer[f"encoderblock_{i}"])
    for i in range(groups.num_layers(params))
  ]
  final = transformer.get("encoder_norm", {})
  return {
    _scalar_name(path): jnp.stack([_magnitude(block[path]) for block in blocks])
    for path, x in blocks[0].items()
    if _is_scalar(path[-1], x)
  } | {
    f"head/{name}": _magnitude(x)
    for name, x in final.items()
    if _is_scalar(name, x)
  }


def _is_scalar(name, x):
  return x.size == 1 or (x.ndim == 1 and "bias" not in name)


def _magnitude(x):
  return x.reshape(()) if x.size == 1 else jnp.sqrt(jnp.square(x).mean())


def _scalar_name(path):
  """Return a name such as 'alpha_mlp' for a path in a block."""
  *layer, module, name = path
  slot, _, number = module.rpartition("_")
  if name == "scale" and slot in _RESIDUAL_SLOTS:
    name = "branch"
  site = module if layer else _SITES.get(number, module)
  peri = "peri_" if slot.startswith("Peri") else ""
  return f"{name}_{peri}{site}"


def forward(
  model: nn.Module,
  variables: Mapping[str, Any],
  images: Float32[Array, "B S S 3"],
) -> dict[str, jax.Array]:
  """Measure a forward pass of images in [-1, 1] in evaluation mode.

  Returns:
    Quantities of the residual stream [L + 1], at the input of the first block
    and after each block: `stream_rms_cls`, sqrt(mean x^2) of the class token
    over images and channels, and `stream_mean_cls`, its mean;
    `stream_rms_patches` and `stream_mean_patches`, the same for patches.

    `attention_entropy` [L]: -sum p ln p over keys in nats, averaged over
    images, heads and queries; ln N for uniform attention over N tokens.

    For norms with a bounded function (DyT and similar, Fade with an alpha)
    `saturation_attention` and `saturation_mlp` [L] and `head/saturation`: the
    fraction of activations, over images, tokens and channels, for which the
    slope of the function is below a tenth of its maximum, such as
    |tanh| > 0.949, |erf| > 0.968.
  """
  _, found = model.apply(
    variables,
    images,
    train=False,
    capture_intermediates=_is_measured,
    mutable=["intermediates"],
  )
  found = found["intermediates"]["Transformer"]
  blocks = [found[f"encoderblock_{i}"] for i in range(model.config.num_layers)]
  embedding = found.get("embedding_norm", found["posembed_input"])
  streams = [embedding["__call__"][-1]]
  streams += [block["__call__"][-1] for block in blocks]
  entropies = [
    jax.scipy.special.entr(block[_ATTENTION]["attention"][-1]).sum(-1).mean()
    for block in blocks
  ]
  measured = {"attention_entropy": jnp.stack(entropies)}
  for name, tokens in (("cls", np.s_[:1]), ("patches", np.s_[1:])):
    x = [stream[:, tokens].astype(jnp.float32) for stream in streams]
    measured |= {
      f"stream_rms_{name}": jnp.sqrt(
        jnp.stack([jnp.square(x).mean() for x in x])
      ),
      f"stream_mean_{name}": jnp.stack([x.mean() for x in x]),
    }
  Norm = norms.NORMS[model.config.norm]
  if not issubclass(Norm, traits.Saturating):
    return measured
  # A linear site does not call its function.
  slot = model.config.norm_slot
  if "function" not in blocks[-1].get(slot(2), {}):
    return measured

  def saturation(site):
    return (jnp.abs(site["function"][-1]) > Norm.FUNCTION.saturated).mean()

  for number, branch in ((0, "attention"), (2, "mlp")):
    shares = [saturation(block[slot(number)]) for block in blocks]
    measured[f"saturation_{branch}"] = jnp.stack(shares)
  if "encoder_norm" in found:
    measured["head/saturation"] = saturation(found["encoder_norm"])
  return measured


def _is_measured(module, method):
  """Return whether `forward` needs the output of a module's method.

  Attention probabilities are always captured.
  """
  if method == "function":
    return isinstance(module, traits.Saturating)
  stream = (vit.EncoderBlock, vit.PositionEmbedding)
  is_stream = isinstance(module, stream) or module.name == "embedding_norm"
  return method == "__call__" and is_stream
