"""compression.json: which layers and experts of its first source a compressed model's own stand for.

    {"version": 1,
     "source": identity of the checkpoint that the first operation read,
     "teacher": {"num_experts": E, "num_hidden_layers": L},    of that checkpoint
     "layer_map": [its layer of each layer],
     "expert_map": [[[its experts of each expert], ...], ...],
     "operations": [{"kind": "prune", ...}, ...]}              oldest first

`expert_map` has a row for each layer with experts, then one for each layer of multi-token prediction, as the
taps of routers have (model/taps.py). An expert that was pruned or moved stands for one, a merged one for
several, a new one for none. Operations compose: the maps always lead to the first source, so that a teacher
is found whatever was done in between.
"""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.bounded_json import BadFile

FILE = "compression.json"
VERSION = 1
MOST_BYTES = 1 << 28
KINDS = ("prune", "merge", "layers", "width", "shared_core", "upcycle")

Experts = tuple[
    tuple[int, ...], ...
]  # of a layer: experts of the teacher that each expert stands for


class CompressionMap(NamedTuple):
    """Where a model's layers and experts come from.

    Attributes:
      layer_map: the teacher's layer of each layer, without multi-token prediction.
      expert_map: a row for each layer with experts, then for those of multi-token prediction.
      num_experts: routed experts of a layer of the teacher; 0 of a dense one.
      num_hidden_layers: of the teacher.
    """

    layer_map: tuple[int, ...]
    expert_map: tuple[Experts, ...]
    num_experts: int
    num_hidden_layers: int

    def of_layers(self, kept: Sequence[int], rows: Sequence[int]) -> "CompressionMap":
        """After some layers were kept.

        Args:
          kept: layers of this model, in order.
          rows: of its `expert_map`, those of the layers kept and of multi-token prediction.
        """
        return self._replace(
            layer_map=tuple(self.layer_map[i] for i in kept),
            expert_map=tuple(self.expert_map[i] for i in rows),
        )

    def of_experts(self, experts: Iterable[Iterable[Iterable[int]]]) -> "CompressionMap":
        """After experts were kept or merged.

        Args:
          experts: for each row, for each new expert: the experts of this model that it stands for.
        """
        rows = zip(self.expert_map, experts, strict=True)
        new = (
            tuple(tuple(dict.fromkeys(t for e in group for t in old[e])) for group in groups)
            for old, groups in rows
        )
        return self._replace(expert_map=tuple(new))

    def without_mtp(self, depth: int) -> "CompressionMap":
        """After the layers of multi-token prediction, `depth` of them, were dropped."""
        return self._replace(expert_map=self.expert_map[: len(self.expert_map) - depth])


class Document(NamedTuple):
    """What a compression.json says."""

    map: CompressionMap
    operations: tuple[dict[str, Any], ...]
    source: str

    def then(self, operation: dict[str, Any], mapped: CompressionMap) -> "Document":
        """After one more operation."""
        return Document(mapped, (*self.operations, operation), self.source)


def expert_rows(model: ModelConfig) -> tuple[int, ...]:
    """The layers of the rows of `expert_map`, those of multi-token prediction counted after the last."""
    if not model.has_experts:
        return ()
    return tuple(
        range(model.first_k_dense_replace, model.num_hidden_layers + model.num_nextn_predict_layers)
    )


def unchanged(model: ModelConfig) -> CompressionMap:
    """Of a model that nothing was done to."""
    experts = model.n_routed_experts if model.has_experts else 0
    row = tuple((e,) for e in range(experts))
    return CompressionMap(
        layer_map=tuple(range(model.num_hidden_layers)),
        expert_map=tuple(row for _ in expert_rows(model)),
        num_experts=experts,
        num_hidden_layers=model.num_hidden_layers,
    )


def read(path: str) -> CompressionMap:
    """The map of a compression.json, or of a folder that holds one.

    Raises:
      UserError: there is none, or it is not one of this version.
    """
    return read_document(path).map


def read_document(path: str) -> Document:
    """All of a compression.json, as `read`."""
    path = os.path.expanduser(path)
    path = os.path.join(path, FILE) if os.path.isdir(path) else path
    try:
        return _checked(bounded_json.read(path, FILE, MOST_BYTES))
    except (BadFile, KeyError, TypeError, ValueError) as e:
        what = (
            e.what if isinstance(e, BadFile) else f"it has no {e}" if isinstance(e, KeyError) else e
        )
        raise UserError(
            f"{path} cannot be read ({what}). Name a {FILE} that `python -m deepseek_jax.compress` wrote."
        ) from e


def dump(document: Document) -> str:
    """The text of a compression.json."""
    m = document.map
    value = {
        "version": VERSION,
        "source": document.source,
        "teacher": {"num_experts": m.num_experts, "num_hidden_layers": m.num_hidden_layers},
        "layer_map": m.layer_map,
        "expert_map": m.expert_map,
        "operations": document.operations,
    }
    # A line a key: the lists are long, and an indent for every number makes them longer than the numbers.
    lines = ",\n".join(
        f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items()
    )
    return f"{{\n{lines}\n}}\n"


def _checked(value: Any) -> Document:
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise ValueError(f"it is not an object with version={VERSION}")
    teacher = value["teacher"]
    experts, layers = (_number(teacher[k], 1 << 20) for k in ("num_experts", "num_hidden_layers"))
    layer_map = tuple(_number(n, layers - 1) for n in _list(value["layer_map"]))
    expert_map = tuple(
        tuple(tuple(_number(t, experts - 1) for t in _list(e)) for e in _list(row))
        for row in _list(value["expert_map"])
    )
    operations = tuple(_list(value["operations"]))
    if not all(isinstance(o, dict) and o.get("kind") in KINDS for o in operations):
        raise ValueError(f"an operation is of none of the kinds {', '.join(KINDS)}")
    mapped = CompressionMap(layer_map, expert_map, experts, layers)
    return Document(mapped, operations, str(value["source"]))


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise ValueError("a list is missing")
    return value


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:40]} is not a whole number from 0 to {most}")
    return value
