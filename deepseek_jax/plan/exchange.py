"""How much memory the dispatch takes, whatever the routing, beside what an exchange of exactly the routed rows could need."""

import math
from typing import NamedTuple

from deepseek_jax.config.options import Config
from deepseek_jax.experts.rounds import slots_per_round
from deepseek_jax.parallel.mesh import TOKEN_AXES

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Buffers(NamedTuple):
    """Of one MoE layer on one device: T tokens, X devices on the expert axis, G experts on each, K experts a token."""

    places: int  # C: rows of an expert and round, for the tokens of one device (all_gather: of the expert axis)
    exchanged_rows: int  # of a round: G*X*C (all_to_all), X*T (all_gather), T at a time (ring)
    expert_rows: int  # that the device's experts compute in a round: G*X*C (all_to_all), G*C (all_gather, ring)
    bytes: int  # of both, in the compute dtype; fixed when the step is compiled
    ragged_rows: int  # that a ragged exchange must be ready for: X*T*min(K, G), all tokens of the expert axis on one device
    ragged_bytes: int


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
    places = slots_per_round(
        visiting, m.num_experts_per_tok, m.n_routed_experts, config.moe.capacity_factor
    )
    expert_rows = local * places * (devices if method == "all_to_all" else 1)
    exchanged = 0 if devices == 1 else expert_rows if method == "all_to_all" else visiting
    ragged = devices * tokens * min(m.num_experts_per_tok, local)
    row = m.hidden_size * ITEM_BYTES[config.train.dtype]
    return Buffers(
        places, exchanged, expert_rows, (exchanged + expert_rows) * row, ragged, ragged * row
    )
