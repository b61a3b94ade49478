"""The kinds of checkpoint, by the same few functions."""

import os
from types import ModuleType

from etils import epath

from deepseek_jax.checkpoint import sharded
from deepseek_jax.checkpoint.arrays import Tree
from deepseek_jax.checkpoint.bounded_json import BadFile

# Each has: EACH (does each process write a whole checkpoint of its part?), start, merge, is_own, shapes, restore.
KINDS: dict[str, ModuleType] = {"sharded": sharded}


def of(folder: os.PathLike) -> ModuleType:
    """The kind of the arrays in a folder STEP/state, whatever this run writes.

    Raises:
      BadFile: of none.
    """
    for kind in KINDS.values():
        if (epath.Path(folder) / kind.INDEX).exists():
            return kind
    raise BadFile("state", f"holds none of {', '.join(k.INDEX for k in KINDS.values())}")


def shapes(folder: os.PathLike) -> Tree:
    """The tree with leaves that have a shape and a dtype."""
    return of(folder).shapes(folder)


def restore(folder: os.PathLike, abstract: Tree) -> Tree:
    """The arrays of `abstract` in their shards: all or some of those that are there."""
    return of(folder).restore(folder, abstract)
