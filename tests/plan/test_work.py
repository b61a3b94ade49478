"""FLOPs and bytes of single instructions, worked out by hand here."""

import math

import pytest

from deepseek_jax.xla import hlo, kernels, work

HEAD = "HloModule jit_step, is_scheduled=true\n\n"
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

"""


def work_of(entry: str, name: str, before: str = "") -> work.Work:
    """What one instruction of a program does."""
    module = hlo.Module(HEAD + ADD + before + entry)
    return work.Reader(module).of(module.entry, module.computations[module.entry][name])


DOTS = [
    # shapes, dimensions, kind, FLOPs: two for each product of two numbers
    ("bf16[8,16] bf16[16,4] bf16[8,4]", "lhs_contracting_dims={1}", "bf16", 2 * 8 * 16 * 4),
    (
        "f32[3,8,16] f32[3,16,4] f32[3,8,4]",
        "lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}",
        "tf32",
        2 * 3 * 8 * 16 * 4,
    ),
    (
        "f32[8,16] f32[16,4] f32[8,4]",
        "lhs_contracting_dims={1}, operand_precision={highest,highest}",
        "f32",
        1024,
    ),
    (
        "f32[8,16] f32[16,4] f32[8,4]",
        "lhs_contracting_dims={1}, algorithm=dot_bf16_bf16_f32",
        "bf16",
        1024,
    ),
    (
        "f32[8,16] f32[16,4] f32[8,4]",
        "lhs_contracting_dims={1}, algorithm=dot_tf32_tf32_f32_x3",
        "tf32",
        3072,
    ),
    ("f8e4m3fn[8,16] f8e5m2[16,4] f32[8,4]", "lhs_contracting_dims={1}", "fp8", 1024),
    # An outer sum over two dimensions.
    ("bf16[5,6,7] bf16[5,6,3] f32[7,3]", "lhs_contracting_dims={0,1}", "bf16", 2 * 5 * 6 * 7 * 3),
]


@pytest.mark.parametrize("shapes, attributes, kind, flops", DOTS)
def test_flops_of_a_product(shapes, attributes, kind, flops):
    left, right, out = shapes.split()
    found = work_of(
        f"""ENTRY %main (x: {left}, y: {right}) -> {out} {{
  %x = {left} parameter(0)
  %y = {right} parameter(1)
  ROOT %dot = {out} dot(%x, %y), {attributes}
}}
""",
        "dot",
    )
    assert found.flops == {kind: flops}
    assert found.read == hlo.shape_bytes(left) + hlo.shape_bytes(right)
    assert found.written == hlo.shape_bytes(out)


SLICED = """%body (p: f32[61,100,10], n: s32[]) -> bf16[100,10] {
  %p = f32[61,100,10]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %layer = f32[1,100,10]{2,1,0} dynamic-slice(%p, %n, %zero, %zero), dynamic_slice_sizes={1,100,10}
  %flat = f32[100,10]{1,0} bitcast(%layer)
  ROOT %narrow = bf16[100,10]{1,0} convert(%flat)
}

"""


def test_a_fusion_reads_one_layer_of_a_stack():
    found = work_of(
        """ENTRY %main (p: f32[61,100,10], n: s32[]) -> bf16[100,10] {
  %p = f32[61,100,10]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %cast = bf16[100,10]{1,0} fusion(%p, %n), kind=kLoop, calls=%body
}
""",
        "cast",
        SLICED,
    )
    assert found.read == 100 * 10 * 4 + 4 and found.written == 100 * 10 * 2 and not found.flops


UPDATED = """%body (stack: f32[61,100,10], x: bf16[100,10], n: s32[]) -> f32[61,100,10] {
  %stack = f32[61,100,10]{2,1,0} parameter(0)
  %x = bf16[100,10]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %wide = f32[100,10]{1,0} convert(%x)
  %one = f32[1,100,10]{2,1,0} bitcast(%wide)
  ROOT %put = f32[61,100,10]{2,1,0} dynamic-update-slice(%stack, %one, %n, %zero, %zero)
}

"""


def test_a_slice_that_is_started_and_waited_for():
    """As one that is not: the layer is read and written, whatever of the stack is in the start's type."""
    found = work_of(
        """ENTRY %main (stack: f32[12,64,64], i: s32[]) -> f32[1,64,64] {
  %stack = f32[12,64,64] parameter(0)
  %i = s32[] parameter(1)
  %start = ((f32[12,64,64], s32[]), f32[1,64,64], u32[]) fusion-start(%stack, %i), kind=kLoop, calls=%take
  ROOT %done = f32[1,64,64] fusion-done(%start)
}
""",
        "start",
        """%take (s: f32[12,64,64], n: s32[]) -> f32[1,64,64] {
  %s = f32[12,64,64] parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,64,64] dynamic-slice(%s, %n, %zero, %zero), dynamic_slice_sizes={1,64,64}
}

""",
    )
    layer = 64 * 64 * 4
    assert (found.read, found.written) == (pytest.approx(layer, abs=8), layer)


def test_an_update_in_place_is_its_own_size():
    found = work_of(
        """ENTRY %main (stack: f32[61,100,10], x: bf16[100,10], n: s32[]) -> f32[61,100,10] {
  %stack = f32[61,100,10]{2,1,0} parameter(0)
  %x = bf16[100,10]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %put = f32[61,100,10]{2,1,0} fusion(%stack, %x, %n), kind=kLoop, calls=%body
}
""",
        "put",
        UPDATED,
    )
    # Nothing of the stack is read; the update is read in bfloat16 and written in float32.
    assert found.read == 100 * 10 * 2 + 4 and found.written == 100 * 10 * 4


def test_an_update_of_something_computed_writes_all_of_it():
    """Its operand has no memory of its own to write into."""
    body = UPDATED.replace("dynamic-update-slice(%stack,", "dynamic-update-slice(%twice,").replace(
        "  %zero", "  %twice = f32[61,100,10]{2,1,0} add(%stack, %stack)\n  %zero"
    )
    found = work_of(
        """ENTRY %main (stack: f32[61,100,10], x: bf16[100,10], n: s32[]) -> f32[61,100,10] {
  %stack = f32[61,100,10]{2,1,0} parameter(0)
  %x = bf16[100,10]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %put = f32[61,100,10]{2,1,0} fusion(%stack, %x, %n), kind=kLoop, calls=%body
}
""",
        "put",
        body,
    )
    # What is written over need not be read.
    assert found.read == pytest.approx(60 * 1000 * 4 + 1000 * 2 + 4)
    assert found.written == 61 * 1000 * 4


SUMMED = """%body (p: f32[8,100], a: f32[8,60], b: f32[8,20]) -> bf16[4,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %a = f32[8,60]{1,0} parameter(1)
  %b = f32[8,20]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %p60 = f32[8,60]{1,0} slice(%p), slice={[0:8], [0:60]}
  %a60 = f32[8,60]{1,0} add(%p60, %a)
  %pa = f32[8,100]{1,0} dynamic-update-slice(%p, %a60, %zero, %zero)
  %p20 = f32[8,20]{1,0} slice(%pa), slice={[0:8], [0:20]}
  %b20 = f32[8,20]{1,0} add(%p20, %b)
  %pab = f32[8,100]{1,0} dynamic-update-slice(%pa, %b20, %zero, %zero)
  %half = f32[4,100]{1,0} slice(%pab), slice={[0:4], [0:100]}
  ROOT %out = bf16[4,100]{1,0} convert(%half)
}

"""


def test_updates_one_after_another_read_each_number_once():
    """As gradients of keys are added up, block after block: half of the rows of everything."""
    found = work_of(
        """ENTRY %main (p: f32[8,100], a: f32[8,60], b: f32[8,20]) -> bf16[4,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %a = f32[8,60]{1,0} parameter(1)
  %b = f32[8,20]{1,0} parameter(2)
  ROOT %out = bf16[4,100]{1,0} fusion(%p, %a, %b), kind=kLoop, calls=%body
}
""",
        "out",
        SUMMED,
    )
    assert found.read == pytest.approx(4 * (100 + 60 + 20) * 4)
    assert found.written == 4 * 100 * 2


def test_two_slices_of_one_array_add_up_and_equal_readers_do_not():
    body = """%body (p: f32[100,8]) -> (f32[100,2], f32[100,8]) {
  %p = f32[100,8]{1,0} parameter(0)
  %a = f32[100,2]{1,0} slice(%p), slice={[0:100], [0:2]}
  %b = f32[100,2]{1,0} slice(%p), slice={[0:100], [2:4]}
  %ab = f32[100,2]{1,0} add(%a, %b)
  ROOT %out = (f32[100,2]{1,0}) tuple(%ab)
}

"""
    entry = """ENTRY %main (p: f32[100,8]) -> (f32[100,2]) {
  %p = f32[100,8]{1,0} parameter(0)
  ROOT %f = (f32[100,2]{1,0}) fusion(%p), kind=kLoop, calls=%body
}
"""
    found = work_of(entry, "f", body)
    assert found.read == 100 * 4 * 4 and found.written == 100 * 2 * 4
    both = body.replace(
        "%ab = f32[100,2]{1,0} add(%a, %b)", "%ab = f32[100,8]{1,0} multiply(%p, %p)"
    )
    both = both.replace("(f32[100,2]{1,0}) tuple", "(f32[100,8]{1,0}) tuple")
    assert (
        work_of(entry.replace("(f32[100,2]{1,0}) f", "(f32[100,8]{1,0}) f"), "f", both).read
        == 100 * 8 * 4
    )


def test_a_gather_reads_its_rows():
    found = work_of(
        """ENTRY %main (table: bf16[1000,64], ids: s32[20,1]) -> bf16[20,64] {
  %table = bf16[1000,64]{1,0} parameter(0)
  %ids = s32[20,1]{1,0} parameter(1)
  ROOT %rows = bf16[20,64]{1,0} gather(%table, %ids), offset_dims={1}, slice_sizes={1,64}
}
""",
        "rows",
    )
    assert found.read == 20 * 64 * 2 + 20 * 4 and found.written == 20 * 64 * 2


def test_scatter_adds_to_the_rows_it_touches():
    found = work_of(
        """ENTRY %main (table: f32[1000,64], ids: s32[20,1], x: f32[20,64]) -> f32[1000,64] {
  %table = f32[1000,64]{1,0} parameter(0)
  %ids = s32[20,1]{1,0} parameter(1)
  %x = f32[20,64]{1,0} parameter(2)
  ROOT %put = f32[1000,64]{1,0} scatter(%table, %ids, %x), update_window_dims={1}, to_apply=%add
}
""",
        "put",
    )
    rows = 20 * 64 * 4
    assert found.read == 2 * rows + 20 * 4 and found.written == rows


@pytest.mark.parametrize("length, passes", [(2048, 1), (4096, 1 + 2), (16384, 1 + 2 + 3 + 4)])
def test_passes_of_a_bitonic_sort(length, passes):
    """What fits shared memory, 2,048 keys, is sorted in one pass; stage s > 11 takes s - 11 further
    ones through memory and one inside."""
    found = work_of(
        f"""ENTRY %main (x: s32[{length}]) -> s32[{length}] {{
  %x = s32[{length}]{{0}} parameter(0)
  ROOT %sorted = s32[{length}]{{0}} sort(%x), dimensions={{0}}, to_apply=%add
}}
""",
        "sorted",
    )
    assert found.launches == passes and found.read == found.written == passes * length * 4


def test_a_gemm_with_workspace_and_fused_attention():
    gemm = work_of(
        """ENTRY %main (x: bf16[8,16], y: bf16[16,4]) -> (bf16[8,4], s8[1000]) {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = bf16[16,4]{1,0} parameter(1)
  ROOT %g = (bf16[8,4]{1,0}, s8[1000]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
""",
        "g",
    )
    assert gemm.flops == {"bf16": 2 * 8 * 16 * 4} and gemm.written == 8 * 4 * 2
    b, s, n, h, v = 2, 64, 4, 24, 16
    call = f"""ENTRY %main (q: bf16[{b},{s},{n},{h}], k: bf16[{b},{s},{n},{h}], v: bf16[{b},{s},{n},{v}]) -> \
bf16[{b},{s},{n},{v}] {{
  %q = bf16[{b},{s},{n},{h}]{{3,2,1,0}} parameter(0)
  %k = bf16[{b},{s},{n},{h}]{{3,2,1,0}} parameter(1)
  %v = bf16[{b},{s},{n},{v}]{{3,2,1,0}} parameter(2)
  ROOT %o = bf16[{b},{s},{n},{v}]{{3,2,1,0}} custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax"
}}
"""
    assert work_of(call, "o").flops == {"attention_forward": 2 * b * n * (s * s / 2) * (h + v)}
    back = work_of(call.replace("fmhaSoftmax", "fmhaSoftmaxBackward"), "o")
    assert back.flops == {"attention_backward": 2 * b * n * (s * s / 2) * (3 * h + 2 * v)}


def test_attention_in_pallas():
    """Of 4 heads that share 2 of keys; the rows of packed documents are not known to the program."""
    b, q, k, n, m, h, v = 2, 64, 128, 4, 2, 24, 16
    given = hlo.arrays(
        f"bf16[{b},{q},{n},{h}] bf16[{b},{k},{m},{h}] bf16[{b},{k},{m},{v}] bf16[{b},{q},{n},{v}] "
        f"f32[{b},{n},2,{q}] s32[{b},2,{q}] s32[{b},2,{k}] s32[{b},1,4] f32[{b},{n},{q}]"
    )
    heads, dout, statistics, ids, lse = given[:3], given[3], given[4], given[5:8], given[8]
    pairs = b * n * q * k / 2
    found = kernels.fused_attention([*heads, *ids], [dout, lse])
    assert found == {"attention_forward": 2 * pairs * (h + v)}
    backward = [*heads, dout, statistics, *ids]
    of_queries = kernels.fused_attention(backward, [given[0]])
    assert of_queries == {"attention_backward": 2 * pairs * (2 * h + v)}
    of_keys = kernels.fused_attention(backward, given[1:3])
    assert of_keys == {"attention_backward": 2 * pairs * (2 * h + 2 * v)}
    assert kernels.fused_attention(ids, [lse]) == {}


def test_grouped_products():
    """Forward and both gradients have the same FLOPs: each row meets one matrix."""
    rows, experts, inner, outer = 640, 4, 32, 48
    x, w, y = hlo.arrays(
        f"bf16[{rows},{inner}] bf16[{experts},{inner},{outer}] bf16[{rows},{outer}]"
    )
    groups = hlo.arrays("s32[5]")
    flops = 2 * rows * inner * outer
    assert kernels.grouped([*groups, x, w], [y]) == flops
    assert kernels.grouped([*groups, y, w], [x]) == flops
    assert kernels.grouped([*groups, x, y], [w]) == flops
    assert kernels.grouped([x, x], [x]) == 0
    # 300 assignments and half a block of each expert are computed; never more than there is room for.
    assert kernels.grouped([*groups, x, w], [y], 300) == 2 * (300 + 4 * 64) * inner * outer
    assert kernels.grouped([*groups, x, w], [y], 600) == flops


ON_CPU = """%fused (a: f32[4,6]) -> f32[4] {
  %a = f32[4,6]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %e = f32[4,6]{1,0} exponential(%a)
  %d = f32[4,6]{1,0} divide(%e, %a)
  ROOT %sum = f32[4]{0} reduce(%d, %zero), dimensions={1}, to_apply=%add
}

ENTRY %main (x: f32[4,6]) -> f32[4] {
  %x = f32[4,6]{1,0} parameter(0)
  %t = f32[6,4]{1,0} transpose(%x), dimensions={1,0}
  %s = f32[4,6]{1,0} sort(%x), dimensions={1}, to_apply=%add
  %n = f32[4,6]{1,0} negate(%x)
  ROOT %f = f32[4]{0} fusion(%n), kind=kLoop, calls=%fused
}
"""


def test_operations_outside_products_cost_a_cpu():
    """By VECTOR, of elements of the result; of those that are summed; a GPU hides them behind their bytes."""
    module = hlo.Module(HEAD + ADD + ON_CPU)
    for on_gpu in (False, True):
        reader = work.Reader(module, on_gpu)
        found = {n: reader.of("main", module.computations["main"][n]) for n in ("t", "s", "n", "f")}
        wanted = {
            "t": 24 * 6.0,
            "s": 24 * work.SORTED * math.log2(6),
            "n": 0.0,
            "f": 24 * (4.0 + 0.5 + work.REDUCED),
        }
        for name, vector in wanted.items():
            assert found[name].vector == (0.0 if on_gpu else pytest.approx(vector))
            assert found[name].flops == {}
        assert found["f"].bytes == 24 * 4 + 4 * 4
