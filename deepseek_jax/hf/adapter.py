"""An adapter in the host's memory: low-rank updates of a checkpoint's tensors, and tensors in their place.

It stands between three forms: the stacked factors of a run (model/lora.py), files as PEFT writes them
(peft.py), and weights with the updates added, which inference and export read (reader.read_part).

Names are those of a checkpoint's tensors, one for each expert: "model.layers.3.mlp.experts.7.up_proj.weight".
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config.lora_targets import EXPERTS, linear_maps
from deepseek_jax.config.options import Config, LoraConfig, ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import names
from deepseek_jax.hf.names import Leaf
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.model.lora import EXPERT_WEIGHTS, A, B
from deepseek_jax.parallel.offload import STACKS
from deepseek_jax.tensorfile import regions

SAVED = {"embed_tokens/weight": "model.embed_tokens.weight", "lm_head/kernel": "lm_head.weight"}


class Factors(NamedTuple):
    """The update scale * b @ a of a tensor [out, in]."""

    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]
    scale: float


@dataclasses.dataclass
class Adapter:
    """What an adapter changes.

    Attributes:
      lora: the options that make factors of these shapes, as far as all tensors have the same.
      factors: by the name of the tensor.
      saved: tensors that are replaced.
      base: the checkpoint that it was trained on, as its files say.
    """

    lora: LoraConfig
    factors: dict[str, Factors]
    saved: dict[str, np.ndarray]
    base: str = ""

    def change(self, leaf: Leaf, index: regions.Index, out: np.ndarray) -> None:
        """Adds the updates to a part of an array, in its own dtype, float32, or replaces it.

        Args:
          leaf: the array's tensors.
          index: which part of it.
          out: its numbers.
        """
        for piece in names.tensor_regions(leaf, index):
            view = names.view(out, leaf, piece.at)
            if (new := self.saved.get(piece.name)) is not None:
                view[...] = new[piece.region]
            if (factors := self.factors.get(piece.name)) is not None:
                rows, columns = piece.region
                view += factors.scale * (factors.b[rows] @ factors.a[:, columns])

    def changes(self, leaf: Leaf, index: regions.Index) -> bool:
        """Whether it changes anything in a part of an array."""
        found = (piece.name for piece in names.tensor_regions(leaf, index))
        return any(name in self.factors or name in self.saved for name in found)

    def check(self, model: ModelConfig, family: str, where: str) -> None:
        """Compares it with a model.

        Args:
          model: its options.
          family: its family.
          where: what messages call the adapter.

        Raises:
          UserError: a tensor is not the model's, or of another shape.
        """
        there = _shapes(model, family)
        for name, (a, b, _) in self.factors.items():
            found = (b.shape[0], a.shape[1])
            if there.get(name) != found:
                raise _other_model(where, name, found, there.get(name))
        for name, tensor in self.saved.items():
            if there.get(name) != tensor.shape:
                raise _other_model(where, name, tensor.shape, there.get(name))


def _other_model(where: str, name: str, found: tuple, wanted: tuple | None) -> UserError:
    said = f"{list(wanted)} in this model" if wanted else "not in this model"
    return UserError(
        f"{where}: the adapter changes {name} {list(found)}, which is {said}. Name the model that it was "
        f"trained on."
    )


def _shapes(model: ModelConfig, family: str) -> dict[str, tuple[int, ...]]:
    """Of what an adapter may change."""
    m = model
    out: dict[str, tuple[int, ...]] = {}
    out["model.embed_tokens.weight"] = (m.vocab_size, m.hidden_size)
    if not m.tie_word_embeddings:
        out["lm_head.weight"] = (m.vocab_size, m.hidden_size)
    for leaf, _ in _targets(model, family):
        out |= names.tensors(leaf)
    return out


@functools.cache
def _targets(model: ModelConfig, family: str) -> tuple[tuple[Leaf, tuple[str, ...]], ...]:
    """(array, the linear maps in it) of all that can have factors."""
    found, out = linear_maps(model), []
    for leaf in names.leaves(abstract_model(Config(model=model))[1], family, model):
        stack, _, path = leaf.path.partition("/")
        module, _, last = path.replace("/", ".").rpartition(".")
        if last in EXPERT_WEIGHTS:
            maps = tuple(f"{EXPERTS}.{name}" for name in EXPERT_WEIGHTS[last][1])
        else:
            maps = (module,) if last == "kernel" and module in found else ()
        if maps and stack in STACKS:
            out.append((leaf, maps))
    return tuple(out)


def names_of_factors(leaf: Leaf) -> tuple[str, str]:
    """The variables of a run that hold the factors of an array."""
    before, _, last = leaf.path.rpartition("/")
    prefix = EXPERT_WEIGHTS[last][0] if last in EXPERT_WEIGHTS else ""
    return f"{before}/{prefix}{A}", f"{before}/{prefix}{B}"


def _parts(leaf: Leaf) -> Iterator[tuple[str, tuple, tuple]]:
    """(tensor, index of its A [in, r], index of its B [r, out]) in the stacked factors of an array."""
    for i, prefix in enumerate(leaf.prefixes):
        found = names.names_of(leaf, prefix)
        if leaf.kind == "matrix":
            yield found[0], (i,), (i,)
            continue
        for e in range(leaf.shape[1]):
            if leaf.kind == "down":
                yield found[0].format(e=e), (i, e), (i, e)
            else:
                for j, name in enumerate(found):
                    yield name.format(e=e), (i, e, slice(None), j), (i, e, j)


def of_run(
    params: Mapping[str, Any], lora: LoraConfig, model: ModelConfig, family: str, base: str = ""
) -> Adapter:
    """The adapter that a run has trained.

    Args:
      params: arrays by their paths in the model: all factors, and what modules_to_save names.
      lora: the options of the run.
      model: the options of its model.
      family: its family.
      base: the checkpoint that it began with.
    """
    factors: dict[str, Factors] = {}
    for leaf, _ in _targets(model, family):
        path_a, path_b = names_of_factors(leaf)
        if path_a in params:
            a, b = np.asarray(params[path_a]), np.asarray(params[path_b])
            for name, at_a, at_b in _parts(leaf):
                factors[name] = Factors(a[at_a].T, b[at_b].T, lora.scale)
    saved = {}
    for path, name in SAVED.items():
        if path in params:
            tensor = np.asarray(params[path])
            saved[name] = tensor.T if path.endswith("/kernel") else tensor
    return Adapter(lora, factors, saved, base)


def for_run(adapter: Adapter, model: ModelConfig, family: str, where: str) -> dict[str, np.ndarray]:
    """The inverse of `of_run`: stacked arrays by path, to go on training with.

    Raises:
      UserError: the layers differ in what is adapted, or in ranks or scales, which one stack cannot hold; or
        embedding or output head have factors.
    """
    out: dict[str, np.ndarray] = {}
    lora = adapter.lora
    places = {name for leaf, _ in _targets(model, family) for name, _, _ in _parts(leaf)}
    if elsewhere := [name for name in adapter.factors if name not in places]:
        raise UserError(
            f"{where}: it has a low-rank update of {elsewhere[0]}, which training here holds whole. Merge "
            f"this adapter with PEFT, and begin a new one on the result."
        )
    for leaf, maps in _targets(model, family):
        parts = [(name, at_a, at_b) for name, at_a, at_b in _parts(leaf)]
        here = [name for name, _, _ in parts if name in adapter.factors]
        if not here:
            continue
        for name, _, _ in parts:
            found = adapter.factors.get(name)
            if found is None or len(found.a) != lora.r or not np.isclose(found.scale, lora.scale):
                said = (
                    "has none" if found is None else f"has r={len(found.a)}, scale {found.scale:g}"
                )
                raise UserError(
                    f"{where}: {name} {said}, and {maps[0]} of other layers r={lora.r}, scale "
                    f"{lora.scale:g}. Training holds all layers in one array: merge this adapter with "
                    f"PEFT, and begin a new one on the result."
                )
        a_shape, b_shape = _stacked_shapes(leaf, lora.r)
        a, b = np.zeros(a_shape, np.float32), np.zeros(b_shape, np.float32)
        for name, at_a, at_b in parts:
            a[at_a], b[at_b] = adapter.factors[name].a.T, adapter.factors[name].b.T
        out |= dict(zip(names_of_factors(leaf), (a, b), strict=True))
    for path, name in SAVED.items():
        if name in adapter.saved:
            tensor = adapter.saved[name]
            out[path] = tensor.T if path.endswith("/kernel") else tensor
    return out


def _stacked_shapes(leaf: Leaf, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if leaf.kind == "gate_up":
        count, e, d, pair, f = leaf.shape
        return (count, e, d, pair, r), (count, e, pair, r, f)
    *lead, i, o = leaf.shape
    return (*lead, i, r), (*lead, r, o)


@functools.cache
def expert_names(model: ModelConfig, family: str) -> dict[int, dict[str, str]]:
    """By layer, the names of the tensors of a routed expert, with {e} for its number, by linear map."""
    out: dict[int, dict[str, str]] = {}
    for leaf, maps in _targets(model, family):
        if leaf.path.rpartition("/")[2] not in EXPERT_WEIGHTS:
            continue
        for prefix in leaf.prefixes:
            found = zip(
                (path.rpartition(".")[2] for path in maps),
                names.names_of(leaf, prefix),
                strict=True,
            )
            out.setdefault(int(prefix.split(".")[2]), {}).update(found)
    return out


def targets_of(adapter: Adapter, model: ModelConfig, family: str) -> tuple[str, ...]:
    """The linear maps that an adapter changes, in any layer, as `config.lora.target_modules` names them."""
    chosen = []
    for leaf, maps in _targets(model, family):
        for j, path in enumerate(maps):
            found = [name for name, at_a, _ in _parts(leaf) if len(maps) == 1 or at_a[-1] == j]
            if any(name in adapter.factors for name in found):
                chosen.append(path)
    return tuple(path for path in linear_maps(model) if path in chosen)
