"""The kinds of checkpoint by name, and which one a folder is of."""

from collections.abc import Sequence

from etils import epath

from deepseek_jax.checkpoint.full import FullKind
from deepseek_jax.checkpoint.kind import Kind, TensorReader
from deepseek_jax.checkpoint.local import LocalKind
from deepseek_jax.checkpoint.restore import into_shards
from deepseek_jax.checkpoint.sharded import ShardedKind
from deepseek_jax.tensorfile.arrays import Tree, unflatten
from deepseek_jax.tensorfile.bounded_json import BadFile

_ALL: tuple[Kind, ...] = (ShardedKind(), FullKind(), LocalKind())
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}


def of(folder: epath.PathLike) -> Kind:
    """The kind of the arrays in a folder STEP/, whatever this run writes.

    Raises:
      BadFile: of none.
    """
    for kind in KINDS.values():
        if (epath.Path(folder) / "state" / kind.index_file).exists():
            return kind
    raise BadFile("state", f"holds none of {', '.join(k.index_file for k in KINDS.values())}")


def reader(folders: Sequence[epath.PathLike]) -> TensorReader:
    """The arrays of a checkpoint. Several folders STEP/ hold the pieces of one local checkpoint.

    Raises:
      BadFile: a file is not what it must be.
    """
    return of(folders[0]).open(*(epath.Path(folder) / "state" for folder in folders))


def shapes(folders: Sequence[epath.PathLike]) -> Tree:
    """The state's tree, with leaves that have a shape and a dtype."""
    return unflatten(dict(reader(folders).shapes))


def restore(folders: Sequence[epath.PathLike], abstract: Tree) -> Tree:
    """The arrays of `abstract` in their shards: all or some of those that are there."""
    return into_shards(reader(folders), abstract)
