"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the embeddings of training.

An example of n tokens gets noise drawn from U(-1, 1) * alpha / sqrt(n D), so that its expected norm, alpha /
sqrt(3), is the same for all examples. n is the length of the example in its row. The paper, and transformers,
take the length of the padded batch, which they have one of: there an example's noise gets smaller with the
length of its neighbours, and with packing it would be that of the whole row.

The noise is a pure function of (seed, number of the row in the data order, place in the row): the same on
every mesh and for every accumulation, another one in the next epoch.

Shape letters: layers.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.mesh import per_device

_PURPOSE = 0x4E454654  # among all that is drawn by the run's seed


@dataclasses.dataclass(frozen=True)
class EmbeddingNoise:
    """What training adds to the embeddings."""

    alpha: float
    seed: int

    @jax.named_scope("embed")
    def add(self, x_BSD: jax.Array, segment_ids_BS: jax.Array, row_B: jax.Array) -> jax.Array:
        """Embeddings with noise.

        Args:
          x_BSD: in the compute dtype.
          segment_ids_BS: int32, 0 is padding, which gets no noise.
          row_B: int32, the number of each sequence in the data order; below 0: no noise.
        """
        width, spec = x_BSD.shape[-1], jax.typeof(x_BSD).sharding.spec
        batch = jax.typeof(segment_ids_BS).sharding.spec

        def one_device(segment_ids_BS: jax.Array, row_B: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(self.seed), _PURPOSE)
            length_BS1 = lengths(segment_ids_BS)[..., None]
            uniform_BSD = jax.vmap(lambda row: _of_row(key, row, length_BS1.shape[1], width))(row_B)
            noisy_BS1 = (length_BS1 > 0) & (row_B >= 0)[:, None, None]
            scale_BS1 = self.alpha * jax.lax.rsqrt(
                jnp.maximum(length_BS1, 1).astype(jnp.float32) * width
            )
            return jnp.where(noisy_BS1, uniform_BSD * scale_BS1, 0.0)

        draw = per_device(one_device, in_specs=(batch, jax.P(batch[0])), out_specs=spec)
        return x_BSD + draw(segment_ids_BS, row_B).astype(x_BSD.dtype)


def _of_row(key: jax.Array, row: jax.Array, length: int, width: int) -> jax.Array:
    """U(-1, 1), float32 [S, D]; a place's numbers do not depend on the row's length."""
    of_row = jax.random.fold_in(key, row)
    places = jnp.arange(length)
    keys = jax.vmap(lambda place: jax.random.fold_in(of_row, place))(places)
    return jax.vmap(lambda k: jax.random.uniform(k, (width,), minval=-1.0, maxval=1.0))(keys)


def lengths(segment_ids_BS: jax.Array) -> jax.Array:
    """int32 [B, S]: the tokens of each token's segment in its row; 0 for padding. Segments are contiguous."""
    length = segment_ids_BS.shape[1]
    place_BS = jax.lax.broadcasted_iota(jnp.int32, segment_ids_BS.shape, 1)
    changes_BS = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    begins_BS = jnp.pad(changes_BS, ((0, 0), (1, 0)), constant_values=True)
    ends_BS = jnp.pad(changes_BS, ((0, 0), (0, 1)), constant_values=True)
    first_BS = jax.lax.cummax(jnp.where(begins_BS, place_BS, 0), axis=1)
    last_BS = jax.lax.cummin(jnp.where(ends_BS, place_BS, length - 1), axis=1, reverse=True)
    return jnp.where(segment_ids_BS > 0, last_BS - first_BS + 1, 0)
