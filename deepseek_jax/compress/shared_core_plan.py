"""A model with shared cores, made of what was fitted or read: which arrays it has and how they are made.

Shape letters: model/shared_core.py, of E experts.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.compress import multiplied_out, parts
from deepseek_jax.compress.multiplied_out import FACTORS
from deepseek_jax.compress.parts import Plan
from deepseek_jax.compress.shared_core_start import Factors
from deepseek_jax.compress.source import Source
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf.compression_map import expert_rows
from deepseek_jax.hf.reader import Part
from deepseek_jax.tensorfile import regions

PROJECTIONS = ("gate", "up", "down")

# From a layer, a projection and a field of Factors to its array.
Get = Callable[[int, str, str], np.ndarray]


class Unit(NamedTuple):
    """What is fitted at once."""

    layer: int  # those of multi-token prediction counted after the last
    projection: str


def units(model: ModelConfig) -> list[Unit]:
    """All that is fitted, in order."""
    return [Unit(layer, name) for layer in expert_rows(model) for name in PROJECTIONS]


def kept_share(model: ModelConfig, rank: int) -> float:
    """The share of the experts' numbers that core and wrappers have; above 1 they are more."""
    d, f, e = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    return round((d * f + e * 2 * rank * (d + f)) / (e * d * f), 6)


def weights(source: Source, unit: Unit) -> np.ndarray:
    """float32 [E, I, O]: one projection of all experts of a layer."""
    rest = parts.DOWN if unit.projection == "down" else parts.GATE_UP
    path, at = source.place(unit.layer, rest)
    index = list(regions.whole(source.leaves[path].shape[0 if at is None else 1 :]))
    if unit.projection == "down":
        return source.layer(unit.layer, rest, tuple(index)).astype(np.float32)
    pair = PROJECTIONS.index(unit.projection)
    index[2] = slice(pair, pair + 1)
    return source.layer(unit.layer, rest, tuple(index))[:, :, 0].astype(np.float32)


def plan(source: Source, rank: int, get: Get, multiply: bool) -> Plan:
    """The new model, array by array.

    Args:
      source: the model before.
      rank: of the wrappers.
      get: reads what was fitted.
      multiply: whether experts are written as weights of their own.
    """
    layers = parts.all_layers(source.model)
    if multiply:
        made = {
            parts.GATE_UP: _multiplied(get, ("gate", "up")),
            parts.DOWN: _multiplied(get, ("down",)),
        }
        return Plan(source, source.model, layers, made)
    model = dataclasses.replace(source.model, shared_core_rank=rank)
    made = {
        f"mlp/experts/{projection}_shared_core/{name}": _factor(get, projection, field)
        for projection in PROJECTIONS
        for name, field in zip(FACTORS, Factors._fields, strict=True)
    }
    return Plan(source, model, layers, made)


def _factor(get: Get, projection: str, field: str) -> parts.Make:
    def make(layer: int) -> Iterator[Part]:
        array = get(layer, projection, field)
        yield array, regions.whole(array.shape)

    return make


def _multiplied(get: Get, projections: Sequence[str]) -> parts.Make:
    def make(layer: int) -> Iterator[Part]:
        of_each = [[get(layer, p, field) for field in Factors._fields] for p in projections]
        for e in range(len(of_each[0][1])):
            one = [
                multiplied_out.product(core, *(a[e : e + 1] for a in rest))
                for core, *rest in of_each
            ]
            array = np.stack(one, axis=2) if len(one) > 1 else one[0]
            yield array, (slice(e, e + 1), *regions.whole(array.shape[1:]))

    return make


def from_source(given: Source) -> Get:
    """Reads the factors of a model that has some."""
    rest = dict(zip(Factors._fields, FACTORS, strict=True))

    def get(layer: int, projection: str, field: str) -> np.ndarray:
        return given.layer(layer, f"mlp/experts/{projection}_shared_core/{rest[field]}")

    return get
