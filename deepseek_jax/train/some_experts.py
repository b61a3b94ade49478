"""Experts of which some learn (config.esft.experts): their stack in the state, the model and the step.

TrainState.frozen holds all experts, [L, E, ...], those that learn among them and up to date after every step:
evaluation, generation and checkpoints read these. TrainState.params holds the stack of those that learn, [L,
N, ...], and so gradients and moments are of this shape; TrainState.esft is its index, int32 [L, N].
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.parallel import expert_rows
from deepseek_jax.parallel.weights import ReplicatedWeight, SomeExperts
from deepseek_jax.train.trainable import NONE, Multipliers

Index = Mapping[str, Any]  # int32 arrays by stack: expert_table.indices


def index_of(multipliers: Multipliers) -> dict[str, jax.Array] | None:
    """The index for the state; None where no experts are chosen."""
    return {s: jnp.asarray(index) for s, index in multipliers.experts.items()} or None


def stacks(multipliers: Multipliers, frozen: nnx.State, index: Index | None) -> nnx.State:
    """The stacks of the experts that learn, from all experts: arrays as they are stored, or their shapes."""
    out = []
    for path, v in nnx.to_flat_state(frozen):
        if stack := multipliers.stack_of(path):
            assert index is not None
            axes = [expert_rows.AXES.get(a, a) for a in v.get_metadata()["out_sharding"]]
            value = _taken(v.get_value(), index[stack])
            out.append((path, v.copy(value, out_sharding=tuple(axes))))
    return nnx.from_flat_state(out) if out else NONE


def _taken(whole: Any, index: Any) -> Any:
    if isinstance(whole, jax.ShapeDtypeStruct):
        shape = (*index.shape, *whole.shape[index.ndim :])
        return jax.ShapeDtypeStruct(shape, whole.dtype)
    return expert_rows.take(whole, index)


def in_use(
    multipliers: Multipliers, used: nnx.State, frozen: nnx.State, index: Index | None
) -> nnx.State:
    """All parameters as the model uses them.

    Args:
      used: those that learn, in the representations of parallel/weights.py.
      frozen: the others.
    """
    if not multipliers.experts:
        return nnx.merge_state(used, frozen) if frozen else used
    assert index is not None
    parts, out = dict(nnx.to_flat_state(used)), dict(nnx.to_flat_state(frozen))
    for path, v in out.items():
        if stack := multipliers.stack_of(path):
            part = parts[path].get_value()
            part = part.part if isinstance(part, ReplicatedWeight) else part
            out[path] = v.replace(SomeExperts(v.get_value(), part, index[stack]))
    return nnx.from_flat_state(list((parts | out).items()))


def written(
    multipliers: Multipliers, frozen: nnx.State, params: nnx.State, index: Index | None
) -> nnx.State:
    """All experts with those that learn brought up to date."""
    if not multipliers.experts:
        return frozen
    assert index is not None
    parts, out = dict(nnx.to_flat_state(params)), []
    for path, v in nnx.to_flat_state(frozen):
        if stack := multipliers.stack_of(path):
            whole, rows = v.get_value(), parts[path].get_value()
            v = v.replace(expert_rows.put(whole, rows, index[stack]))
        out.append((path, v))
    return nnx.from_flat_state(out)
