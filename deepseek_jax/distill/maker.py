"""Makes a cached teacher: shard after shard, each written whole or not at all."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from deepseek_jax.cli.progress import Bar
from deepseek_jax.cli.texts import gb
from deepseek_jax.cluster.exchange import from_first
from deepseek_jax.data.fields import Rows
from deepseek_jax.distill import shards
from deepseek_jax.distill.manifest import Manifest
from deepseek_jax.errors import UserError, one_line
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.objectives.base import Batch

SHARD_BYTES = 1 << 26  # of a shard, where a row is not longer
SHARDS = 64  # at least, where there are as many calls of the program
CHANNEL = "distill"  # of what process 0 decides


class Worker(NamedTuple):
    """One of some that make a cache together: shards number, number + workers, ... are its own."""

    number: int = 0
    workers: int = 1

    def shards(self, manifest: Manifest) -> range:
        return range(self.number, manifest.shards, self.workers)


class RowSource(Protocol):
    """A loader."""

    def record_rows(self, start: int, count: int) -> Rows: ...


class Records(Protocol):
    """RecordProgram."""

    rows: int

    def of_rows(self, weights: Any, rows: Rows, temperatures: Sequence[float]) -> Batch: ...


def rows_per_shard(rows: int, row_bytes: int, rows_per_call: int) -> int:
    """As many rows as a shard has room for, or fewer where these would be few shards for workers to share; in
    whole calls of the program.
    """
    calls = min(SHARD_BYTES // row_bytes // rows_per_call, -(-rows // rows_per_call // SHARDS))
    return max(calls, 1) * rows_per_call


def check_room(folder: str, manifest: Manifest) -> str:
    """What the shards that are missing need, and what is free, in words.

    Raises:
      UserError: they have no room.
    """
    gone = shards.missing(folder, manifest)
    wanted = sum(len(manifest.rows_of(i)) for i in gone) * manifest.row_bytes
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"--out={folder}: the records of {manifest.rows:,} rows of {manifest.length} tokens need "
            f"{gb(wanted)} more, and {gb(free)} are free. Lower --top-k={manifest.top}, or name a folder on "
            "another disk."
        )
    return f"{gb(wanted)} to write, {gb(free)} free"


def make(
    folder: str,
    manifest: Manifest,
    data: RowSource,
    program: Records,
    weights: ModelWeights | None,
    worker: Worker,
    progress: bool,
) -> int:
    """Makes the shards of a worker that are not there. Every process of a job calls it; the first writes.

    Args:
      data: their rows; fields of the model's input, [n, S].
      weights: of the teacher.
      progress: show a bar.

    Returns:
      Tokens whose records were made, padding among them.

    Raises:
      UserError: a shard cannot be written.
    """
    todo: list[int] = []
    if jax.process_index() == 0:
        gone = set(shards.missing(folder, manifest))
        todo = [i for i in worker.shards(manifest) if i in gone]
    todo = json.loads(from_first(CHANNEL, json.dumps(todo)))
    total = sum(len(manifest.rows_of(i)) for i in todo) * manifest.length
    made = 0
    with Bar("Asking the teacher", total, progress, "tokens") as bar:
        for shard in todo:
            with _claimed(folder, shard, manifest) as writer:
                if from_first(CHANNEL, "skip" if writer is None else "make") == "skip":
                    continue
                for rows, found in _records(shard, manifest, data, program, weights):
                    if writer is not None:
                        writer.write(shards.encoded(_on_host(found, rows), manifest))
                    made += rows * manifest.length
                    bar.advance(rows * manifest.length)
                if writer is not None:
                    writer.finish()
    return made


@contextlib.contextmanager
def _claimed(folder: str, shard: int, manifest: Manifest) -> Iterator[shards.Writer | None]:
    """What writes a shard; None where another has it, and in all processes but the first.

    Raises:
      UserError: it cannot be written.
    """
    if jax.process_index():
        yield None
        return
    try:
        with contextlib.ExitStack() as held:
            try:
                writer = held.enter_context(shards.Writer(folder, shard, manifest))
            except shards.InUse:
                writer = None
            # Another may have finished it since this process looked.
            yield None if shards.is_complete(folder, shard, manifest) else writer
    except OSError as e:
        raise UserError(
            f"--out={folder}: {shards.name_of(shard)} cannot be written ({one_line(e)}). Make room, and run "
            "the same command again: it goes on after the last whole shard."
        ) from e


def _records(
    shard: int,
    manifest: Manifest,
    data: RowSource,
    program: Records,
    weights: ModelWeights | None,
) -> Iterator[tuple[int, Batch]]:
    """(how many rows, the records of these and of padding) of each call, in order."""
    rows = manifest.rows_of(shard)
    waiting: tuple[int, Batch] | None = None
    for first in range(rows.start, rows.stop, program.rows):
        count = min(program.rows, rows.stop - first)
        found = program.of_rows(
            weights, data.record_rows(first, program.rows), manifest.temperatures
        )
        # The devices have the next rows before anybody waits for these.
        if waiting is not None:
            yield waiting
        waiting = count, found
    if waiting is not None:
        yield waiting


def _on_host(found: Batch, rows: int) -> Rows:
    return {name: np.asarray(a.addressable_data(0))[:rows] for name, a in found.items()}
