"""Which attention a model has: the one place that goes from `ModelConfig.attention_kind` to a class.

Another kind is a file beside mla.py with a class that has the methods of interface.Attention, its
name here and in `attention_kind`, and its widths in config/attention_shape.py.
"""

from flax import nnx

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model.attention.grouped_query import GroupedQueryAttention
from deepseek_jax.model.attention.interface import Attention
from deepseek_jax.model.attention.mla import MultiHeadLatentAttention

KINDS: dict[str, type[Attention]] = {
    "mla": MultiHeadLatentAttention,
    "grouped_query": GroupedQueryAttention,
}


def attention_class(config: ModelConfig) -> type[Attention]:
    return KINDS[config.attention_kind]


def make_attention(config: ModelConfig, rngs: nnx.Rngs, method: str) -> Attention:
    """One layer's attention, of the kind that the options describe."""
    return attention_class(config)(config, rngs, method)
