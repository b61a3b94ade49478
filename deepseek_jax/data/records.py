"""Reads the rows of files with all their columns, one by one: JSON, parquet and Arrow."""

from collections.abc import Callable, Iterator

from deepseek_jax.cli.texts import clean
from deepseek_jax.data import arrow
from deepseek_jax.data.documents import DataNotes, Record, SourceFile
from deepseek_jax.data.formats import Reader, json_items, lines, watched
from deepseek_jax.errors import UserError

# One of these every row of examples has; the .json files of a folder may be something else.
EXAMPLE_COLUMNS = frozenset(
    ("messages", "prompt", "instruction", "conversations", "text", "input_ids")
)


def read_records(
    file: SourceFile, spec: str, option: str, notes: DataNotes | None = None
) -> Iterator[Record]:
    """The rows of a file of JSON, parquet or Arrow, with all their columns.

    Args: as `read_text`.

    Raises:
      UserError: as `read_text`, or a row is no object.
    """
    notes = DataNotes() if notes is None else notes
    readers: dict[str, Reader[Record]] = {
        "lines": lines,
        "json": _json_records,
        "parquet": arrow.parquet_records,
        "arrow": arrow.arrow_records,
    }
    if file.kind not in readers:
        raise UserError(
            f"{option}={spec!r}: {file.path} holds no rows with columns. Give .jsonl, .json, .parquet or "
            ".arrow files."
        )
    for record in watched(readers[file.kind], file, spec, option, notes):
        try:
            row = clean(record.row) if isinstance(record.row, dict) else None
        except RecursionError:
            row = None
        if row is None:
            raise UserError(
                f"{option}={spec!r}: {record.place} is no object with columns, or one nested too deeply. "
                'Write every row as a JSON object, as {"messages": [...]}.'
            )
        notes.cleaned += row != record.row
        yield record._replace(row=row)


def _json_records(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[Record]:
    for number, record in enumerate(json_items(file, where, skip), 1):
        known = isinstance(record.row, dict) and not EXAMPLE_COLUMNS.isdisjoint(record.row)
        if number == 1 and not file.explicit and not known:
            return skip("JSON without rows of examples")
        yield record
