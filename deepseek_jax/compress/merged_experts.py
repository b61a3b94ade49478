"""The weights of experts that become one: their average by how often they are chosen, in float64.

An expert's inner units may stand in any order. With alignment every expert's are put into the order of the
one that its cluster is named after, by the assignment that makes their weights most alike (M-SMoE,
arXiv:2310.01334, section 4), since an average of units that do other things does neither.

Shape letters: model/layers.py; P the pair of gate and up, C clusters.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from deepseek_jax.compress import parts
from deepseek_jax.compress.clusters import Cluster
from deepseek_jax.compress.parts import DOWN, GATE_UP
from deepseek_jax.compress.source import Source
from deepseek_jax.hf.reader import Part
from deepseek_jax.tensorfile import regions


class MergedExperts:
    """The experts of a model whose clusters were merged, layer by layer.

    Args:
      source: the model before.
      clusters: of each layer with experts.
      frequency: float64 [E] of each: how often tokens choose an expert.
      align: whether inner units are put into one order.
    """

    def __init__(
        self,
        source: Source,
        clusters: Mapping[int, Sequence[Cluster]],
        frequency: Mapping[int, np.ndarray],
        align: bool,
    ):
        self._source = source
        self._clusters = clusters
        self._frequency = frequency
        self._align = align
        # Gate and up come first, down needs the same orders.
        self._orders = functools.lru_cache(maxsize=2)(self._orders_of)

    def made(self) -> dict[str, parts.Make]:
        """Routers and experts for parts.Plan: a cluster has the router's row of the expert it is named
        after.
        """

        def rows(rest: str) -> parts.Make:
            return lambda layer: parts.router_parts(
                self._source, layer, rest, [c[0] for c in self._clusters[layer]]
            )

        def experts(rest: str) -> parts.Make:
            return lambda layer: self._experts(layer, rest)

        return {
            parts.GATE: rows(parts.GATE),
            parts.BIAS: rows(parts.BIAS),
            GATE_UP: experts(GATE_UP),
            DOWN: experts(DOWN),
        }

    def shares(self, layer: int, cluster: Cluster) -> np.ndarray:
        """float64, 1 in sum: of each expert of a cluster in their average; equal where none is chosen."""
        counts = self._frequency[layer][list(cluster)]
        if not counts.sum():
            counts = np.ones(len(cluster))
        return counts / counts.sum()

    def _experts(self, layer: int, rest: str) -> Iterator[Part]:
        for i, cluster in enumerate(self._clusters[layer]):
            array = self._one(layer, rest, cluster[0])
            if len(cluster) > 1:
                orders = self._orders(layer) if self._align else {}
                average = np.zeros(array.shape, np.float64)
                for e, share in zip(cluster, self.shares(layer, cluster), strict=True):
                    one = self._one(layer, rest, e).astype(np.float64)
                    average += share * (reordered(rest, one, orders[e]) if e in orders else one)
                array = average.astype(np.float32)
            yield array[None], (slice(i, i + 1), *regions.whole(array.shape))

    def _one(self, layer: int, rest: str, expert: int) -> np.ndarray:
        path, at = self._source.place(layer, rest)
        shape = self._source.leaves[path].shape[1 if at is None else 2 :]
        index = (slice(expert, expert + 1), *regions.whole(shape))
        return self._source.layer(layer, rest, index)[0]

    def _orders_of(self, layer: int) -> dict[int, np.ndarray]:
        """Of each expert that another one gives its name to: which of its units stands at each place."""
        out = {}
        for cluster in self._clusters[layer]:
            first = tuple(self._one(layer, rest, cluster[0]) for rest in (GATE_UP, DOWN))
            for e in cluster[1:]:
                other = tuple(self._one(layer, rest, e) for rest in (GATE_UP, DOWN))
                out[e] = order_of_units(*first, *other)
        return out


def order_of_units(
    gate_up_DPF: np.ndarray,
    down_FD: np.ndarray,
    other_gate_up_DPF: np.ndarray,
    other_down_FD: np.ndarray,
) -> np.ndarray:
    """int [F]: which unit of another expert stands where this one has its own, so that the sum of the
    products of their weights is the largest.
    """
    mine, theirs = (a.reshape(-1, a.shape[-1]) for a in (gate_up_DPF, other_gate_up_DPF))
    alike_FF = mine.astype(np.float64).T @ theirs.astype(np.float64)
    alike_FF += down_FD.astype(np.float64) @ other_down_FD.astype(np.float64).T
    return linear_sum_assignment(alike_FF, maximize=True)[1]


def reordered(rest: str, array: np.ndarray, order_F: np.ndarray) -> np.ndarray:
    """An expert's weight with its units in another order: the last axis of gate and up, the first of down."""
    return array[..., order_F] if rest == GATE_UP else array[order_F]
