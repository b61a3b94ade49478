"""`compression_config` of a config.json: experts around a shared core (model/shared_core.py), as in the
`checkpoint-0` of MoE_Factorize_Compress.

Of its keys the rank alone says what the model is; the others tell how it was made. That program fills in the
experts of a fresh model and saves it: attention, router, norms and embedding of its checkpoint-0 are random.
"""

from typing import Any

import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.hf.families import Family
from deepseek_jax.hf.tensors import HfTensors
from deepseek_jax.tensorfile import regions

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


def check_trained(source: HfTensors) -> None:
    """Refuses a checkpoint-0 of MoE_Factorize_Compress around whose experts nothing was ever trained: its
    last norm is all ones.

    Raises:
      UserError: how to put its experts into their model.
    """
    name = "model.norm.weight"
    if "temp_dir" not in (source.config.get(KEY) or {}) or name not in source.tensors:
        return  # none, or not of that program
    shape = source.tensors[name].spec.shape
    weight = np.empty(shape, np.float32)
    source.read(name, regions.whole(shape), weight)
    if np.all(weight == 1):
        raise UserError(
            f"{source.folder}: all weights but the experts' are those of a fresh model ({name} is all ones), "
            f"as MoE_Factorize_Compress saves its checkpoint-0. Put its experts into the model that they "
            f"were made of: python -m deepseek_jax.compress shared-core MODEL OUT "
            f"--factors-from={source.folder}."
        )
