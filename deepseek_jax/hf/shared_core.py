"""`compression_config` of a config.json: experts around a shared core (model/shared_core.py), as in the
`checkpoint-0` of MoE_Factorize_Compress.

Of its keys the rank alone says what the model is; the others tell how it was made.
"""

from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.hf.families import Family

KEY = "compression_config"


def rank_of(given: dict[str, Any], family: Family) -> int:
    """The rank of the wrappers around shared cores; 0 where every expert has weights of its own.

    Args:
      given: the keys of config.json that are not null.
      family: of its model_type.

    Raises:
      UserError: it is of a dense model, or has no rank.
    """
    if KEY not in given:
        return 0
    found = given[KEY]
    if family.dense:
        raise UserError(
            f"config.json: {KEY} is of routed experts, and {family.model_type} has none. Remove it."
        )
    rank = found.get("rank") if isinstance(found, dict) else None
    if type(rank) is not int or rank < 1:
        raise UserError(
            f"config.json: {KEY}={str(found)[:200]} has no whole number rank of 1 or more. Copy config.json "
            f"again from where the checkpoint came from."
        )
    return rank
