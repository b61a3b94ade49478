"""Trees of arrays as flat dicts, and what is said about them."""

import dataclasses
import math
from typing import Any

import jax
import ml_dtypes
import numpy as np

# Nested dicts with string keys; the leaves are arrays, or ShapeDtypeStructs with shardings.
Tree = dict[str, Any]

# Names of safetensors. A tensor of another dtype is refused.
DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an array, a leaf of a tree without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to {"a/b/c": leaf}."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        out |= flatten(value, path) if isinstance(value, dict) else {path: value}
    return out


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten`, but for empty dicts.

    Raises:
      ValueError: a name is an array and a branch at once.
    """
    out: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = out
        for p in parents:
            node = node.setdefault(p, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path[:80]!r} is below another array")
        if name in node:
            raise ValueError(f"{path[:80]!r} is above another array")
        node[name] = leaf
    return out


def like(tree: Tree, flat: dict[str, Any], prefix: str = "") -> Tree:
    """The leaves of `flat` in the structure of `tree`, empty dicts included."""
    return {
        name: like(value, flat, f"{prefix}{name}/")
        if isinstance(value, dict)
        else flat[prefix + name]
        for name, value in tree.items()
    }


def spec_of(leaf: Any) -> TensorSpec:
    """Of an array, a ShapeDtypeStruct or Orbax's metadata."""
    return TensorSpec(tuple(int(n) for n in leaf.shape), np.dtype(leaf.dtype))


def bytes_of(tree: Tree) -> int:
    """Bytes of all arrays, each counted once."""
    return sum(spec_of(leaf).nbytes for leaf in flatten(tree).values())


def mesh_of(tree: Tree) -> dict[str, int]:
    """Axes and sizes of the mesh that the arrays are on; {} without one."""
    for leaf in flatten(tree).values():
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.NamedSharding):
            return {str(axis): int(n) for axis, n in sharding.mesh.shape.items()}
    return {}
