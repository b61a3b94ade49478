"""Which routed experts learn: the table of ESFT (arXiv:2407.01906), and its file, ESFT's expert_cfg.json.

    {"experts": {"1": [3, 17], "2": [5]}, "shared_experts": false, "non_expert_modules": false}

Keys are the numbers of the model's layers, as `model.layers.N` of Hugging Face has them; layers of
multi-token prediction come after the last. A layer that is not there learns nothing in its experts.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.bounded_json import BadFile

OPTION = "config.esft.experts"
MOST_BYTES = 1 << 26
FLAGS = ("shared_experts", "non_expert_modules")
# What `python -m deepseek_jax.esft score` writes besides, for readers.
NOTES = ("score", "top_p", "tokens", "model", "data", "scores")
NOBODY = -1  # in a stack's index: no expert


class ExpertTable(NamedTuple):
    """What learns."""

    experts: Mapping[int, tuple[int, ...]]  # layer -> its experts, in the order of the file
    shared_experts: bool  # the shared experts as well
    non_expert_modules: bool  # all that is no expert: attention, norms, routers, embedding, head


def read(path: str, model: ModelConfig) -> ExpertTable:
    """The table in a file, checked against a model.

    Raises:
      UserError: it cannot be read, is no such table, or names layers or experts that the model has not.
    """
    where = f"{OPTION}={path}"
    if not model.has_experts:
        raise UserError(f"{where}: this model has no routed experts. Leave it out.")
    try:
        given = bounded_json.read(os.path.expanduser(path), os.path.basename(path), MOST_BYTES)
    except (BadFile, OSError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise UserError(
            f"{where} cannot be read ({why}). Name a file as `python -m deepseek_jax.esft score` writes it."
        ) from e
    return _checked(where, given, model)


def _checked(where: str, given: Any, model: ModelConfig) -> ExpertTable:
    def bad(what: str) -> UserError:
        return UserError(
            f'{where}: {what}. Write {{"experts": {{"LAYER": [EXPERT, ...]}}, "shared_experts": false, '
            f'"non_expert_modules": false}}.'
        )

    if not isinstance(given, dict) or not isinstance(given.get("experts"), dict):
        raise bad("it has no object `experts`")
    if unknown := sorted(given.keys() - {"experts", *FLAGS, *NOTES}):
        raise bad(f"{unknown[0][:80]!r} is not known")
    for flag in FLAGS:
        if not isinstance(given.get(flag, False), bool):
            raise bad(f"{flag} is {given[flag]!r}, and not true or false")
    layers = expert_layers(model)
    experts = {}
    for key, chosen in given["experts"].items():
        if not key.isdecimal() or str(int(key)) != key or int(key) not in layers:
            raise bad(
                f"layer {key[:80]!r} has no routed experts: those of this model that have are "
                f"{layers.start} to {layers.stop - 1}"
            )
        known = isinstance(chosen, list) and all(
            type(e) is int and 0 <= e < model.n_routed_experts for e in chosen
        )
        if not known or len(set(chosen)) < len(chosen):
            raise bad(
                f"layer {key} needs a list of different experts, numbers from 0 to "
                f"{model.n_routed_experts - 1}"
            )
        experts[int(key)] = tuple(chosen)
    table = ExpertTable(experts, *(given.get(flag, False) for flag in FLAGS))
    if not any(experts.values()) and not any(table[1:]):
        raise bad("nothing learns: no layer has an expert")
    return table


def expert_layers(model: ModelConfig) -> range:
    """The numbers of the layers that have routed experts, those of multi-token prediction last."""
    depths = model.num_nextn_predict_layers
    return range(model.first_k_dense_replace, model.num_hidden_layers + depths)


def indices(table: ExpertTable, model: ModelConfig) -> dict[str, np.ndarray]:
    """The experts that learn of each stack of layers and of each layer of multi-token prediction.

    Returns:
      int32 [L, N] for "layers" and [N] for "mtp_0" and on: N is the most that one of its layers has, the
      rest is NOBODY. Stacks without any are left out.
    """
    layers = model.num_hidden_layers
    main = [table.experts.get(n, ()) for n in range(model.first_k_dense_replace, layers)]
    out = {"layers": _index(main)}
    for depth in range(model.num_nextn_predict_layers):
        out[f"mtp_{depth}"] = _index([table.experts.get(layers + depth, ())])[0]
    return {stack: index for stack, index in out.items() if index.size}


def _index(chosen: list[tuple[int, ...]]) -> np.ndarray:
    index = np.full((len(chosen), max(map(len, chosen), default=0)), NOBODY, np.int32)
    for row, experts in zip(index, chosen, strict=True):
        row[: len(experts)] = sorted(experts)
    return index


def write(path: str, table: ExpertTable, notes: Mapping[str, Any]) -> None:
    """Writes a table, and notes for readers beside it, that `read` passes over.

    Raises:
      UserError: the file cannot be written.
    """
    assert notes.keys() <= set(NOTES)
    out = {"experts": {str(n): list(e) for n, e in table.experts.items()}}
    out |= {flag: getattr(table, flag) for flag in FLAGS} | dict(notes)
    path = os.path.expanduser(path)
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            json.dump(out, f)
        os.replace(path + ".tmp", path)
    except OSError as e:
        raise UserError(f"--out={path} cannot be written ({e.strerror}). Name another file.") from e
