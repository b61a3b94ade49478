"""What a decoder layer and generation ask of any attention; kinds.py chooses one. Shape letters: layers.py.

The steps are `project` -> `attend` in training and for a prompt, `project` -> `decode` for what
follows a prompt. What `project` returns is each kind's own: it only travels from one method to the
next.
"""

from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.parallel.mesh import BATCH_AXES

Rope = tuple[jax.Array, jax.Array]  # cos and sin, float32 [B, S, rope/2]: rope.rope_tables
LayerCache = tuple[
    jax.Array, ...
]  # what one layer keeps of the tokens so far, in the order of `cache_shapes`


class CacheShape(NamedTuple):
    """One array of a layer's cache: [B, Z, W], or with M heads [B, M, Z, W]; Z slots of width W."""

    heads: int | None  # None: shared by all heads
    width: int

    @property
    def spec(self) -> P:
        """Over the batch axes, and over tensor where heads have their own."""
        return (
            P(BATCH_AXES, None, None) if self.heads is None else P(BATCH_AXES, "tensor", None, None)
        )

    @property
    def numbers_per_token(self) -> int:
        return (self.heads or 1) * self.width


class Attention(Protocol):
    """One layer's attention: a Flax module with the weights of Hugging Face names."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, method: str = "auto"):
        """One layer's attention.

        Args:
          config: the model's options.
          rngs: for the initial weights.
          method: `config.train.attention`: what computes whole sequences.
        """
        ...

    @staticmethod
    def softmax_scale(config: ModelConfig) -> float:
        """What scores are multiplied by before the softmax."""
        ...

    @staticmethod
    def cache_shapes(config: ModelConfig) -> tuple[CacheShape, ...]:
        """The arrays that decoding keeps of one layer."""
        ...

    def __call__(self, x_BSD: jax.Array, rope: Rope, segment_ids_BS: jax.Array) -> jax.Array:
        """`attend` of `project`: [B, S, D]."""
        ...

    def project(self, x_BSD: jax.Array, rope: Rope) -> Any:
        """Queries, and what keys and values are made of.

        Args:
          x_BSD: the normed residual stream, in the compute dtype.
          rope: cos and sin of the tokens' positions.
        """
        ...

    def attend(self, projected: Any, segment_ids_BS: jax.Array) -> jax.Array:
        """Causal attention of whole sequences to themselves, and the output projection.

        Args:
          projected: what `project` returned.
          segment_ids_BS: int32; a token sees earlier ones with its own id.

        Returns:
          [B, S, D] in the compute dtype.
        """
        ...

    def cache_entries(self, projected: Any) -> tuple[jax.Array, ...]:
        """What the cache keeps of these tokens: [B, S, W] or [B, M, S, W] for each of `cache_shapes`."""
        ...

    def decoding_weights(self, mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
        """Weights as `decode` multiplies by them, made once; empty where the parameters serve."""
        ...

    def decode(
        self,
        projected: Any,
        cache: LayerCache,
        weights: tuple[jax.Array, ...],
        start_B: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Attention of S new tokens per sequence to themselves and to what the cache has of positions before.

        Args:
          projected: what `project` returned for the new tokens.
          cache: of the positions before; it must have slots for the new ones.
          weights: what `decoding_weights` returned.
          start_B: int32, the position of the first new token of each sequence.

        Returns:
          [B, S, D] in the compute dtype, and the cache with the new tokens in it.
        """
        ...
