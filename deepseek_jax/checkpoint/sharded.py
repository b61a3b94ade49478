"""Checkpoints of kind `sharded`, by Orbax: every process writes its shards while training goes on.

Orbax's handler is used without its checkpointers and managers: they rename a folder before anybody could write a manifest into it, and
their processes wait for each other at barriers, where one that failed is missed for twenty minutes.
"""

import asyncio
import os
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath

from deepseek_jax.checkpoint.arrays import Tree

INDEX = "_METADATA"  # the file by which this kind is known
EACH = False  # all processes write one checkpoint together


def start(folder: os.PathLike, state: Tree) -> Callable[[], None]:
    """Copies the shards to the host and begins to write them into `folder`, which exists.

    Returns:
      What waits until this process's part is written, and raises what went wrong.
    """
    handler = _handler()
    futures = asyncio.run(handler.async_save(epath.Path(folder), args=ocp.args.PyTreeSave(state)))

    def finish() -> None:
        errors = []
        for future in futures or []:  # all of them: one that still writes would put files into a folder that is being removed
            try:
                future.result()
            except Exception as e:
                errors.append(e)
        handler.close()
        if errors:
            raise errors[0]

    return finish


def merge(folder: os.PathLike) -> None:
    """Makes one checkpoint of the processes' parts. Process 0 does, after all have written."""
    handler = _handler()
    handler.finalize(epath.Path(folder))
    handler.close()


def is_own(file: str) -> bool:
    """Did this process write that file of `folder`? Process 0 writes those of all, too."""
    head = file.partition("/")[0]
    of_process = head.removeprefix("ocdbt.process_") if head.startswith("ocdbt.process_") else ""
    return int(of_process) == jax.process_index() if of_process.isdigit() else jax.process_index() == 0


def shapes(folder: os.PathLike) -> Tree:
    """The tree with leaves that have a shape and a dtype."""
    handler = _handler()
    try:
        return handler.metadata(epath.Path(folder)).tree
    finally:
        handler.close()


def restore(folder: os.PathLike, abstract: Tree) -> Tree:
    """Reads the arrays of `abstract`, all or some of those that are there, straight into their shards."""
    handler = _handler()
    try:
        args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True)
        return handler.restore(epath.Path(folder), args=args)
    finally:
        handler.close()


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Trained float32 numbers hardly become smaller: zstd takes several times the time of writing them and spares 8% (benchmarks checkpoint).
    return ocp.PyTreeCheckpointHandler(use_compression=False)
