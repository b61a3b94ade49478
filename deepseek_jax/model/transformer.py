"""The decoder of all families: embedding, dense layers, MoE layers, multi-token prediction, head.

Layers of a stack are one module with stacked parameters ([L, ...]); the forward pass is a
`lax.scan` over them, so that the program (and its compile time) does not grow with depth. Shape
letters: layers.py.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.model import noise
from deepseek_jax.model.attention.interface import Rope
from deepseek_jax.model.decoder import DecoderLayer, MTPLayer
from deepseek_jax.model.embedding_noise import EmbeddingNoise
from deepseek_jax.model.head import Head
from deepseek_jax.model.layers import Embedding, Linear, RMSNorm
from deepseek_jax.model.lora import adapt
from deepseek_jax.model.moe_statistics import MoEStats, join_layers
from deepseek_jax.model.remat import rematerialise
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.model.taps import (
    Asked,
    Held,
    Taps,
    collect,
    join,
    of_layers,
)
from deepseek_jax.parallel.offload import to_device
from deepseek_jax.parallel.weights import gather_for_use


class Output(NamedTuple):
    """What the model returns: hidden states ready for the output head, statistics, and taps."""

    hidden_BSD: jax.Array  # after the final norm
    mtp_hidden_BSD: tuple[jax.Array, ...]  # one per prediction depth, each after its own norm
    # leaves [L, ...]: the MoE layers, then the MTP layers; None for a dense model
    stats: MoEStats | None
    taps: Taps = {}  # what was asked for by name (taps.py), [L, ...] over the layers that have it


class Transformer(nnx.Module):
    """The whole model of a run's options.

    It is built under `jax.eval_shape` or jit, and called under `jax.set_mesh`.
    """

    def __init__(self, options: Config, rngs: nnx.Rngs):
        config, moe, attention = options.model, options.moe, options.train.attention
        fp8 = options.train.fp8
        self.config = config
        self.remat = options.train.remat
        self.offload = options.offload.activations
        self.dtype = jnp.dtype(options.train.dtype)
        alpha = options.sft.neftune_noise_alpha
        self.noise = EmbeddingNoise(alpha, options.seed) if alpha else None
        self.dropout_seed = options.seed if options.lora.r and options.lora.dropout else None
        dense = config.first_k_dense_replace
        self.embed_tokens = Embedding(config, rngs)
        self.dense_layers = _stack(options, False, dense, rngs) if dense else None
        routed = config.num_hidden_layers - dense
        self.layers = _stack(options, True, routed, rngs) if routed else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config, config.hidden_size, config.vocab_size, ("embed", "vocab"), rngs
            )
        self.mtp = nnx.List(
            [
                MTPLayer(config, moe, rngs, attention, fp8)
                for _ in range(config.num_nextn_predict_layers)
            ]
        )

    def __call__(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        next_tokens_BS: jax.Array | None = None,
        taps: Asked = (),
        row_B: jax.Array | None = None,
    ) -> Output:
        """The forward pass.

        Args:
          tokens_BS: int32 ids.
          segment_ids_BS: int32, 0 is padding; attention stays within one id.
          positions_BS: int32 position of each token in its document.
          next_tokens_BS: int32, the token after each position, negative where there is none in its
            document: multi-token prediction runs if it is given and the model has such layers.
            Positions without a token to read are padding there. It is what is read, not what is
            scored: a masked target is still a next token.
          taps: names of what layers are to hand out besides (taps.py).
          row_B: int32, the number of each sequence in the data order, for the noise of training; None:
            without noise.
        """
        chex.assert_rank(tokens_BS, 2)
        chex.assert_equal_shape([tokens_BS, segment_ids_BS, positions_BS])
        chex.assert_type([tokens_BS, segment_ids_BS, positions_BS], jnp.int32)
        rope = rope_tables(self.config, positions_BS)
        x_BSD, first = self.enter(tokens_BS, rope, segment_ids_BS, taps, row_B)
        blocks = getattr(self, self.blocks_name)
        x_BSD, (stats, found) = self._scan(blocks, x_BSD, rope, segment_ids_BS, taps, row_B)
        out = self.leave(x_BSD, rope, segment_ids_BS, next_tokens_BS, taps)
        return out._replace(stats=join_layers(stats, out.stats), taps=join(first, found, out.taps))

    @property
    def blocks_name(self) -> str:
        """The attribute that holds the main stack: what a pipeline divides over its stages."""
        return "layers" if self.layers is not None else "dense_layers"

    def enter(
        self,
        tokens_BS: jax.Array,
        rope: Rope,
        segment_ids_BS: jax.Array,
        taps: Asked = (),
        row_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Taps]:
        """What comes before the main stack: embedding, and dense layers in front of MoE layers.

        Returns:
          [B, S, D] in the compute dtype, and the taps of these layers.
        """
        x_BSD = self.embed_tokens(tokens_BS, self.dtype)
        if self.noise is not None and row_B is not None:
            x_BSD = self.noise.add(x_BSD, segment_ids_BS, row_B)
        found: Taps = {}
        if self.layers is not None and self.dense_layers is not None:
            x_BSD, (_, found) = self._scan(
                self.dense_layers, x_BSD, rope, segment_ids_BS, taps, row_B
            )
        return x_BSD, found

    def leave(
        self,
        x_BSD: jax.Array,
        rope: Rope,
        segment_ids_BS: jax.Array,
        next_tokens_BS: jax.Array | None,
        taps: Asked = (),
    ) -> Output:
        """What comes after the main stack: the last norm and multi-token prediction.

        The statistics and taps are those of multi-token prediction alone.
        """
        hidden_BSD = self.norm(x_BSD)
        if next_tokens_BS is None or not self.mtp:
            return Output(hidden_BSD, (), None)
        mtp_hidden, layers = self._predict_ahead(
            hidden_BSD, next_tokens_BS, rope, segment_ids_BS, taps
        )
        return Output(hidden_BSD, mtp_hidden, *jax.tree.map(lambda *a: jnp.concatenate(a), *layers))

    def layers_of(self, stack: DecoderLayer) -> range:
        """The numbers of a stack's layers."""
        dense, layers = self.config.first_k_dense_replace, range(self.config.num_hidden_layers)
        return layers[:dense] if stack is self.dense_layers else layers[dense:]

    @property
    def head(self) -> Head:
        """The output head: its own weight, or the embedding where they are tied."""
        if self.config.tie_word_embeddings:
            return Head(self.embed_tokens.weight, tied=True)
        return Head(self.lm_head.kernel, tied=False)

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, V]. Training never calls it: head.py goes through the tokens in chunks."""
        head = self.head
        weight = gather_for_use(head.weight, self.dtype)
        kernel_DV = weight.T if head.tied else weight
        return jnp.einsum("bsd,dv->bsv", hidden_BSD, kernel_DV, preferred_element_type=jnp.float32)

    def _scan(self, stack, x_BSD, rope, segment_ids_BS, taps, row_B=None):
        """(x, (statistics, taps)), the latter [L, ...] over the layers of the stack."""
        graphdef, state = nnx.split(stack)
        here = self.layers_of(stack)
        # By its number a layer draws what dropout drops.
        seed = None if row_B is None else self.dropout_seed
        numbers = None if seed is None else jnp.asarray(here, jnp.int32)
        taps = of_layers(taps, here.start, here.stop)
        some = Held(taps, len(here))

        def layer(x_BSD, layer_state):
            layer_state, number = layer_state
            place = None if seed is None else noise.Place(seed, row_B, number)
            with collect(taps) as found, noise.of_layer(place):
                # Weights in the host's memory come one layer at a time, and again in the backward
                # pass, because this is inside of what is rematerialised.
                module = nnx.merge(graphdef, to_device(layer_state))
                x_BSD, stats = module(x_BSD, rope, segment_ids_BS)
            return x_BSD, (stats, found)

        layer = rematerialise(layer, self.remat, self.offload)

        def body(carry, xs):
            (x_BSD, held), (layer_state, place) = carry, xs
            x_BSD, (stats, found) = layer(x_BSD, layer_state)
            return (x_BSD, some.put(held, found, place)), (stats, found)

        start = x_BSD, some.start(x_BSD)
        (x_BSD, held), (stats, found) = jax.lax.scan(body, start, ((state, numbers), some.places))
        return x_BSD, (stats, found | some.taps(held))

    def _predict_ahead(self, hidden_BSD, next_tokens_BS, rope, segment_ids_BS, taps):
        """At position i, depth d reads the embedding of token i+d and the normed state of the depth before.

        It predicts token i+d+1.

        Returns:
          Hidden states of each depth, and (statistics, taps) of each, leaves [1, ...].
        """
        outs, layers = [], []
        taps = of_layers(taps, 0, 0)  # what is asked of some layers is of the main ones
        for mtp in self.mtp:
            graphdef, state = nnx.split(mtp)

            def run(state, hidden_BSD, tokens_BS, segment_ids_BS, graphdef=graphdef):
                embedded = self.embed_tokens(jnp.maximum(tokens_BS, 0), self.dtype)
                with collect(taps) as found:
                    layer = nnx.merge(graphdef, state)
                    hidden_BSD, stats = layer(hidden_BSD, embedded, rope, segment_ids_BS)
                return hidden_BSD, (stats, found)

            segments = jnp.where(next_tokens_BS >= 0, segment_ids_BS, 0)
            hidden_BSD, extra = rematerialise(run, self.remat, self.offload)(
                state, hidden_BSD, next_tokens_BS, segments
            )
            outs.append(hidden_BSD)
            layers.append(jax.tree.map(lambda a: a[None], extra))
            next_tokens_BS = tokens_ahead(next_tokens_BS, segment_ids_BS, 1, missing=-1)
        return tuple(outs), layers


def tokens_ahead(
    ids_BS: jax.Array, segment_ids_BS: jax.Array, distance: int, missing: int
) -> jax.Array:
    """ids_BS[i + distance] at i; `missing` where that lies past the end of the document in this sequence.

    Leading axes may be any.
    """

    def ahead(a: jax.Array, past_the_end: int) -> jax.Array:
        return jax.lax.pad(
            a,
            jnp.asarray(past_the_end, a.dtype),
            [(0, 0, 0)] * (a.ndim - 1) + [(-distance, distance, 0)],
        )

    return jnp.where(ahead(segment_ids_BS, -1) == segment_ids_BS, ahead(ids_BS, missing), missing)


def _stack(options: Config, is_moe: bool, count: int, rngs: nnx.Rngs) -> DecoderLayer:
    """`count` decoder layers as one module with a leading "layers" axis on every variable."""
    config, moe, attention = options.model, options.moe, options.train.attention

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs: nnx.Rngs) -> DecoderLayer:
        layer = DecoderLayer(config, moe, is_moe, rngs, attention, options.train.fp8)
        adapt(layer, config, options.lora, rngs)
        return layer

    return create(rngs)
