"""How the experts of each layer were loaded over a run, small enough for a page.

N: records of train/load_history.py, L: layers with experts, E: experts of a layer, T: columns of time. The
relative load of an expert is its tokens / the mean of its layer.
"""

import base64
from typing import Any, NamedTuple

import numpy as np

COLUMNS = 400  # of time in the map of layers
EXPERT_COLUMNS = 200  # and at most in those of experts
EXPERT_BYTES = 400_000  # of all maps of experts, before base64
LAYER_SCALE = 100  # uint16: hundredths of the fullest expert's relative load, up to 655
EXPERT_SCALE = 32  # uint8: 32nds of an expert's relative load, up to 7.97


class LayerLoad(NamedTuple):
    """What a table says of a layer.

    Attributes:
      last, mean, worst: the fullest expert's relative load: in the last record, over all, the highest.
      worst_step: of the highest.
      idle: experts without a token in the last record.
      entropy: of the last record: 1 where all experts have the same, 0 where one has all.
    """

    name: str
    last: float
    mean: float
    worst: float
    worst_step: int
    idle: int
    entropy: float


class LoadMap(NamedTuple):
    """Attributes: table: of each layer. data: for the page, as `load_map` says."""

    table: list[LayerLoad]
    data: dict[str, Any]


def load_map(
    steps_N: np.ndarray, counts_NLE: np.ndarray, names: list[str], share: int = 1
) -> LoadMap | None:
    """The maps; None without records.

    Args:
      names: of the layers.
      share: of how many runs of the page this is one.

    Returns:
      Its data are
        layers: names; experts: E
        steps: the last step of each column of time; fullest: base64 of little-endian uint16 [L, T], the
          highest relative load of an expert in the records of a column x `layer_scale`
        expert_steps, load: the same of uint8 [L, T, E], the relative load of each expert over the records of
          a column x `expert_scale`
    """
    if not len(steps_N):
        return None
    layers, experts = counts_NLE.shape[1:]
    fullest_NL = np.zeros((len(steps_N), layers), np.float32)
    for i, counts_LE in enumerate(counts_NLE):
        fullest_NL[i] = _relative(counts_LE).max(axis=1)
    columns = np.array_split(np.arange(len(steps_N)), min(len(steps_N), COLUMNS))
    fullest_TL = np.stack([fullest_NL[c].max(axis=0) for c in columns])
    most = max(EXPERT_BYTES // share // (layers * experts), 1)
    wide = np.array_split(np.arange(len(steps_N)), min(len(steps_N), EXPERT_COLUMNS, most))
    load_TLE = np.stack([_relative(counts_NLE[c[0] : c[-1] + 1].sum(axis=0)) for c in wide])
    data = {
        "layers": names,
        "experts": experts,
        "steps": [int(steps_N[c[-1]]) for c in columns],
        "first_step": int(steps_N[0]),
        "fullest": _packed(fullest_TL.T * LAYER_SCALE, "<u2"),
        "layer_scale": LAYER_SCALE,
        "expert_steps": [int(steps_N[c[-1]]) for c in wide],
        "load": _packed(load_TLE.transpose(1, 0, 2) * EXPERT_SCALE, "u1"),
        "expert_scale": EXPERT_SCALE,
    }
    return LoadMap(_table(steps_N, counts_NLE[-1], fullest_NL, names), data)


def _relative(counts_LE: np.ndarray) -> np.ndarray:
    """float32 [L, E]; 0 in a layer without tokens."""
    means_L = counts_LE.mean(axis=1, dtype=np.float64)
    return (counts_LE / np.maximum(means_L, 1e-30)[:, None]).astype(np.float32)


def _packed(values: np.ndarray, kind: str) -> str:
    whole = np.minimum(np.rint(values), np.iinfo(kind).max).astype(kind)
    return base64.b64encode(np.ascontiguousarray(whole).tobytes()).decode()


def _table(
    steps_N: np.ndarray, last_LE: np.ndarray, fullest_NL: np.ndarray, names: list[str]
) -> list[LayerLoad]:
    share_LE = last_LE / np.maximum(last_LE.sum(axis=1, keepdims=True), 1)
    nats_L = -(share_LE * np.log(np.maximum(share_LE, 1e-30))).sum(axis=1)
    entropy_L = nats_L / np.log(max(last_LE.shape[1], 2))
    worst_L = fullest_NL.argmax(axis=0)
    return [
        LayerLoad(
            name=name,
            last=float(fullest_NL[-1, i]),
            mean=float(fullest_NL[:, i].mean()),
            worst=float(fullest_NL[worst_L[i], i]),
            worst_step=int(steps_N[worst_L[i]]),
            idle=int((last_LE[i] == 0).sum()),
            entropy=float(entropy_L[i]),
        )
        for i, name in enumerate(names)
    ]
