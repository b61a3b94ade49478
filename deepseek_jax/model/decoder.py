"""A layer of the decoder, and one of multi-token prediction. Shape letters: layers.py."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config.options import ModelConfig, MoeConfig
from deepseek_jax.model.attention.interface import Rope
from deepseek_jax.model.attention.kinds import make_attention
from deepseek_jax.model.layers import MLP, Linear, RMSNorm
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.moe_statistics import MoEStats
from deepseek_jax.model.taps import cosines, tap, wanted


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoeConfig,
        is_moe: bool,
        rngs: nnx.Rngs,
        attention: str = "auto",
        fp8: str = "none",
    ):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        self.self_attn = make_attention(config, rngs, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        self.mlp = (
            MoE(config, moe, rngs, fp8) if is_moe else MLP(config, config.intermediate_size, rngs)
        )

    def __call__(
        self,
        x_BSD: jax.Array,
        rope: Rope,
        segment_ids_BS: jax.Array,
        attend: Callable[..., jax.Array] | None = None,
    ) -> tuple[jax.Array, MoEStats | None]:
        """The layer's output [B, S, D], and the statistics of an MoE layer.

        Args:
          x_BSD: the residual stream, in the compute dtype.
          rope: cos and sin of the tokens' positions.
          segment_ids_BS: int32, 0 for padding.
          attend: computes attention in place of the module, which is its first argument:
            generation's, with a cache.
        """
        x_BSD = checkpoint_name(x_BSD, "layer_input")
        entered_BSD = x_BSD
        attention = self.self_attn if attend is None else functools.partial(attend, self.self_attn)
        x_BSD = x_BSD + attention(self.input_layernorm(x_BSD), rope, segment_ids_BS)
        h_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, MoE):
            y_BSD, stats = self.mlp(h_BSD, segment_ids_BS > 0)
        else:
            y_BSD, stats = self.mlp(h_BSD), None
        x_BSD = x_BSD + y_BSD
        tap("hidden", x_BSD)
        if wanted("layer_cosines"):
            tap("layer_cosines", cosines(entered_BSD, x_BSD))
        return x_BSD, stats


class MTPLayer(nnx.Module):
    """One depth of multi-token prediction (DeepSeek-V3, section 2.2).

    The input joins the embedding of the next token with the hidden state of the depth before, each
    normed, embedding first as in the released weights. `norm` is `shared_head.norm` there;
    embedding and output head are the main model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoeConfig,
        rngs: nnx.Rngs,
        attention: str = "auto",
        fp8: str = "none",
    ):
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        self.eh_proj = Linear(
            config, 2 * config.hidden_size, config.hidden_size, ("embed", "lora"), rngs
        )
        self.layer = DecoderLayer(config, moe, True, rngs, attention, fp8)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)

    def __call__(
        self, hidden_BSD, embedded_BSD, rope, segment_ids_BS, attend=None
    ) -> tuple[jax.Array, MoEStats | None]:
        joined = jnp.concatenate([self.enorm(embedded_BSD), self.hnorm(hidden_BSD)], axis=-1)
        x_BSD, stats = self.layer(self.eh_proj(joined), rope, segment_ids_BS, attend)
        return self.norm(x_BSD), stats
