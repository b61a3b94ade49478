"""Arrays of a compressed model in parts, made from those of its source when they are asked for.

An operation says which layers are left, and for some arrays of a layer how they are made of the source's;
all others are copied. Shape letters: model/layers.py; P the pair of gate and up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.compress.source import Source, copied, layers_of
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.reader import Part
from deepseek_jax.tensorfile import regions

BYTES = 1 << 28  # of a part, about

GATE, BIAS = "mlp/gate/kernel", "mlp/gate/e_score_correction_bias"
GATE_UP, DOWN = "mlp/experts/gate_up_proj", "mlp/experts/down_proj"
SHARED = tuple(f"mlp/shared_experts/{name}_proj/kernel" for name in ("gate", "up", "down"))

# From a layer of the new model to its array, in parts without an axis of layers.
Make = Callable[[int], Iterator[Part]]


class Plan(NamedTuple):
    """A new model, array by array.

    Attributes:
      source: what it is made of.
      model: its options.
      layers: the source's layer of each of its layers, those of multi-token prediction included.
      made: how some arrays of a layer are made, by their path in the layer. All others are the source's.
    """

    source: Source
    model: ModelConfig
    layers: Sequence[int]
    made: Mapping[str, Make] = {}

    def parts(self, leaf: Leaf) -> Iterator[Part]:
        """An array of the new model, in parts, for Compressed.parts."""
        here, rest = layers_of(self.model, leaf)
        if not here or rest not in self.made:
            yield from copied(self.source, self.model, leaf, self.layers)
            return
        for i, layer in enumerate(here):
            for array, index in self.made[rest](layer):
                yield (array[None], (slice(i, i + 1), *index)) if leaf.stacked else (array, index)


def all_layers(model: ModelConfig) -> range:
    """The layers of a model, those of multi-token prediction counted after the last."""
    return range(model.num_hidden_layers + model.num_nextn_predict_layers)


def some_experts(
    source: Source, layer: int, rest: str, experts: Sequence[int]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Experts of a layer of the source, as many at once as make a part of some size.

    Args:
      source, layer, rest: as Source.layer.
      experts: which, in ascending order.

    Yields:
      Which of `experts`, and their array [n, ...].
    """
    path, at = source.place(layer, rest)
    shape = source.leaves[path].shape[0 if at is None else 1 :]
    step = max(1, BYTES // (4 * int(np.prod(shape[1:]))))
    for begin in range(0, len(experts), step):
        chosen = experts[begin : begin + step]
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
        arrays = [
            source.layer(
                layer, rest, (slice(int(run[0]), int(run[-1]) + 1), *regions.whole(shape[1:]))
            )
            for run in runs
        ]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        yield slice(begin, begin + len(chosen)), array


def expert_parts(
    source: Source,
    layer: int,
    rest: str,
    experts: Sequence[int],
    change: Callable[[slice, np.ndarray], np.ndarray] = lambda at, array: array,
) -> Iterator[Part]:
    """Some experts of a layer of the source, as parts of an array of the new model.

    Args:
      source, layer, rest, experts: as `some_experts`.
      change: from which of `experts`, and their array, to their new array [n, ...].
    """
    for at, array in some_experts(source, layer, rest, experts):
        array = change(at, array)
        yield array, (at, *regions.whole(array.shape[1:]))


def router_parts(source: Source, layer: int, rest: str, experts: Sequence[int]) -> Iterator[Part]:
    """The router's rows, or selection biases, of some experts of a layer of the source."""
    array = source.layer(layer, rest)[..., list(experts)]
    yield array, regions.whole(array.shape)


def keeping(
    source: Source, model: ModelConfig, kept: Mapping[int, Sequence[int]], layers: Sequence[int]
) -> dict[str, Make]:
    """How a model's routers and experts are made that has some of the source's experts.

    Args:
      source, model, layers: as Plan.
      kept: the experts of each layer of `model` that has some, ascending, numbered as the source's.
    """

    def experts(rest: str) -> Make:
        return lambda layer: expert_parts(source, layers[layer], rest, kept[layer])

    def rows(rest: str) -> Make:
        return lambda layer: router_parts(source, layers[layer], rest, kept[layer])

    return {GATE: rows(GATE), BIAS: rows(BIAS), GATE_UP: experts(GATE_UP), DOWN: experts(DOWN)}
