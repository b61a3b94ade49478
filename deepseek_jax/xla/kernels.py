"""Floating point operations of matrix products and of the kernels that XLA calls by name.

Kinds say which unit of a device does the work, at which rate (plan/hardware.py):

    bf16, fp8, tf32, f32    matrix products, by the type of their operands and the precision asked
                            for: float32 without one is tf32 on a GPU
    attention_forward, attention_backward    fused attention, causal: cuDNN's, or in Pallas
    grouped, grouped_fp8    a product of rows by the matrix of their expert, in Pallas
"""

import math
import re
from typing import NamedTuple

from deepseek_jax.xla.hlo import Array, Instruction, arrays

KINDS = (
    "bf16",
    "fp8",
    "tf32",
    "f32",
    "attention_forward",
    "attention_backward",
    "grouped",
    "grouped_fp8",
)
# Precisions that XLA may be told to take instead of what the operands' type says.
ALGORITHMS = {
    "dot_bf16_bf16_f32": "bf16",
    "dot_tf32_tf32_f32": "tf32",
    "dot_tf32_tf32_f32_x3": "tf32",
    "dot_f32_f32_f32": "f32",
}
PRODUCTS_OF = {"dot_tf32_tf32_f32_x3": 3}  # products that stand for one
PALLAS = ("xla.gpu.triton", "mosaic_gpu")
BLOCK = 128  # rows of one expert that a grouped product takes at once
# Kernels that XLA calls and that multiply nothing.
WITHOUT_PRODUCTS = (
    "TopK",
    "AllocateBuffer",
    "DeviceRadixSort",
    "SliceTo",
    "PadTo",
    "annotate_device",
)


class Call(NamedTuple):
    """What a custom call does."""

    flops: dict[str, float]
    workspace: float = 0.0  # bytes of its results that are room to work in, not written as results


def kind_of(dtype: str, attributes: str, float32: str) -> str:
    """The kind of a product of operands of a type."""
    if found := re.search(r"algorithm=(\w+)", attributes):
        if found[1] in ALGORITHMS:
            return ALGORITHMS[found[1]]
    if dtype.startswith(("f8", "s8", "u8")):
        return "fp8"
    if dtype in ("bf16", "f16"):
        return "bf16"
    highest = re.search(r"highest", attributes, re.IGNORECASE)
    return "f32" if dtype == "f64" or highest else float32


def dot(i: Instruction, operands: list[Array], float32: str) -> tuple[str, float]:
    """(kind, FLOPs) of XLA's dot: two for every product of two numbers."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    contracted = [int(n) for n in found[1].split(",") if n] if found else []
    left = operands[0]
    out = arrays(i.shape)[0]
    algorithm = re.search(r"algorithm=(\w+)", i.attributes)
    times = PRODUCTS_OF.get(algorithm[1], 1) if algorithm else 1
    flops = 2.0 * times * out.size * math.prod(left.dims[d] for d in contracted)
    return kind_of(left.dtype, i.attributes, float32), flops


def target(i: Instruction) -> str:
    """The name of what a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return found[1] if found else ""


def custom_call(
    i: Instruction, operands: list[Array], float32: str, assignments: float | None = None
) -> Call | None:
    """What a custom call does, as far as this program knows the kernel; None: not known.

    Args:
      float32: kind of float32 products that ask for no precision.
      assignments: as `grouped` has it.
    """
    name = target(i)
    room = sum(a.bytes for a in arrays(i.shape) if a.dtype in ("s8", "u8"))
    if "cublas" in name or "matmul" in name:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
        dims = [int(n) for n in re.findall(r"\d+", found[1])] if found else [-1]
        flops = 2.0 * arrays(i.shape)[0].size * math.prod(operands[0].dims[d] for d in dims)
        return Call({kind_of(operands[0].dtype, i.attributes, float32): flops}, room)
    if "fmha" in name:
        return Call(_attention(name, operands), room)
    if any(pallas in name for pallas in PALLAS):
        if fused := fused_attention(operands, arrays(i.shape)):
            return Call(fused)
        flops = grouped(operands, arrays(i.shape), assignments)
        kind = "grouped_fp8" if any(a.dtype.startswith("f8") for a in operands) else "grouped"
        return Call({kind: flops}) if flops else None
    return Call({}) if any(known in name for known in WITHOUT_PRODUCTS) else None


def _attention(name: str, operands: list[Array]) -> dict[str, float]:
    """cuDNN's causal attention, of queries [B, S, N, H], keys, values and more: half of all pairs.

    Forward two products, of the queries' width and the values'. Backward five: scores again, then
    gradients of queries and keys at the queries' width, of values and weights at the values'.
    """
    b, s, n, h = operands[0].dims
    v = min(a.dims[-1] for a in operands if len(a.dims) == 4)
    pairs = b * n * s * operands[1].dims[1] / 2
    if "Backward" in name:
        return {"attention_backward": 2 * pairs * (3 * h + 2 * v)}
    return {"attention_forward": 2 * pairs * (h + v)}


def fused_attention(operands: list[Array], results: list[Array]) -> dict[str, float]:
    """Attention in Pallas (model/attention/fused.py), of queries [B, Q, N, H], keys, values and more: half of
    all pairs, as of one document a row. Nothing if the arrays are not those of one.

    Forward two products. The gradient of queries takes three, scores, those of the weights and its own;
    that of keys and values one more.
    """
    if len(operands) < 3 or any(len(a.dims) != 4 for a in operands[:3]):
        return {}
    (b, q, n, h), keys, v = operands[0].dims, operands[1].dims[1], operands[2].dims[3]
    pairs = b * n * q * keys / 2
    given, made = (sum(len(a.dims) == 4 for a in some) for some in (operands, results))
    if given == 3:
        return {"attention_forward": 2 * pairs * (h + v)}
    return {"attention_backward": 2 * pairs * (2 * h + (2 * v if made == 2 else v))}


def grouped(operands: list[Array], results: list[Array], assignments: float | None = None) -> float:
    """FLOPs of a grouped product by the shapes of its arrays; 0 if they are not those of one.

    The matrices of all experts are [E, I, O]; rows are [R, I] and [R, O]. Every row is multiplied
    by one matrix, or, for the gradient of the matrices, adds one product to it.

    Args:
      assignments: rows that are somebody's. The last block of an expert is half empty on average and
        computed whole; blocks of no expert are skipped. None: all rows count.
    """
    matrices = [a for a in (*results, *operands) if len(a.dims) == 3]
    rows = [a for a in (*operands, *results) if len(a.dims) == 2]
    for m in matrices:
        experts, inner, outer = m.dims
        sizes = [a.dims[0] for a in rows if a.dims[1] in (inner, outer)]
        if sizes:
            computed = float(max(sizes))
            if assignments is not None:
                computed = min(computed, assignments + experts * BLOCK / 2)
            return 2.0 * computed * inner * outer
    return 0.0
