"""The memory that the dispatch takes, whatever the routing, and what an exchange of the routed rows
alone could need."""

import math
from typing import NamedTuple

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.experts.block_rows import BLOCK, block_count
from deepseek_jax.experts.fp8 import SCALE_BYTES
from deepseek_jax.experts.implementations import MIXED_FP8
from deepseek_jax.experts.places import expert_capacity
from deepseek_jax.parallel.mesh import TOKEN_AXES
from deepseek_jax.parallel.xla_options import ITEM_BYTES


class Buffers(NamedTuple):
    """Of one MoE layer on one device, with T tokens per device, X devices on the expert axis, G
    experts per device and K experts per token.

    Attributes:
      places: C, the capacity: rows per expert and round, for the tokens of one device (all_gather:
        of the expert axis). 0 where a device has all experts and multiplies by groups.
      exchanged_rows: per round: G*X*C (all_to_all), X*T (all_gather), T at a time (ring).
      expert_rows: that the device's experts compute per round: G*X*C (all_to_all), G*C (all_gather, ring);
        without places whole blocks of each expert, as GPUs have them.
      bytes: of both, in the dtype that they have; fixed when the step is compiled.
      ragged_rows: that a ragged exchange must be ready for: X*T*min(K, G), all tokens of the expert
        axis on one device.
      ragged_bytes: of these.
      mean_load: rows of the mean expert that share its places, over all rounds.
    """

    places: int
    exchanged_rows: int
    expert_rows: int
    bytes: int
    ragged_rows: int
    ragged_bytes: int
    mean_load: float


def buffers(config: Config, mesh_shape: dict[str, int]) -> Buffers | None:
    """The dispatch's buffers under a config; None for a model without experts."""
    m = config.model
    if not m.has_experts:
        return None
    devices = mesh_shape["expert"]
    tokens = (
        config.micro_batch
        * config.train.sequence_length
        // math.prod(mesh_shape[a] for a in TOKEN_AXES)
    )
    local = m.n_routed_experts // devices
    method = config.moe.dispatch if devices > 1 else "all_to_all"
    visiting = tokens * devices if method == "all_gather" else tokens
    places = expert_capacity(
        visiting, m.num_experts_per_tok, m.n_routed_experts, config.moe.capacity_factor
    )
    expert_rows = local * places * (devices if method == "all_to_all" else 1)
    exchanged = expert_rows if method == "all_to_all" else visiting
    if devices == 1:
        exchanged = 0
        old = jax.__version_info__ < MIXED_FP8 and config.train.fp8 != "none"  # no kernels for it
        if config.moe.experts_implementation != "rounds" and not old:
            places = 0
            expert_rows = block_count(tokens * m.num_experts_per_tok, local) * BLOCK
    ragged = devices * tokens * min(m.num_experts_per_tok, local)
    row = m.hidden_size * ITEM_BYTES[config.train.dtype]
    sent = m.hidden_size + SCALE_BYTES if config.moe.fp8_dispatch else row
    return Buffers(
        places,
        exchanged,
        expert_rows,
        exchanged * sent + expert_rows * row,
        ragged,
        ragged * row,
        visiting * m.num_experts_per_tok / m.n_routed_experts,
    )
