"""What is measured of a model in training, block by block: pure functions.

The model is seen as L + 2 parts: `embedding` (patches, class token, positions),
`block_00`, `block_01`, ... as in `encoderblock_0`, and `head` (the final norm,
the head and what is between them). A quantity is a vector with an entry a part:
[L + 2] of all parts, [L + 1] of embedding and blocks, [L] of the blocks; or a
number.

Shapes: B images, N tokens (the class token first), D channels, h heads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.augment import preprocess
from rescalevit_jax.models import base
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step

EMBEDDING, HEAD = "embedding", "head"

_ATTENTION = "MultiHeadDotProductAttention_1"


def block_name(number: int) -> str:
  """Returns 'block_03' for the block `encoderblock_3`."""
  return f"block_{number:02}"


def parts(num_layers: int) -> list[str]:
  """Returns the names of the L + 2 parts, in the order of the data's way."""
  return [EMBEDDING, *map(block_name, range(num_layers)), HEAD]


def names(quantity: str, size: int, num_layers: int) -> list[str]:
  """Returns the names of a vector's entries, such as 'block_03/grad_norm'."""
  first = 1 if size == num_layers else 0
  return [
    f"{part}/{quantity}" for part in parts(num_layers)[first : first + size]
  ]


def by_name(
  found: Mapping[str, np.ndarray], num_layers: int
) -> dict[str, float]:
  """Returns measured quantities as numbers, by name.

  What is not finite is left out: JSON has no such numbers.

  Args:
    found: of `before_step`, `after_step` or `sharpness.sharpness`.
    num_layers: L.
  """
  numbers = {}
  for quantity, values in found.items():
    if np.ndim(values) == 0:
      numbers[quantity] = float(values)
      continue
    keys = names(quantity, len(values), num_layers)
    numbers.update(zip(keys, map(float, values), strict=True))
  return {key: x for key, x in numbers.items() if np.isfinite(x)}


def before_step(
  state: train_state.TrainState,
  images: jax.Array,
  labels: jax.Array,
  seed: int | jax.Array,
  probe: jax.Array,
  *,
  gradient_options: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """Measures a state before its next step: the step's gradient and the stream.

  Args:
    state: that the step begins with; its own weights, not their averages.
    images: of the step, [A, B, H, W, 3] uint8; see `step.train_step`.
    labels: [A, B] int32.
    seed: of the run.
    probe: other images, seen as in evaluation, [M, H, W, 3] uint8.
    gradient_options: see `Experiment.gradient_options`.

  Returns:
    What `gradient_norms` and `forward` do, in one dictionary. The gradient is
    the very one of the step, computed once more.
  """
  _, grads, _, _ = train_step.gradient(
    state, images, labels, seed, **gradient_options
  )
  gather = gradient_options.get("gather", lambda params: params)
  return gradient_norms(grads) | forward(
    gradient_options["model"],
    {"params": gather(state.params), "batch_stats": state.batch_stats},
    preprocess.prepare(probe, gradient_options["image_size"]),
  )


def after_step(before: Any, after: Any) -> dict[str, jax.Array]:
  """Measures a step's update.

  Args:
    before: the parameters before the step.
    after: those after it.

  Returns:
    `update_ratio` [L + 2]: of each part's parameters as one vector w,
    |w_after - w_before| / |w_before|.
  """
  updates = jax.tree.map(jnp.subtract, after, before)
  squares, weights = sums_of_squares(updates), sums_of_squares(before)
  return {"update_ratio": jnp.sqrt(squares / weights)}


def gradient_norms(grads: Any) -> dict[str, jax.Array]:
  """Returns norms of a gradient, before any clipping.

  Args:
    grads: a tree like the parameters.

  Returns:
    `grad_norm` [L + 2], of all parameters of a part, whose squares add up to
    that of the global norm; and `grad_norm_qk` [L], of what makes queries and
    keys: kernels and biases, and their norms' scales.
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
) -> jax.Array:
  """Returns the sum of squares of each part of a tree of parameters, [L + 2].

  Args:
    tree: of parameters, gradients or updates.
    wanted: which leaves count, by the names on the way to them.
  """
  blocks = [name for name in tree["Transformer"] if name.startswith("enc")]
  num_layers = sum(name != "encoder_norm" for name in blocks)
  sums = {part: jnp.zeros(()) for part in parts(num_layers)}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    path = [key.key for key in path]
    if wanted(path):
      sums[_part(path)] += jnp.square(x.astype(jnp.float32)).sum()
  return jnp.stack(list(sums.values()))


def _part(path):
  name = path[1] if path[0] == "Transformer" else path[0]
  if name.startswith("encoderblock_"):
    return block_name(int(name.removeprefix("encoderblock_")))
  return HEAD if name in ("encoder_norm", "pre_logits", "head") else EMBEDDING


def forward(
  model: nn.Module, variables: Mapping[str, Any], images: jax.Array
) -> dict[str, jax.Array]:
  """Measures a pass in evaluation mode.

  Args:
    model: a `VisionTransformer`.
    variables: its collections `params` and `batch_stats`.
    images: [B, S, S, 3] float32 in [-1, 1].

  Returns:
    Of the residual stream x [B, N, D], first as it enters the blocks, then
    after each one, [L + 1]: `stream_rms_cls`, sqrt(mean x^2) over images and
    channels of the class token, and `stream_mean_cls`, their mean;
    `stream_rms_patches` and `stream_mean_patches`, the same over images,
    patches and channels.

    `attention_entropy` [L]: the mean over images, heads and queries of
    -sum p ln p over what a query attends to, in nats; ln N if uniform.

    With norms that have saturated ends (DyT, Derf, Fade with an alpha)
    `saturation_attention` and `saturation_mlp` [L] and `head/saturation`: the
    share of a place's numbers, over images, tokens and channels, at which the
    slope of tanh or erf is less than a tenth of its steepest: |tanh| > 0.949,
    |erf| > 0.968.
  """
  _, found = model.apply(
    variables,
    images,
    train=False,
    capture_intermediates=_is_measured,
    mutable=["intermediates"],
  )
  found = found["intermediates"]["Transformer"]
  blocks = [found[f"encoderblock_{i}"] for i in range(model.num_layers)]
  streams = [found["posembed_input"]["__call__"][-1]]
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
  Norm = norms.NORMS[model.norm]
  # A place that fades to a linear map has no function with ends.
  if Norm.SATURATED is None or "function" not in found.get("encoder_norm", {}):
    return measured

  def saturation(place):
    return (jnp.abs(place["function"][-1]) > Norm.SATURATED).mean()

  for number, branch in ((0, "attention"), (2, "mlp")):
    shares = [saturation(block[f"{Norm.SLOT}_{number}"]) for block in blocks]
    measured[f"saturation_{branch}"] = jnp.stack(shares)
  measured["head/saturation"] = saturation(found["encoder_norm"])
  return measured


def _is_measured(module, method):
  """Whether what a module's method returns is looked at by `forward`.

  Attention's probabilities are sown whenever anything is.
  """
  if method == "function":
    return isinstance(module, base.Norm)
  stream = (vit.EncoderBlock, vit.PositionEmbedding)
  return method == "__call__" and isinstance(module, stream)
