"""What gpu_bench measures: each part yields plain values for JSON, the most valuable first, as soon as it has
them.

`toy` shrinks every part so that a CPU does it in seconds. `out`: a folder in which compilers keep what they
found, or None.
"""

import argparse
import functools
import importlib
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator

import flax
import jax
import jax.numpy as jnp

from benchmarks.gpu.train import Row, tiny, train, why
from benchmarks.speed import attention as attention_bench
from benchmarks.support import turns
from deepseek_jax.errors import UserError
from deepseek_jax.experts import implementations
from deepseek_jax.experts.block_rows import BLOCK, BlockRows, Blocks
from deepseek_jax.experts.grouped_matmul import GroupedMatmul
from deepseek_jax.experts.swiglu import Products
from deepseek_jax.model.attention import causal, cudnn
from deepseek_jax.runtime import compile_cache, jax_private

# Of the toy or not: calls that are queued together, and how often.
CALLS = {True: (2, 2), False: (10, 5)}

# ----------------------------------------------------------------------------------------- versions


def versions(toy: bool, out: pathlib.Path | None) -> Iterator[Row]:
    """What is installed, and the card."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    yield {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory_bytes": memory,
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "flax": flax.__version__,
        "cudnn": jax_private.cudnn_version(),
        "platform_version": device.client.platform_version,
    }
    if device.platform != "cpu":
        reason = cudnn.missing(192, 128)
        yield {
            "what": "cuDNN attention at widths 192 and 128",
            **({"failed": reason} if reason else {"works": True}),
        }


# ------------------------------------------------------------------------------------------ experts

PRODUCTS = {  # experts on the device, rows of all, hidden size, expert width
    "V2-Lite": (64, 24576, 2048, 1408),  # 4,096 tokens, 6 experts each
    "V3, 32 of 256 experts": (32, 32768, 7168, 2048),
}


def experts(toy: bool, out: pathlib.Path | None) -> Iterator[Row]:
    """[rows, D] x [E, D, F], each row by its expert: forward, and both gradients. Equal loads, rows sorted by
    expert."""
    for shape, (e, rows, d, f) in ({"toy": (4, 512, 16, 8)} if toy else PRODUCTS).items():
        keys = jax.random.split(jax.random.key(0), 3)
        x, w, dy = (
            jax.random.normal(k, s, jnp.bfloat16)
            for k, s in zip(keys, ((rows, d), (e, d, f), (rows, f)), strict=True)
        )
        sizes = jnp.full(e, rows // e, jnp.int32)
        flops = 2 * rows * d * f
        for method, call in products(rows, e).items():
            row = {
                "shape": shape,
                "experts": e,
                "rows": rows,
                "hidden": d,
                "width": f,
                "method": method,
            }
            try:
                forward = turns.compiled(call, x, w, sizes)
                row["forward_tflops"] = flops / turns.queued(forward, *CALLS[toy]) / 1e12
                row["temporaries"] = forward.temporaries
                both = turns.compiled(
                    lambda x, w, sizes, dy, call=call: jax.vjp(
                        lambda x, w: call(x, w, sizes), x, w
                    )[1](dy),
                    x,
                    w,
                    sizes,
                    dy,
                )
                # The gradients alone need no forward product.
                row |= {
                    "both_tflops": 2 * flops / turns.queued(both, *CALLS[toy]) / 1e12,
                    "both_temporaries": both.temporaries,
                }
            except Exception as error:  # not installed, or a kernel without a gradient
                row["failed"] = why(error)
            yield row


def products(rows: int, e: int) -> dict[str, Callable]:
    """(x [rows, D], w [E, D, F], sizes [E]) -> [rows, F], by method; a method that is not there
    raises when called."""

    def equal_slots(x, w, sizes):
        # As experts/rounds.py has it: float32 results would give the gradients' products float32 operands.
        return jnp.einsum("esd,edf->esf", x.reshape(e, rows // e, -1), w).reshape(rows, -1)

    def tokamax(x, w, sizes):
        return importlib.import_module("tokamax").ragged_dot(x, w, group_sizes=sizes)

    def tokamax_triton(x, w, sizes):
        return importlib.import_module("tokamax").ragged_dot(
            x, w, group_sizes=sizes, implementation="triton"
        )

    def mosaic(x, w, sizes):
        ragged = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
        return ragged.ragged_dot(
            x,
            w,
            group_sizes=sizes,
            block_m=128,
            block_n=128,
            block_k=64,
            max_concurrent_steps=4,
            grid_block_n=2,
        )

    def kernels(name: str) -> Callable:
        """Those that train: a kernel of their own for each gradient, that of the matrices in float32."""

        def call(x, w, sizes):
            capability = str(
                getattr(jax.devices()[0], "compute_capability", implementations.AMPERE)
            )
            major = int(capability.split(".")[0])
            if reason := implementations.missing(name, x.dtype.name, major):
                raise UserError(reason)
            method = GroupedMatmul(name, interpret=jax.default_backend() == "cpu")
            filled = sizes // BLOCK
            first = jnp.pad(jnp.cumsum(filled), (1, 0)).astype(jnp.int32)
            expert = jnp.repeat(jnp.arange(e, dtype=jnp.int32), rows // e // BLOCK)
            return by_kernels(method, x, w, Blocks(expert, first))

        return call

    def dense(x, w, sizes):
        return x @ w[0]  # the same FLOPs in one product: what cannot be beaten

    return {
        "dense": dense,
        "equal slots": equal_slots,
        "our Mosaic kernels": kernels("mosaic"),
        "our Triton kernels": kernels("triton"),
        "tokamax": tokamax,
        "tokamax Pallas-Triton": tokamax_triton,
        "jax.experimental Pallas-Mosaic": mosaic,
        "ragged_dot": jax.lax.ragged_dot,
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_kernels(method: GroupedMatmul, x: jax.Array, w: jax.Array, blocks: Blocks) -> jax.Array:
    """[rows, F]: x [rows, D] times w [E, D, F], by the kernels of experts/grouped_matmul.py, where each
    expert has whole blocks of rows."""
    return _kernels_forward(method, x, w, blocks)[0]


def _kernels_forward(method, x, w, blocks):
    return _products(method, blocks).multiply(x, w), (x, w, blocks)


def _kernels_backward(method, kept, dy):
    x, w, blocks = kept
    made = _products(method, blocks)
    return made.multiply(dy, w, transpose=True), made.outer(x, dy).astype(w.dtype), None


def _products(method: GroupedMatmul, blocks: Blocks) -> Products:
    none = jnp.zeros(0, jnp.int32)
    return method.products(BlockRows(none, none, blocks))


by_kernels.defvjp(_kernels_forward, _kernels_backward)


# ---------------------------------------------------------------------------------------- attention


# (tokens of a row, documents in it). What eight cost less than one shows whether blocks are skipped.
ROWS = ((4096, 1), (4096, 8), (8192, 1))


def attentions(toy: bool, out: pathlib.Path | None) -> Iterator[Row]:
    """Attention of V2-Lite's heads: plain softmax, fused kernels and cuDNN (on GPUs), and blocks, and how far
    these are from the first. Blocks compile for the longest time, so they come last.

    TFLOP/s count visible pairs, two products forward and five backward, whatever is computed again.
    """
    own = argparse.Namespace(heads=2 if toy else 16, qk=24 if toy else 192, v=16 if toy else 128)
    for length, documents in ((64, 2),) if toy else ROWS:
        own.documents = documents
        sequences = 1 if toy else max(1, 8192 // length)
        pairs = sequences * own.heads * length * length / documents / 2
        flops = {"forward": 2 * pairs * (own.qk + own.v)}
        flops["both"] = flops["forward"] + 2 * pairs * (3 * own.qk + 2 * own.v)
        wanted = None
        for method in attention_methods(documents):
            row: Row = {"length": length, "documents": documents, "heads": own.heads}
            row |= {"qk": own.qk, "v": own.v, "method": method}
            try:
                built = attention_bench.core_programs(attention_by(method), sequences, length, own)
                for name, program in built.items():
                    row[f"{name}_s"] = turns.queued(program, *CALLS[toy])
                    row[f"{name}_tflops"] = flops[name] / row[f"{name}_s"] / 1e12
                row |= {
                    "custom_calls": built["both"].compiled.as_text().count("__cudnn$fmha"),
                    "temporaries": built["both"].temporaries,
                }
                gradients = built["both"]()
                wanted = gradients if method == "plain" else wanted
                if method != "plain" and wanted is not None:

                    def largest(a: jax.Array) -> jax.Array:
                        return jnp.max(jnp.abs(a)).astype(jnp.float32)

                    both = zip(gradients, wanted, strict=True)
                    row["is_from_plain"] = max(float(largest(a - b) / largest(b)) for a, b in both)
            except Exception as e:
                row["failed"] = why(e)
            yield row


def attention_methods(documents: int) -> list[str]:
    """Those to compare at so many documents a row; cuDNN knows of one."""
    if jax.default_backend() == "cpu":
        return ["plain", "blocks"]
    return ["plain", "mosaic", *["cudnn"] * (documents == 1), "triton", "blocks"]


def attention_by(method: str) -> Callable:
    """causal_attention by a method; raises when called where it does not run."""
    if method == "plain":
        return attention_bench.plain

    def call(q, k, v, segments, scale):
        if method == "cudnn" and (reason := cudnn.missing(q.shape[-1], v.shape[-1])):
            raise UserError(reason)
        return causal.causal_attention(q, k, v, segments, scale, method)

    return call


def cached(part: Callable[..., Iterator[Row]]) -> Callable[..., Iterator[Row]]:
    """A part with JAX's compilation cache, where there is a folder."""

    def run(toy: bool, out: pathlib.Path | None) -> Iterator[Row]:
        if out is not None:
            compile_cache.use_cache("", warn=lambda line: print(line, file=sys.stderr))
        return part(toy, out)

    return run


PARTS = {"versions": versions} | {
    name: cached(f)
    for name, f in {
        "tiny": tiny,
        "attention": attentions,
        "experts": experts,
        "train": train,
    }.items()
}
