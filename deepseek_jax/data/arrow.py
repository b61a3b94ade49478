"""Reads the text of parquet and Arrow files, with pyarrow, an optional dependency."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from deepseek_jax.data.documents import ODD_BYTES, Record, SourceFile, TextPiece, reason
from deepseek_jax.errors import UserError


def read_parquet(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[TextPiece]:
    """The column "text" of a parquet file. Arguments as in formats.read_text's readers."""
    del skip
    yield from _texts(_parquet(file, where, ["text"]), file, where)


def read_arrow(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[TextPiece]:
    """Arrow's IPC stream (`datasets` writes it) or file."""
    del skip
    yield from _texts(_arrow(file, where, ["text"]), file, where)


def parquet_records(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[Record]:
    """The rows of a parquet file, with all columns. Arguments as in formats.read_records' readers."""
    del skip
    yield from _records(_parquet(file, where), file, where)


def arrow_records(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[Record]:
    """The rows of an Arrow stream or file."""
    del skip
    yield from _records(_arrow(file, where), file, where)


Batches = Iterator[tuple[Any, float]]  # (pyarrow.RecordBatch, bytes of the file behind it)


def _parquet(file: SourceFile, where: str, columns: list[str] | None = None) -> Batches:
    pyarrow = import_pyarrow(file, where)
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(file.path)
        if columns:
            _check_column(pyarrow, table.schema_arrow, file, where)
        size = file.size / max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield batch, size * batch.num_rows
    except pyarrow.ArrowException as e:
        raise UserError(
            f"{where}: {file.path} is not a readable parquet file ({reason(e)}). Write it again."
        ) from None


def _arrow(file: SourceFile, where: str, columns: list[str] | None = None) -> Batches:
    pyarrow = import_pyarrow(file, where)
    ipc = importlib.import_module("pyarrow.ipc")
    try:
        with pyarrow.memory_map(file.path) as f:
            is_file = f.read(6) == b"ARROW1"
            f.seek(0)
            table = ipc.open_file(f) if is_file else ipc.open_stream(f)
            if columns:
                _check_column(pyarrow, table.schema, file, where)
            batches = table
            if is_file:
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            before = 0
            for batch in batches:
                if is_file:
                    size = file.size / table.num_record_batches
                else:
                    size, before = f.tell() - before, f.tell()
                yield batch, size
    except pyarrow.ArrowException as e:
        raise UserError(
            f"{where}: {file.path} is not a readable Arrow file ({reason(e)}). Write it again."
        ) from None


def _texts(batches: Batches, file: SourceFile, where: str) -> Iterator[TextPiece]:
    pyarrow = import_pyarrow(file, where)
    for batch, size in batches:
        values = _values(pyarrow, batch.column("text"))
        yield from (TextPiece(text, True, size / max(len(values), 1)) for text in values)


def _records(batches: Batches, file: SourceFile, where: str) -> Iterator[Record]:
    number = 0
    for batch, size in batches:
        for start in range(0, batch.num_rows, 256):  # an Arrow file may be a single batch
            try:
                rows = batch.slice(start, 256).to_pylist()
            except UnicodeDecodeError as e:
                raise UserError(
                    f"{where}: a text in rows {number + 1} to {number + 256} of {file.path} is not UTF-8 "
                    f"({reason(e)}). Write the file again."
                ) from None
            for row in rows:
                number += 1
                place = f"row {number} of {file.path}"
                yield Record(place, row, size / batch.num_rows)


def import_pyarrow(file: SourceFile, where: str) -> Any:
    try:
        import pyarrow  # slow to import, and only some corpora need it: an optional dependency
    except ImportError:
        raise UserError(
            f"{where}: {file.path} needs pyarrow to be read. Install it with pip install "
            f"pyarrow, or convert to .jsonl."
        ) from None
    return pyarrow


def _check_column(pyarrow: Any, schema: Any, file: SourceFile, where: str) -> None:
    if "text" not in schema.names:
        raise UserError(
            f"{where}: {file.path} has no column 'text' (it has: {', '.join(schema.names)}). "
            f"Rename the column that holds the text."
        )
    kind = schema.field("text").type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (
        pyarrow.types.is_string(kind)
        or pyarrow.types.is_large_string(kind)
        or pyarrow.types.is_string_view(kind)
        or pyarrow.types.is_null(kind)
    ):
        raise UserError(
            f"{where}: the column 'text' of {file.path} holds {kind}, not strings. Convert the "
            f"column."
        )


def _values(pyarrow: Any, column: Any) -> list[str]:
    """The strings of a column. They need not be UTF-8: not every writer checks that."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string_view(column.type):
        column = column.cast(pyarrow.large_string())
    wide = pyarrow.types.is_large_string(column.type)
    return [
        (text or b"").decode(errors=ODD_BYTES)
        for text in column.cast(pyarrow.large_binary() if wide else pyarrow.binary()).to_pylist()
    ]
