"""Causal attention by cuDNN's fused kernels, forward and backward, on one NVIDIA GPU.

JAX's public function refuses values of another width than queries and keys, which MLA has; its
primitives take them (cuDNN 9.10 or newer, Hopper or newer GPUs). They are private: `missing` says
whether they are there and work; where not, attention runs in blocks.
Shape letters: layers.py.
"""

import concurrent.futures
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.runtime import jax_private

OLDEST = 91000  # cuDNN 9.10, the first whose fused attention takes values of another width
CAPABILITY = (9, 0)  # Hopper


@functools.cache
def missing(qk_width: int = 192, v_width: int = 128) -> str | None:
    """Why attention of these head widths cannot be computed by cuDNN here, or None.

    On a GPU it asks cuDNN's version and the chip, and compiles one tiny call, forward and backward.
    Elsewhere, where a program is compiled for GPUs that are not here, it can only tell whether JAX has the
    primitives.
    """
    try:
        jax_private.cudnn_attention()
    except (ImportError, AttributeError) as error:
        return (
            f"jax {jax.__version__} has another cuDNN attention than this version knows ({error})"
        )
    if jax.default_backend() != "gpu":
        return None
    found, capability = jax_private.cudnn_version(), _capability()
    if found is None:
        return "JAX finds no cuDNN"
    if found < OLDEST:
        return f"it needs cuDNN {_dotted(OLDEST)} or newer, and this is {_dotted(found)}"
    if capability < CAPABILITY:
        return (
            f"it needs a GPU of compute capability {_dotted(CAPABILITY)} or newer, and this one has "
            f"{_dotted(capability)}"
        )
    # In a thread: it knows nothing of the mesh and the trace in which somebody asks.
    with concurrent.futures.ThreadPoolExecutor(1, "cudnn") as executor:
        try:
            executor.submit(_probe, qk_width, v_width).result()
        except Exception as error:  # whatever JAX, XLA and cuDNN refuse it with
            said = (str(error).splitlines() or [""])[0][:200]
            return f"a first call fails ({type(error).__name__}: {said})"
    return None


@functools.cache
def usable(qk_width: int, v_width: int) -> bool:
    """Whether nothing is `missing`; if it is, says so in one line, once."""
    reason = missing(qk_width, v_width)
    if reason and jax.process_index() == 0:
        print(
            f"config.train.attention=cudnn: {reason}. Attention runs in blocks instead.",
            file=sys.stderr,
        )
    return reason is None


def _capability() -> tuple[int, ...]:
    return tuple(
        int(n) for n in str(getattr(jax.local_devices()[0], "compute_capability", "0.0")).split(".")
    )


def _dotted(version: int | tuple[int, ...]) -> str:
    return ".".join(
        map(str, (version // 10000, version // 100 % 100) if isinstance(version, int) else version)
    )


def _probe(qk_width: int, v_width: int) -> None:
    """Compiles and runs both kernels once, on this process's first device."""
    q, v = (jnp.ones((1, 128, 1, width), jnp.bfloat16) for width in (qk_width, v_width))

    def both(q, v):
        out, lse = forward(q, q, v, 1.0)
        return backward(q, q, v, out, lse, out, 1.0)

    jax.block_until_ready(jax.jit(both)(q, v))


def forward(
    q_BSNH: jax.Array, k_BSNH: jax.Array, v_BSNV: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """As blockwise.forward, of sequences that are one segment each."""
    fused, empty, options = _parts(q_BSNH, scale)
    return tuple(
        fused._dot_product_attention_fwd_p.bind(
            q_BSNH, k_BSNH, v_BSNV, *empty, is_training=True, **options
        )
    )


def backward(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNV: jax.Array,
    out_BSNV: jax.Array,
    lse_BNS: jax.Array,
    dout_BSNV: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As blockwise.backward, of sequences that are one segment each."""
    fused, empty, options = _parts(q_BSNH, scale)
    return tuple(
        fused._dot_product_attention_bwd_p.bind(
            q_BSNH, k_BSNH, v_BSNV, *empty, lse_BNS, out_BSNV, dout_BSNV, **options
        )
    )


def _parts(q: jax.Array, scale: float) -> tuple[Any, list[jax.Array], dict[str, Any]]:
    """The module, the arguments for what is not used, and the parameters of both primitives.

    Not used are bias, lengths, offsets and pages.
    """
    fused = jax_private.cudnn_attention()
    options = {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": fused.MaskType.CAUSAL,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return fused, [jnp.zeros(0, q.dtype)] * 7, options
