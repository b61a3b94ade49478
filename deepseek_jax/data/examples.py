"""Examples for fine-tuning as token ids: made of rows once, and kept on disk for later starts of a run.

Rows of JSON, parquet or Arrow go through an encoder (scoring.py), which makes ids of a row and says which of
them are scored. What comes of all rows is written as it comes and memory-mapped then (example_files.py):
memory does not depend on how many there are.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from deepseek_jax import __version__
from deepseek_jax.cli.progress import Bar
from deepseek_jax.config.options import Config
from deepseek_jax.data.documents import (
    DataNotes,
    Record,
    SourceFile,
    find_files,
    no_text,
    split_paths,
    unreadable,
)
from deepseek_jax.data.example_files import (
    FORMAT,
    ExampleSet,
    ExampleWriter,
    Facts,
    only_one,
    open_kept,
    sha256_of,
)
from deepseek_jax.data.records import read_records
from deepseek_jax.data.scoring import Encoded
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError

OPTION = "config.data.path"
FORMS = "a .jsonl, .json, .parquet or .arrow file, one of JSON as .gz, .bz2, .xz or .zst, a folder or a glob"
BATCH = 256  # rows that are encoded together
BATCH_BYTES = 1 << 23  # of their files, at most

Sources = Sequence[tuple[str, Sequence[SourceFile]]]  # as config.data.path names it, its files


class Encoder(Protocol):
    """Makes token ids of rows: scoring.ExampleEncoder.

    Attributes:
      format: of the rows, "" before the first. Kept examples are of rows that the encoder has not seen:
        whoever opens them sets it.
    """

    format: str

    @property
    def identity(self) -> str:
        """Changes whenever the ids or the scored tokens of some row could."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def encode_batch(
        self, rows: Sequence[Mapping[str, Any]], names: Sequence[str] = (), arrow: bool = False
    ) -> Sequence[Encoded]:
        """Every row, whole.

        Raises:
          UserError: a row is not what its columns promise.
        """

    def describe(self) -> list[str]:
        """What was scored of the rows so far, in words."""


def open_examples(
    config: Config,
    tokenizer: Tokenizer,
    encoder: Encoder,
    folder: str | None = None,
    progress: bool = False,
    notes: DataNotes | None = None,
) -> ExampleSet:
    """Every example of `config.data.path`, in the order of the paths and of their files.

    Args:
      config: reads data.path.
      tokenizer: ids are below its vocab_size.
      encoder: makes ids of rows; with examples that were kept it makes none.
      folder: where examples are kept under a digest of their files, the tokenizer and the encoder; None:
        nowhere. It is made if needed.
      progress: show a bar on stderr if it takes long.
      notes: is told which files of a folder are left out.

    Raises:
      UserError: a source is missing, unreadable or holds no examples, a row is none, or the folder cannot be
        written.
    """
    sources = find_sources(config.data.path, DataNotes() if notes is None else notes)

    def make(stem: str | None) -> ExampleSet:
        try:
            return _make(sources, tokenizer, encoder, stem, progress)
        except OSError as e:  # those of reading are UserErrors by now
            raise _not_written(folder or "the folder of temporary files", e) from None

    if folder is None:
        return make(None)
    stem = os.path.join(folder, key_of(sources, tokenizer, encoder, progress))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise _not_written(folder, e) from None
    with only_one(stem):
        return open_kept(stem) or make(stem)


def find_sources(paths: str, notes: DataNotes) -> Sources:
    """The files of a comma-separated `config.data.path` that may hold rows.

    Raises:
      UserError: there are none, or one that was named holds no rows.
    """
    out = []
    for spec in split_paths(paths, OPTION):
        if spec == "stdlib":
            raise UserError(
                f"{OPTION}={spec!r} is text, and this run learns from examples. Give {FORMS}."
            )
        rows = []
        for file in find_files(spec, OPTION, notes):
            if file.kind in ("lines", "json", "parquet", "arrow"):
                rows.append(file)
            elif file.explicit:
                raise UserError(
                    f"{OPTION}={spec!r}: {file.path} holds {file.kind}, and this run learns "
                    f"from rows of examples. Give {FORMS}."
                )
            else:
                notes.skip(spec, file.path, file.size, "no rows of examples")
        if not rows:
            raise no_text(spec, OPTION, notes)
        out.append((spec, rows))
    return out


def key_of(sources: Sources, tokenizer: Tokenizer, encoder: Encoder, progress: bool = False) -> str:
    """SHA-256 of all that the examples depend on: the bytes of the files, tokenizer, encoder, this program.

    Raises:
      UserError: a file cannot be read.
    """
    digests: list[list[tuple[str, str, str]]] = []
    total = sum(f.size for _, files in sources for f in files)
    with Bar("Comparing examples", total, progress) as bar:
        for spec, files in sources:
            digests.append([])
            for file in files:
                try:
                    digests[-1].append((sha256_of(file.path), file.kind, file.compression))
                except OSError as e:
                    raise unreadable(spec, OPTION, file.path, e) from None
                bar.advance(file.size)
    parts = {
        "format": FORMAT,
        "version": __version__,
        "files": digests,
        "tokenizer": tokenizer.name,
        "encoder": encoder.identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _make(
    sources: Sources, tokenizer: Tokenizer, encoder: Encoder, stem: str | None, progress: bool
) -> ExampleSet:
    notes, dropped, differ = DataNotes(), 0, 0
    total = sum(f.size for _, files in sources for f in files)
    with (
        Bar("Tokenizing", total, progress) as bar,
        ExampleWriter(stem, tokenizer.vocab_size) as writer,
    ):
        for spec, files in sources:
            for file in files:
                for batch in _batches(read_records(file, spec, OPTION, notes)):
                    encoded = _encode(batch, f"{OPTION}={spec!r}", encoder, file)
                    _check_ids(batch, encoded, spec, tokenizer)
                    writer.write([(e.ids, e.scored) for e in encoded])
                    dropped += sum(e.dropped_reasoning for e in encoded)
                    differ += sum(e.prompt_differs for e in encoded)
                    bar.advance(sum(record.read for record in batch))
            writer.end_source()
        if not writer.examples:
            raise UserError(
                f"{OPTION}={','.join(s for s, _ in sources)!r} holds no examples. Give {FORMS}."
            )
        about, lines = tuple(encoder.describe()), tuple(notes.lines())
        return writer.finish(Facts(encoder.format, dropped, differ, about, lines))


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0.0
    for record in records:
        batch.append(record)
        size += record.read
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0.0
    if batch:
        yield batch


def _encode(
    batch: list[Record], where: str, encoder: Encoder, file: SourceFile
) -> Sequence[Encoded]:
    rows, names = [r.row for r in batch], [r.place for r in batch]
    try:
        return encoder.encode_batch(rows, names, arrow=file.kind in ("parquet", "arrow"))
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _check_ids(
    batch: list[Record], encoded: Sequence[Encoded], spec: str, tokenizer: Tokenizer
) -> None:
    size = tokenizer.vocab_size
    for record, example in zip(batch, encoded, strict=True):
        if len(example.ids) and not 0 <= example.ids.min() <= example.ids.max() < size:
            bad = next(int(i) for i in example.ids if not 0 <= i < size)
            raise UserError(
                f"{OPTION}={spec!r}, {record.place}: it has the token id {bad}, but config.data.tokenizer "
                f"has the ids 0 to {size - 1}. Give the tokenizer that the ids are of."
            )


def _not_written(folder: str, error: OSError) -> UserError:
    return UserError(
        f"{folder} cannot be written ({error.strerror or error}): tokenised examples are kept there. Make "
        "room, or make it writable."
    )
