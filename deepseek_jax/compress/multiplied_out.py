"""Experts around a shared core, read as if each had weights of its own: what every operation works on.

Shape letters: model/shared_core.py, of E experts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deepseek_jax.hf import names, provenance
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.provenance import SourceNotes
from deepseek_jax.tensorfile import regions

Read = Callable[[Leaf, regions.Index], np.ndarray]

FACTORS = (
    "core",
    "input_wrapper/U",
    "input_wrapper/V",
    "output_wrapper/U",
    "output_wrapper/V",
)
CORES = {
    "gate_up_proj": ("gate_shared_core", "up_shared_core"),
    "down_proj": ("down_shared_core",),
}


def product(
    core_IO: np.ndarray,
    u_in_EIR: np.ndarray,
    v_in_EIR: np.ndarray,
    u_out_EOR: np.ndarray,
    v_out_EOR: np.ndarray,
) -> np.ndarray:
    """float32 [E, I, O]: as model.shared_core.product, on the host."""
    core, u_in, v_in, u_out, v_out = (
        np.asarray(a, np.float32) for a in (core_IO, u_in_EIR, v_in_EIR, u_out_EOR, v_out_EOR)
    )
    a_ERO = u_in.transpose(0, 2, 1) @ core
    m_EIR = core @ v_out + v_in @ (a_ERO @ v_out)
    out_EIO = np.concatenate([v_in, m_EIR], 2) @ np.concatenate(
        [a_ERO, u_out.transpose(0, 2, 1)], 1
    )
    out_EIO += core
    return out_EIO


def reading(read: Read, factors: Mapping[str, Leaf]) -> Read:
    """A function that reads arrays of the model without shared cores.

    Args:
      read: reads those of the model that has them.
      factors: its arrays.
    """

    def multiplied(leaf: Leaf, index: regions.Index) -> np.ndarray:
        before, _, last = leaf.path.rpartition("/")
        if last not in CORES or not before.endswith("/experts"):
            return read(factors[leaf.path], index)
        cores = CORES[last]
        if leaf.stacked:
            layers = range(index[0].start, index[0].stop)
            return np.stack([experts(before, cores, index[1:], i) for i in layers])
        return experts(before, cores, index, None)

    def experts(
        before: str, cores: tuple[str, ...], index: regions.Index, layer: int | None
    ) -> np.ndarray:
        """A part of a layer's experts; gate and up as they lie in one array."""
        chosen, inputs, *pair, outputs = index
        which = range(2)[pair[0]] if pair else (0,)
        made = [
            product(*(array(f"{before}/{cores[i]}/{name}", chosen, layer) for name in FACTORS))
            for i in which
        ]
        made = [one[:, inputs, outputs] for one in made]
        return np.stack(made, axis=2) if pair else made[0]

    def array(path: str, chosen: slice, layer: int | None) -> np.ndarray:
        leaf = factors[path]
        shape = leaf.shape if layer is None else leaf.shape[1:]
        whole = regions.whole(shape)
        part = whole if path.endswith("/core") else (chosen, *whole[1:])
        return (
            read(leaf, part) if layer is None else read(leaf, (slice(layer, layer + 1), *part))[0]
        )

    return multiplied


def stored_as(
    notes: SourceNotes | None, before: Sequence[Leaf], after: Sequence[Leaf]
) -> SourceNotes | None:
    """The notes of a model with other arrays of experts: these are stored as those before were.

    Args:
      notes: of the model before; None: nothing is known.
      before, after: its arrays, and those of the model after.
    """
    if notes is None:
        return None
    known = [
        dtype
        for leaf in before
        for name in _names(leaf)
        if (dtype := notes.dtypes.get(provenance.pattern(name)))
    ]
    if not known:
        return notes
    new = {provenance.pattern(name): known[0] for leaf in after for name in _names(leaf)}
    return dataclasses.replace(notes, dtypes=new | notes.dtypes)


def _names(leaf: Leaf) -> list[str]:
    """Names of tensors of routed experts, one of each kind; none of other arrays."""
    if "/experts/" not in leaf.path:
        return []
    return [
        name.format(e=0) for prefix in leaf.prefixes[:1] for name in names.names_of(leaf, prefix)
    ]
