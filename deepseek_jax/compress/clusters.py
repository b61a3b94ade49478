"""Which experts of a layer become one: clusters by what experts do, as many as are asked for.

    average_linkage   the two nearest clusters join, again and again; the distance of two clusters is the mean
                      over their pairs (HC-SMoE, arXiv:2410.08589)
    nearest           the best experts stay apart, and each other one joins the most similar of these
                      (M-SMoE, arXiv:2310.01334; REAM, arXiv:2604.04356)

Where a router chooses groups of experts first, clusters stay inside a group and every group has as many.
Experts are numbered in their layer. Of equal ones the lower number comes first.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance

Cluster = tuple[int, ...]  # its experts: the one that it is named after, then the others, ascending
Split = Callable[[np.ndarray, int], list[Cluster]]


def average_linkage(features_EF: np.ndarray, order_E: np.ndarray, count: int) -> list[Cluster]:
    """Clusters of a layer's experts.

    Args:
      features_EF: what experts do, float.
      order_E: a cluster is named after the member with the largest.
      count: of clusters, at least 1 and at most E.
    """
    experts = len(features_EF)
    parts: dict[int, list[int]] = {e: [e] for e in range(experts)}
    if experts > count:
        joined = hierarchy.linkage(distance.pdist(features_EF.astype(np.float64)), "average")
        for i, (a, b, _, _) in enumerate(joined[: experts - count]):
            parts[experts + i] = parts.pop(int(a)) + parts.pop(int(b))
    return _named(list(parts.values()), order_E)


def nearest(similarity_EE: np.ndarray, order_E: np.ndarray, count: int) -> list[Cluster]:
    """Clusters of a layer's experts around the best.

    Args:
      similarity_EE: of pairs, larger for those that are more alike.
      order_E: the experts with the largest stay apart, and give clusters their names.
      count: of clusters, at least 1 and at most E.
    """
    best = np.sort(np.argsort(-order_E, kind="stable")[:count])
    parts = {int(e): [int(e)] for e in best}
    for e in range(len(order_E)):
        if e not in parts:
            parts[int(best[np.argmax(similarity_EE[e, best])])].append(e)
    return [(name, *sorted(set(members) - {name})) for name, members in parts.items()]


def in_groups(
    split: Callable[[slice, int], list[Cluster]], experts: int, groups: int, count: int
) -> list[Cluster]:
    """Clusters of every group, in the order of their names.

    Args:
      split: from a group's experts and the number of its clusters to these, numbered in the group.
      experts, groups: of a layer; the latter divides the former and `count`.
      count: of clusters of the layer.
    """
    size, out = experts // groups, []
    for begin in range(0, experts, size):
        for cluster in split(slice(begin, begin + size), count // groups):
            out.append(tuple(begin + e for e in cluster))
    return sorted(out)


def cosine_distances(features_EF: np.ndarray) -> np.ndarray:
    """float64 [E, E]: 1 - cos of every pair; of a row of zeros 1."""
    norms_E = np.maximum(np.linalg.norm(features_EF, axis=1), 1e-300)
    unit_EF = features_EF.astype(np.float64) / norms_E[:, None]
    return 1 - unit_EF @ unit_EF.T


def _named(parts: Sequence[list[int]], order_E: np.ndarray) -> list[Cluster]:
    out = []
    for members in map(sorted, parts):
        name = members[int(np.argmax(order_E[members]))]
        out.append((name, *(e for e in members if e != name)))
    return sorted(out)
