"""Batches read ahead of the training loop, by a thread of grain's."""

import contextlib
from collections.abc import Callable, Generator

import grain

from deepseek_jax.data.fields import Rows


def read_ahead(
    read: Callable[[int], Rows], first: int, stop: int, depth: int = 2
) -> Generator[Rows, None, None]:
    """read(first), read(first + 1), ..., read(stop - 1), each read before it is asked for.

    An exception of a read comes out where its result would have, and ends the iteration. Closing
    the generator ends the thread after the read that it is in.

    Args:
      read: makes the rows of a step; called from the thread.
      first: the first step.
      stop: the step after the last.
      depth: results that may wait to be taken.
    """
    steps = grain.MapDataset.range(stop).map(read)[first:]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=depth)
    results = iter(steps.to_iter_dataset(options))
    with contextlib.closing(results):
        yield from results
