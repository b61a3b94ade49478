"""The kinds of checkpoint, by the same few functions."""

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from etils import epath

from deepseek_jax.checkpoint import full, local, sharded
from deepseek_jax.checkpoint.restore import into_shards
from deepseek_jax.config.options import CHECKPOINT_KINDS
from deepseek_jax.tensorfile.arrays import Tree, unflatten
from deepseek_jax.tensorfile.bounded_json import BadFile

# Each has: EACH (does each process write a whole checkpoint of its part?), start, merge, is_own, Source.
KINDS: dict[str, ModuleType] = dict(zip(CHECKPOINT_KINDS, (sharded, full, local), strict=True))


def of(folder: os.PathLike) -> ModuleType:
    """The kind of the arrays in a folder STEP/, whatever this run writes.

    Raises:
      BadFile: of none.
    """
    for kind in KINDS.values():
        if (epath.Path(folder) / "state" / kind.INDEX).exists():
            return kind
    raise BadFile("state", f"holds none of {', '.join(k.INDEX for k in KINDS.values())}")


def source(folders: Sequence[os.PathLike]) -> Any:
    """The arrays by name and part: `shapes`, `parts(name)`, which are quick to read, and `read(name, index)`. Several folders STEP/ are the pieces of one local checkpoint.

    Raises:
      BadFile: a file is not what it must be.
    """
    return of(folders[0]).Source(*(epath.Path(folder) / "state" for folder in folders))


def shapes(folders: Sequence[os.PathLike]) -> Tree:
    """The tree with leaves that have a shape and a dtype."""
    return unflatten(source(folders).shapes)


def restore(folders: Sequence[os.PathLike], abstract: Tree) -> Tree:
    """The arrays of `abstract` in their shards: all or some of those that are there."""
    return into_shards(source(folders), abstract)
