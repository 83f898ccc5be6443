"""Properties of training and evaluation compiled for GPUs."""

import collections
import re

import jax
import norm_sets
import pytest
from tiny_gpu import tiny_config

from rescalevit_jax import errors
from rescalevit_jax.benchmark import gpu_compile
from rescalevit_jax.benchmark import gpus
from rescalevit_jax.models import vit_config
from rescalevit_jax.training import experiment

ATTEND = "__cudnn$fmhaSoftmax"
ATTEND_BACK = "__cudnn$fmhaSoftmaxBackward"
# Image resizing and the head.
FLOAT32_PRODUCTS = re.compile(r"bsh,bhwc->bswc|btw,bswc->bstc|/head/")

# Other norms compile to similar programs.
EVERY_NORM = norm_sets.most_slow("LN", "BN", "GN", "Rescale", "Cal")
# Keys of a norm's training step, whose program tests share.
TRAIN_KEYS = {
  "BN": {"batch": 64, "model.hidden_size": 128},
  "GN": {"dtype": "float16", "augment.crop": True},
}
HALF_DTYPES = [x for x in ("bfloat16", "float16") if x in vit_config.DTYPES]


def assert_lean(program):
  """Assert that there are no host transfers and most products are 16-bit."""
  assert not program.conditionals and not program.host_transfers
  single = [k.op_name for k in program.kernels if k.dtype == "f32"]
  assert single
  assert not [name for name in single if not FLOAT32_PRODUCTS.search(name)]
  assert {k.dtype for k in program.kernels if k.flops} > {"f32"}


@pytest.mark.parametrize("norm", EVERY_NORM)
def test_every_norm_compiles_for_training(compile_tiny, norm):
  keys = TRAIN_KEYS.get(norm, {})
  program = compile_tiny("train", **{"model.norm": norm, **keys})
  assert_lean(program)
  kinds = program.kinds
  # For the class token alone, the last block does not use cuDNN.
  assert kinds[ATTEND] == kinds[ATTEND_BACK] in (1, 2)
  assert not program.collectives
  assert program.launches == 1  # A CUDA graph.


@pytest.mark.parametrize(
  "norm", [pytest.param("LN", marks=pytest.mark.slow), "BN"]
)
def test_batch_is_not_the_minor_axis_of_activations(compile_tiny, norm):
  # [tokens, channels, images]: XLA would transpose them around each product.
  keys = {"model.norm": norm, **TRAIN_KEYS["BN"]}
  assert "65,128,64]" not in compile_tiny("train", **keys).text


def test_updates_of_small_parameters_share_kernels(compile_tiny):
  program = compile_tiny("train", **{"model.norm": "LN"})
  updates = [k for k in program.kernels if k.op_name == "jit(train_step)/add"]
  assert 0 < len(updates) < 20  # Not one for each of 38 parameters.


def test_launches_count_graphs_and_other_kernels():
  thunks = """
000: kCommandBuffer [source]
    001: kCopy
    002: kCublasLtMatmul
003: kAllReduce
004: kWhile
condition:
    005: kCustomKernel
  body:
    006: kCommandBuffer
        007: kCustomKernel
    008: kCustomKernel
009: kAsyncDone
"""
  assert gpu_compile.count_launches(thunks) == 5


@pytest.mark.parametrize("norm", EVERY_NORM)
def test_every_norm_compiles_for_evaluation(compile_tiny, norm):
  program = compile_tiny("eval", **{"model.norm": norm})
  assert_lean(program)
  kinds = program.kinds
  assert kinds[ATTEND] in (1, 2) and kinds[ATTEND_BACK] == 0
  assert program.launches == 1


def test_first_step_of_rescale_calibrates(compile_tiny):
  settled = compile_tiny("train", **{"model.norm": "Rescale"})
  first = compile_tiny("train", step=1, **{"model.norm": "Rescale"})
  assert first.bytes > settled.bytes and not settled.conditionals


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("attention", ["cudnn", "xla"])
def test_requested_attention_is_compiled(compile_tiny, dtype, attention):
  keys = {"dtype": dtype, "model.attention": attention}
  program = compile_tiny("eval", **keys)
  assert_lean(program)
  kinds = program.kinds
  assert kinds[ATTEND] == (attention == "cudnn")
  assert {k.dtype for k in program.kernels if k.kind == ATTEND} <= {
    {"bfloat16": "bf16", "float16": "f16"}[dtype]
  }


@pytest.mark.parametrize(
  "dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_other_dtypes_compile_for_training(compile_tiny, dtype):
  keys = {**TRAIN_KEYS["GN"], "model.norm": "GN", "dtype": dtype}
  program = compile_tiny("train", **keys)
  kinds = program.kinds
  if dtype == "float32":
    assert {k.dtype for k in program.kernels if k.flops} == {"f32"}
    assert kinds[ATTEND] == 0
    assert not program.conditionals and not program.host_transfers
  else:
    assert_lean(program)
    # GN's last block computes all tokens.
    assert kinds[ATTEND] == kinds[ATTEND_BACK] == 2


@pytest.mark.parametrize("gpu, fused", [("a100-40", 1), ("t4", 0)])
def test_evaluation_on_other_gpus(compile_tiny, gpu, fused):
  kinds = compile_tiny("eval", gpu).kinds
  assert kinds[ATTEND] == fused


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100-40", "v100", "b200"])
def test_training_on_other_gpus(compile_tiny, gpu):
  kinds = compile_tiny("train", gpu).kinds
  assert kinds[ATTEND_BACK] == (gpu != "v100")


@pytest.mark.parametrize(
  "norm",
  [
    "Rescale",
    pytest.param("LN", marks=pytest.mark.slow),
    pytest.param("GN", marks=pytest.mark.slow),
  ],
)
def test_eight_gpus_exchange_gradients_once(compile_tiny, norm):
  keys = {"model.norm": norm, "augment.crop": True}
  program = compile_tiny("train", devices=8, **keys)
  assert_lean(program)
  assert {c.kind for c in program.collectives} == {"all-reduce"}
  sizes = collections.Counter()
  calls = collections.Counter()
  for collective in program.collectives:
    (dtype,) = {shape.dtype for shape in collective.shapes}
    calls[dtype] += 1
    sizes[dtype] += sum(shape.size for shape in collective.shapes)
  assert set(calls.values()) == {1}  # A bucket for each type.
  # The parameters and the loss, but no gradient of exactly zero.
  model = experiment.create_model(tiny_config(**{"model.norm": norm}), 10)
  variables = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, train=False),
    jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"),
  )
  count = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert sizes.total() == pytest.approx(count, rel=0.01)


def test_eight_gpus_evaluate(compile_tiny):
  program = compile_tiny("eval", devices=8)
  assert {c.kind for c in program.collectives} == {"all-reduce"}
  # Sums of loss and of correct predictions.
  shapes = [s for c in program.collectives for s in c.shapes]
  assert [shape.size for shape in shapes] == [1, 1]


@pytest.mark.slow
def test_accumulation_repeats_the_forward_pass(compile_tiny):
  single = compile_tiny("train", dtype="float32")
  double = compile_tiny("train", dtype="float32", accum_steps=2, batch=32)
  # Only the optimizer runs once.
  assert double.flops == pytest.approx(2 * single.flops, rel=1e-3)
  # Graphs before, in and after the loop, and its condition.
  assert double.launches == 4


@pytest.mark.slow
def test_remat_trades_time_for_memory(compile_tiny):
  keys = {"model.attention": "xla", "batch": 256, "model.num_layers": 6}
  plain = compile_tiny("train", **keys)
  remat = compile_tiny("train", **keys, **{"model.remat": True})
  assert remat.needed < 0.8 * plain.needed
  assert remat.flops > plain.flops


def test_flops_equal_the_model_flops(compile_tiny):
  program = compile_tiny("eval", **{"model.attention": "cudnn"})
  width, mlp, tokens, images = 64, 128, 65, 16
  block = tokens * (8 * width**2 + 4 * width * mlp) + 4 * tokens**2 * width
  # Keys and values of all tokens, but other products of the class token only.
  # XLA does not compute its attention as matrix products.
  last = 4 * tokens * width**2 + 4 * width**2 + 4 * width * mlp
  resize = 2 * 3 * (32 * 24 * 24 + 32 * 32 * 24)
  expected = block + last + 2 * 64 * 48 * width + 2 * width * 10 + resize
  assert program.flops == images * expected


def test_flax_peer_compiles(compile_tiny):
  program = compile_tiny("flax")
  kinds = program.kinds
  assert kinds["__cudnn$convBackwardFilter"] == 1 and kinds[ATTEND] == 0
  (patches,) = (k for k in program.kernels if "convBackward" in k.kind)
  assert patches.flops == 16 * 2 * 64 * 48 * 64
  assert not patches.is_gemm


@pytest.mark.parametrize("name", gpus.NAMES)
def test_gpu_data_is_plausible(name):
  gpu = gpus.get(name)
  assert 7 <= gpu.capability[0] <= 10
  assert 15e9 < gpu.memory_bytes < 200e9 and 3e11 <= gpu.bandwidth < 8e12
  half, single = gpu.flops_per_second("f16"), gpu.flops_per_second("f32")
  assert half >= 1.9 * single >= 1.9 * gpu.flops_per_second("f32", exact=True)
  assert gpu.description.startswith("# ")  # Source of the values.


def test_an_unknown_gpu_suggests_the_nearest():
  with pytest.raises(errors.UserError, match="h10.*did you mean h100"):
    gpus.get("h10")
