"""What a kind of checkpoint can do, and how its arrays are read.

A folder STEP/ is one checkpoint; STEP/state/ holds its arrays.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
from etils import epath

from deepseek_jax.tensorfile import regions
from deepseek_jax.tensorfile.arrays import TensorSpec, Tree


class TensorReader(Protocol):
    """The arrays of a checkpoint, read part by part without a mesh."""

    @property
    def shapes(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of each array, by its path in the state's tree ("params/norm/weight")."""

    def parts(self, name: str) -> Iterator[regions.Index]:
        """Indices that make up an array, each of which is quick to read."""

    def read(self, name: str, index: regions.Index) -> np.ndarray:
        """A part of an array.

        Raises:
          BadFile: it is not here.
        """


class Kind(Protocol):
    """How a state becomes files of STEP/state/, and arrays again.

    Attributes:
      name: value of config.checkpoint.kind.
      index_file: the file of STEP/state/ by which the kind is known.
      each_process: whether every process writes a checkpoint of its own part; else all write one together.
    """

    @property
    def name(self) -> str: ...
    @property
    def index_file(self) -> str: ...
    @property
    def each_process(self) -> bool: ...

    def start(self, folder: epath.PathLike, state: Tree) -> Callable[[], None]:
        """Copies this process's part to the host, or writes it at once: what the arrays are needed for.

        Args:
          folder: STEP/state/. It exists.
          state: sharded jax.Arrays.

        Returns:
          What waits until this process's part is written, and raises what went wrong.
        """

    def merge(self, folder: epath.PathLike) -> None:
        """Makes one checkpoint of the processes' parts, after all have written. Process 0 calls it."""

    def is_own(self, file: str) -> bool:
        """Whether this process wrote a file, named from STEP/state/ on."""

    def open(self, *folders: epath.PathLike) -> TensorReader:
        """The arrays in one or, of kind `local`, in several folders STEP/state/.

        Raises:
          BadFile: a file is not what it must be.
        """
