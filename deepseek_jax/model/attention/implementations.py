"""Which fused kernels compute attention: `config.train.attention`, and what works here.

Kernels for GPUs are experimental parts of JAX, and a GPU may be of a kind that nobody has tried. So before
any are taken, a small attention of the same widths is computed, forward and backward, and compared with
NumPy. Where that fails, kernels that were asked for are refused, and `auto` takes blocks after one printed
line. Where a program is compiled for GPUs that are not here, nothing can be tried.
"""

import functools
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.model.attention import fused
from deepseek_jax.model.attention.fused import FusedAttention
from deepseek_jax.model.attention.visible_blocks import Ids
from deepseek_jax.parallel.mesh import on_cpu
from deepseek_jax.runtime import kernel_trial

OPTION = "config.train.attention"
HOPPER = 9  # major compute capability
# Major compute capability -> kernels that `auto` takes. Mosaic's are for HOPPER; they come in here when
# docs/attention.md can say that they have been shown to be right.
DEFAULTS: dict[int, str] = {}
HOPPER_NAME = re.compile(r"\bG?H\d{2,3}\b")  # NVIDIA H100 80GB HBM3, H200, H20, GH200 480GB
AMPERE = 8
# Widths whose tiles fit the shared memory and the registers of a Hopper GPU, padded to multiples of 64: of
# queries and keys, and of both together.
MOST_WIDTH, MOST_WIDTHS = 192, 320
TOLERANCE = (
    0.03  # of the largest number: bfloat16 rounds weights, their gradients and results by 2^-8 each
)


def kernels(asked: str, dtype: Any, qk_width: int, v_width: int) -> FusedAttention | None:
    """The fused kernels that compute attention; None: blocks, or cuDNN.

    Args:
      asked: auto, blocks, cudnn, or the name of kernels (fused.MODULES). On CPUs these are interpreted, which
        serves tests: make_mesh refuses them to users.
      dtype: of queries, keys and values.
      qk_width: of a head of queries and keys.
      v_width: of a head of values.

    Raises:
      UserError: the kernels that were asked for do not run here.
    """
    if asked in ("blocks", "cudnn") or (asked == "auto" and on_cpu()):
        return None
    if on_cpu():
        return FusedAttention(asked, interpret=True)
    kind, major = np.dtype(dtype).name, _major()
    if asked == "auto":
        return _default(kind, major, qk_width, v_width)
    if reason := missing(asked, kind, major, qk_width, v_width):
        raise UserError(f"{OPTION}={asked}: {reason}. Set {OPTION}=auto, which takes what works.")
    return FusedAttention(asked)


@functools.cache
def _default(dtype: str, major: int, qk_width: int, v_width: int) -> FusedAttention | None:
    """The kernels of DEFAULTS; if they do not work, says why in one line, once."""
    name = DEFAULTS.get(major)
    if name is None:
        return None
    reason = missing(name, dtype, major, qk_width, v_width)
    if reason is None:
        return FusedAttention(name)
    if jax.process_index() == 0:
        print(
            f"{OPTION}=auto: {name}: {reason}. Attention runs in blocks instead.", file=sys.stderr
        )
    return None


@functools.cache
def missing(name: str, dtype: str, major: int, qk_width: int, v_width: int) -> str | None:
    """Why kernels cannot compute attention here, or None.

    Args:
      name: mosaic or triton.
      dtype: of queries, keys and values.
      major: compute capability of the GPUs, before the dot.
      qk_width: of a head of queries and keys.
      v_width: of a head of values.
    """
    if name == "mosaic":
        if major != HOPPER:
            return f"it multiplies by wgmma, which GPUs of compute capability 9 have, and these have {major}"
        if np.dtype(dtype).itemsize != 2:
            return f"it multiplies numbers of 16 bits, and config.train.dtype={dtype}"
        widths = [-(-width // 64) * 64 for width in (qk_width, v_width)]
        if max(widths) > MOST_WIDTH or sum(widths) > MOST_WIDTHS:
            return (
                f"it takes heads up to {MOST_WIDTH} wide, {MOST_WIDTHS} for queries and values together, "
                f"and the model's are {qk_width} and {v_width}"
            )
    if major < AMPERE:
        return f"it needs a GPU of compute capability {AMPERE} or newer, and these have {major}"
    method = FusedAttention(name)
    return kernel_trial.trouble(
        fused.MODULES[name], lambda: try_kernels(method, dtype, qk_width, v_width)
    )


def try_kernels(
    method: FusedAttention, dtype: str, qk_width: int, v_width: int, length: int = 512
) -> str | None:
    """Runs each kernel once, on this process's first device; None, or which gives wrong numbers.

    Two heads of queries share one of keys. The row has documents that end within blocks, one that fills
    whole blocks, and padding.
    """
    rng = np.random.default_rng(0)
    ends = np.array([length // 8 + 5, length * 3 // 4, length - 3])
    segment_S = np.searchsorted(ends, np.arange(length), side="right") + 1
    q, k, v, dout = (
        np.asarray(jnp.asarray(rng.standard_normal(size), dtype).astype(jnp.float32))
        for size in ((length, 2, qk_width), (length, qk_width), (length, v_width), (length, 2, v_width))
    )  # fmt: skip
    scale = qk_width**-0.5
    wanted = _by_numpy(q, k, v, dout, segment_S, scale)

    @jax.jit
    def run(q, k, v, dout, segments):
        ids: Ids = fused.causal_ids(segments)
        out, lse = fused.forward(method, q, k, v, ids, ids, scale)
        return out, lse, *fused.backward(method, q, k, v, ids, ids, out, lse, dout, scale)

    heads = (q[None], k[None, :, None], v[None, :, None], dout[None])
    given = (jnp.asarray(a, dtype) for a in heads)
    out, lse, dq, dk, dv = run(*given, jnp.asarray(segment_S[None], jnp.int32))
    found = (out[0], lse[0].T, dq[0], dk[0, :, 0], dv[0, :, 0])
    names = ("output", "logsumexp", "gradient of queries", "gradient of keys", "gradient of values")
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        error = np.max(np.abs(np.asarray(ours.astype(jnp.float32)) - theirs))
        if not error < TOLERANCE * np.max(np.abs(theirs)):
            return (
                f"its {name} is wrong by {error / np.max(np.abs(theirs)):.2g} of the largest number"
            )
    return None


def _by_numpy(q_SNH, k_SH, v_SV, dout_SNV, segment_S, scale):
    """(output, logsumexp, dq, dk, dv) of one row whose heads share their keys."""
    seen = np.tril(segment_S[:, None] == segment_S)[:, None]
    score = np.where(seen, np.einsum("qnh,kh->qnk", q_SNH, k_SH) * scale, -np.inf)
    top = score.max(axis=-1, keepdims=True)
    weight = np.exp(score - top)
    sum_ = weight.sum(axis=-1, keepdims=True)
    weight /= sum_
    out = np.einsum("qnk,kv->qnv", weight, v_SV)
    dweight = np.einsum("qnv,kv->qnk", dout_SNV, v_SV)
    dscore = weight * (dweight - (weight * dweight).sum(axis=-1, keepdims=True)) * scale
    return (
        out,
        (top + np.log(sum_))[..., 0],
        np.einsum("qnk,kh->qnh", dscore, k_SH),
        np.einsum("qnk,qnh->kh", dscore, q_SNH),
        np.einsum("qnk,qnv->kv", weight, dout_SNV),
    )


def _major() -> int:
    """Compute capability, before the dot, of the GPUs of the current mesh, which need not be here."""
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.local_devices()[0], "compute_capability", "0.0"))
        return int(capability.split(".")[0])
    device = jax.sharding.get_abstract_mesh().abstract_device
    return HOPPER if device and HOPPER_NAME.search(device.device_kind) else AMPERE
