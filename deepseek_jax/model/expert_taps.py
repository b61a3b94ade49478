"""What taps of experts need beyond the forward pass: each chosen expert's output alone, and its inner units.

The dispatch adds up the outputs of a token's experts. So each choice goes through it alone, with weight 1:
the same work once more, on any mesh. All of it runs on one device inside the per_device of moe.py, and
without gradient. Shape letters: layers.py, experts/rounds.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config.options import MoeConfig
from deepseek_jax.experts import dispatch
from deepseek_jax.experts.low_rank import ExpertWeights
from deepseek_jax.parallel.mesh import TOKEN_AXES


def outputs(
    moe: MoeConfig, x_TD: jax.Array, chosen_TK: jax.Array, experts: ExpertWeights
) -> tuple[jax.Array, jax.Array]:
    """Of each chosen expert's output, 0 for padding: its L2 norm, and the largest of its absolute values.

    Returns:
      Two float32 [T, K].
    """
    run = _runner(moe, x_TD)

    def sizes(_, chosen_T):
        y_TD = run(chosen_T, experts)
        return None, (jnp.linalg.norm(y_TD, axis=-1), jnp.max(jnp.abs(y_TD), axis=-1))

    norm_KT, peak_KT = lax.scan(sizes, None, chosen_TK.T)[1]
    return norm_KT.T, peak_KT.T


def unit_sums(
    moe: MoeConfig,
    x_TD: jax.Array,
    chosen_TK: jax.Array,
    experts: ExpertWeights,
    count: int,
) -> jax.Array:
    """float32 [E, F]: the sum over all tokens that chose an expert of |silu(gate) * up| of its inner units.

    A matrix of zeros and ones in place of `down` hands the units out in the place of the output, D of them in
    a pass, through any dispatch.

    Args:
      moe, x_TD, chosen_TK, experts: as `outputs`.
      count: E, on all devices.
    """
    _, width, d = experts.down_GFD.shape
    whole = width * lax.axis_size("tensor")  # which divides the width of an expert
    run = _runner(moe, x_TD)
    unit_F = lax.axis_index("tensor") * width + jnp.arange(width)

    def some_units(first):
        selected_FD = (unit_F[:, None] == first + jnp.arange(d)).astype(x_TD.dtype)
        selected_GFD = jnp.broadcast_to(selected_FD, experts.down_GFD.shape)
        selected_GFD = lax.pcast(selected_GFD, TOKEN_AXES, to="varying")  # as the weights are
        weights = experts._replace(down_GFD=selected_GFD, down_lora=None)

        def add(sum_ED, chosen_T):
            return sum_ED.at[chosen_T].add(jnp.abs(run(chosen_T, weights)), mode="drop"), None

        start_ED = lax.pcast(jnp.zeros((count, d), jnp.float32), TOKEN_AXES, to="varying")
        return lax.psum(lax.scan(add, start_ED, chosen_TK.T)[0], TOKEN_AXES)

    passes = [some_units(first) for first in range(0, whole, d)]
    return jnp.concatenate(passes, axis=1)[:, :whole]


def output_sums(
    moe: MoeConfig, x_TD: jax.Array, valid_T: jax.Array, experts: ExpertWeights, count: int
) -> jax.Array:
    """float32 [E, D]: the sum of each expert's outputs over all tokens, whether they chose it or not.

    In each of E passes a token goes to the expert after its last: so every pass gives every expert the same
    number of tokens, which is one round of any dispatch.

    Args:
      moe, x_TD, experts, count: as `unit_sums`.
      valid_T: bool, False for padding.
    """
    run = _runner(moe, x_TD)
    place_T = jnp.arange(x_TD.shape[0], dtype=jnp.int32)

    def add(sum_ED, turn):
        chosen_T = jnp.where(valid_T, (place_T + turn) % count, count)
        return sum_ED.at[chosen_T].add(run(chosen_T, experts), mode="drop"), None

    start_ED = jnp.zeros((count, x_TD.shape[1]), jnp.float32)
    start_ED = lax.pcast(start_ED, TOKEN_AXES, to="varying")
    turns = jnp.arange(count, dtype=jnp.int32)
    return lax.psum(lax.scan(add, start_ED, turns)[0], TOKEN_AXES)


def _runner(moe: MoeConfig, x_TD: jax.Array) -> Callable[[jax.Array, ExpertWeights], jax.Array]:
    """A function: float32 [T, D], the output of one expert for each token, zeros for padding."""
    x_TD = lax.stop_gradient(x_TD)
    one_T1 = jnp.ones_like(x_TD, jnp.float32, shape=(x_TD.shape[0], 1))

    def run(chosen_T: jax.Array, weights: ExpertWeights) -> jax.Array:
        tokens = dispatch.Tokens(x_TD, one_T1, chosen_T[:, None])
        weights = lax.stop_gradient(weights)
        y_TD, _ = dispatch.dispatch(
            moe.dispatch, tokens, weights, moe.capacity_factor, moe.experts_implementation
        )
        return lax.psum(y_TD, "tensor").astype(jnp.float32)

    return run
