"""Causal attention by cuDNN's fused kernels, forward and backward, on one NVIDIA GPU. Shape letters: layers.py.

JAX's public function refuses values of another width than queries and keys, which MLA has; its primitives take them (cuDNN 9.10 or
newer, Hopper or newer GPUs). They are private: `missing` says whether this JAX has them as they are called here.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import UserError


def missing() -> str | None:
    """Why this JAX cannot, or None."""
    try:
        fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        fused._dot_product_attention_fwd_p, fused._dot_product_attention_bwd_p, fused.MaskType.CAUSAL, fused.AttentionLayout.BTNH
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has another cuDNN attention than this version knows ({error})"
    return None


def forward(q_BSNH: jax.Array, k_BSNH: jax.Array, v_BSNV: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """As blockwise.forward, of sequences that are one segment each."""
    fused, empty, options = _parts(q_BSNH, scale)
    return tuple(fused._dot_product_attention_fwd_p.bind(q_BSNH, k_BSNH, v_BSNV, *empty, is_training=True, **options))


def backward(q_BSNH: jax.Array, k_BSNH: jax.Array, v_BSNV: jax.Array, out_BSNV: jax.Array, lse_BNS: jax.Array, dout_BSNV: jax.Array,
             scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As blockwise.backward, of sequences that are one segment each."""
    fused, empty, options = _parts(q_BSNH, scale)
    return tuple(fused._dot_product_attention_bwd_p.bind(q_BSNH, k_BSNH, v_BSNV, *empty, lse_BNS, out_BSNV, dout_BSNV, **options))


def _parts(q: jax.Array, scale: float) -> tuple[Any, list[jax.Array], dict[str, Any]]:
    """The module, the arguments for what is not used (bias, lengths, offsets, pages), and the parameters of both primitives."""
    if reason := missing():
        raise UserError(f"config.train.attention=cudnn: {reason}. Set config.train.attention=auto.")
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    options = {"scale": scale, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False), "mask_type": fused.MaskType.CAUSAL,
               "layout": fused.AttentionLayout.BTNH.value, "sliding_window_length": None}
    return fused, [jnp.zeros(0, q.dtype)] * 7, options
