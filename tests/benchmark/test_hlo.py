"""Bytes, FLOPs and times of hand-written programs."""

import pytest

from rescalevit_jax.benchmark import gpus
from rescalevit_jax.benchmark import hlo

LOOP = """
HloModule jit_step

%fused_add (p0: f32[8,16], p1: f32[16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[16]{0} parameter(1)
  %b = f32[8,16]{1,0} broadcast(%p1), dimensions={1}
  ROOT %sum = f32[8,16]{1,0} add(%p0, %b)
}

%fused_slice (p0: f32[8,16], p1: f32[8,16]) -> (f32[2,16], bf16[8,16]) {
  %p0 = f32[8,16]{1,0} parameter(0)
  %flat = f32[128]{0} bitcast(%p0)
  %part = f32[32]{0} slice(%flat), slice={[0:32]}
  %rows = f32[2,16]{1,0} bitcast(%part)
  %p1 = f32[8,16]{1,0} parameter(1)
  %half = bf16[8,16]{1,0} convert(%p1)
  ROOT %both = (f32[2,16]{1,0}, bf16[8,16]{1,0}) tuple(%rows, %half)
}

%fused_update (p0: f32[8,16], p1: f32[2,16], p2: s32[]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[2,16]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = f32[8,16]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%fused_dot (p0: bf16[4,8], p1: bf16[8,2]) -> bf16[4,2] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = bf16[8,2]{1,0} parameter(1)
  ROOT %dot = bf16[4,2]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}
}

%body (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%s), index=1
  %copy.1 = f32[8,16]{1,0} copy(%x)
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %copy.1)
}

%condition (s: (s32[], f32[8,16])) -> pred[] {
  %s = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%fused_less
}

%fused_less (p0: s32[]) -> pred[] {
  %p0 = s32[] parameter(0)
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%p0, %five), direction=LT
}

%cheap (x: f32[8,16]) -> f32[8,16] {
  ROOT %x = f32[8,16]{1,0} parameter(0)
}

%dear (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %copy.2 = f32[8,16]{1,0} copy(%x)
}

ENTRY %main (x: f32[8,16], v: f32[16]) -> f32[8,16] {
"""
ENTRY = """
  %x = f32[8,16]{1,0} parameter(0), metadata={op_name="x (of all)"}
  %v = f32[16]{0} parameter(1)
"""
BYTES = 8 * 16 * 4


def read(*lines):
  text = LOOP + ENTRY + "".join(f"  {line}\n" for line in lines) + "}\n"
  return hlo.read(text)


def only(*lines):
  (kernel,) = read(*lines).kernels
  return kernel


def test_fusion_reads_operands_and_writes_results():
  kernel = only(
    "ROOT %f = f32[8,16]{1,0} fusion(%x, %v), kind=kLoop, calls=%fused_add,"
    ' metadata={op_name="jit(step)/add"}'
  )
  assert (kernel.read, kernel.written) == (BYTES + 16 * 4, BYTES)
  assert kernel.op_name == "jit(step)/add" and kernel.kind == "fusion"
  assert kernel.flops == 0 and not kernel.is_gemm


def test_slices_count_their_size_and_all_results_count():
  kernel = only(
    "%f = (f32[2,16]{1,0}, bf16[8,16]{1,0}) fusion(%x, %x), kind=kLoop,"
    " calls=%fused_slice",
    "ROOT %r = f32[2,16]{1,0} get-tuple-element(%f), index=0",
  )
  assert kernel.read == BYTES / 4 + BYTES
  assert kernel.written == BYTES / 4 + BYTES / 2


def test_in_place_updates_write_only_the_update():
  kernel = only(
    "%i = s32[] constant(3)",
    "%u = f32[2,16]{1,0} bitcast(%v)",
    "ROOT %f = f32[8,16]{1,0} fusion(%x, %u, %i), kind=kLoop,"
    " calls=%fused_update",
  )
  assert kernel.read == BYTES / 4 + 4
  assert kernel.written == BYTES / 4


def test_bytes_of_a_cublas_product_exclude_its_workspace():
  kernel = only(
    "%a = bf16[4,8]{1,0} bitcast(%x)",
    "%b = bf16[8,2]{1,0} bitcast(%x)",
    "ROOT %g = (bf16[4,2]{1,0}, s8[4194304]{0}) custom-call(%a, %b),"
    ' custom_call_target="__cublas$lt$matmul", backend_config={'
    '"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},'
    '"precision_config":{"operand_precision":["DEFAULT","DEFAULT"]}}}',
  )
  assert (kernel.read, kernel.written) == (2 * (32 + 16), 2 * 8)
  assert kernel.flops == 2 * 4 * 8 * 2
  assert (kernel.dtype, kernel.exact, kernel.is_gemm) == ("bf16", False, True)


def test_product_in_a_fusion_is_counted():
  kernel = only(
    "%a = bf16[4,8]{1,0} bitcast(%x)",
    "%b = bf16[8,2]{1,0} bitcast(%x)",
    "ROOT %g = bf16[4,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_dot",
  )
  assert kernel.flops == 2 * 4 * 8 * 2 and kernel.dtype == "bf16"


def test_highest_precision_products_are_exact():
  kernel = only(
    "ROOT %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1},"
    " rhs_contracting_dims={1}, operand_precision={highest,highest}"
  )
  assert kernel.flops == 2 * 8 * 8 * 16 and kernel.exact
  assert kernel.read == BYTES  # A repeated operand is read once.


def test_loops_are_multiplied_by_their_trip_count():
  program = read(
    "%zero = s32[] constant(0)",
    "%s = (s32[], f32[8,16]{1,0}) tuple(%zero, %x)",
    "%w = (s32[], f32[8,16]{1,0}) while(%s), condition=%condition, body=%body,"
    ' backend_config={"known_trip_count":{"n":"5"}}',
    "ROOT %r = f32[8,16]{1,0} get-tuple-element(%w), index=1",
  )
  assert len(program.kernels) == 10
  assert program.bytes == 5 * (2 * BYTES + 4 + 1)
  assert not program.conditionals


def test_conditionals_count_the_cheapest_branch():
  program = read(
    "%p = pred[] constant(true)",
    "ROOT %c = f32[8,16]{1,0} conditional(%p, %x, %x), true_computation=%dear,"
    " false_computation=%cheap",
  )
  assert program.conditionals == ["c"] and len(program.kernels) == 0
  program = read(
    "%i = s32[] constant(0)",
    "ROOT %c = f32[8,16]{1,0} conditional(%i, %x, %x),"
    " branch_computations={%dear, %dear}",
  )
  assert program.conditionals == ["c"] and program.bytes == 2 * BYTES


def test_collectives_are_counted():
  program = read(
    "%s = f32[8,16]{1,0} all-reduce-start(%x), channel_id=1,"
    ' to_apply=%fused_add, metadata={op_name="sum"}',
    "%d = f32[8,16]{1,0} all-reduce-done(%s)",
    "%g = (f32[16]{0}, f32[128]{0}) all-gather-start(%v), dimensions={0}",
    "ROOT %h = f32[128]{0} all-gather-done(%g)",
  )
  reduce, gather = program.collectives
  assert (reduce.kind, reduce.op_name) == ("all-reduce", "sum")
  assert [s.size for s in reduce.shapes] == [128]
  assert (gather.kind, gather.shapes[0].dims) == ("all-gather", (16,))
  assert [k.written for k in program.kernels] == [BYTES, 128 * 4]


@pytest.mark.parametrize(
  "line",
  [
    "%t = token[] after-all()",
    "%h = f32[8,16]{1,0:S(5)} copy(%x)",
    '%h = f32[] custom-call(%x), custom_call_target="python_gpu_callback"',
    "%h = (f32[16]{0}, u32[], token[]) send(%v, %v), channel_id=1",
  ],
)
def test_host_transfers_are_counted(line):
  program = read(line, "ROOT %r = f32[8,16]{1,0} copy(%x)")
  assert program.host_transfers == ([] if "after-all" in line else ["h"])


def test_flops_of_attention_and_convolution():
  attention = only(
    "%q = bf16[2,5,4,8]{3,2,1,0} bitcast(%x)",
    "ROOT %a = (bf16[2,4,5,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q),"
    ' custom_call_target="__cudnn$fmhaSoftmax"',
  )
  assert attention.flops == 2 * 2 * 2 * 4 * 5 * 5 * 8
  assert not attention.is_gemm
  backward = only(
    "%q = bf16[2,5,4,8]{3,2,1,0} bitcast(%x)",
    "ROOT %a = (bf16[2,4,5,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q),"
    ' custom_call_target="__cudnn$fmhaSoftmaxBackward"',
  )
  assert backward.flops == 2.5 * attention.flops
  convolution = only(
    "%i = bf16[2,8,8,3]{3,2,1,0} bitcast(%x)",
    "%k = bf16[16,4,4,3]{3,2,1,0} bitcast(%x)",
    "ROOT %c = (bf16[2,2,2,16]{3,2,1,0}, u8[0]{0}) custom-call(%i, %k),"
    " window={size=4x4 stride=4x4}, dim_labels=b01f_o01i->b01f,"
    ' custom_call_target="__cudnn$convForward"',
  )
  assert convolution.flops == 2 * (2 * 2 * 2) * (4 * 4 * 3) * 16


def test_time_is_the_longer_of_memory_and_products():
  gpu = gpus.get("h100")
  kernel = hlo.Kernel(
    "gemm", "", read=3e9, written=1e9, flops=1e9, dtype="bf16"
  )
  assert kernel.seconds(gpu) == pytest.approx(4e9 / 3.35232e12)
  kernel = hlo.Kernel("gemm", "", read=3, written=1, flops=1e12, dtype="bf16")
  assert kernel.seconds(gpu) == pytest.approx(1e12 / 989e12)
  kernel = hlo.Kernel("gemm", "", read=3, written=1, flops=1e12, dtype="f32")
  assert kernel.seconds(gpu) == pytest.approx(1e12 / 494.7e12)
  copy = hlo.Kernel("c", "", read=3352320000, written=0)
  program = hlo.Program([copy, copy, kernel])
  assert program.seconds(gpu) == pytest.approx(2e-3 + 1e12 / 494.7e12)
