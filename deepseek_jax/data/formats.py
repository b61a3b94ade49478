"""Reads the text of files, piece by piece, so that no file need fit in memory. Whatever the format,
Unicode text comes out."""

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data import arrow
from deepseek_jax.data.documents import (
    ODD_BYTES,
    DataNotes,
    Record,
    SourceFile,
    TextPiece,
    reason,
    unreadable,
)
from deepseek_jax.errors import UserError

BLOCK = 16 << 20  # bytes of a text file, or characters of a JSON file, read at a time

# A newline with no other white space beside it, ASCII or wide. Two newlines would not do: GPT-2's pattern
# takes them as one piece at the end of a text, as two before a word.
SAFE_CUT = re.compile(
    rb"(?<=[!-~\x80-\xff])(?<!\xc2\xa0|\xc2\x85)(?<!\xe3\x80\x80|\xe2\x80.)\n"
    rb"(?=[!-~\xc3-\xf4])(?!\xe3\x80\x80|\xe2\x80)"
)
_ROW = '{"text": "..."}'

T = TypeVar("T")
# (file, "option=value" for messages, what to call with the reason where a file is left out)
Reader = Callable[[SourceFile, str, Callable[[str], None]], Iterator[T]]


def read_text(
    file: SourceFile, spec: str, option: str, notes: DataNotes | None = None
) -> Iterator[TextPiece]:
    """The documents of a file with text. A document longer than BLOCK comes in several pieces.

    Pieces end at a single newline between two lines of text, where byte-level BPE never merges across; only
    in a file without such a place can a cut change the tokens around it.

    Args:
      file: as documents.find_files finds it.
      spec: the source that it belongs to, for messages.
      option: the option that names the source, for messages.
      notes: is told of files in folders that are not what their names say, and of documents in which U+FFFD
        stands for what is no Unicode text (a byte of Latin-1 in a record, half of a surrogate pair in JSON).

    Raises:
      UserError: the file cannot be read, or is not what its name says; the line, item or byte where it goes
        wrong.
    """
    notes = DataNotes() if notes is None else notes
    reader = {
        "text": _read_plain,
        "lines": _read_lines,
        "json": _read_json,
        "parquet": arrow.read_parquet,
        "arrow": arrow.read_arrow,
    }[file.kind]
    for piece in watched(reader, file, spec, option, notes):
        text = clean_text(piece.text)
        notes.cleaned += text is not piece.text
        yield TextPiece(text, piece.last, piece.read)


def watched(
    reader: Reader[T], file: SourceFile, spec: str, option: str, notes: DataNotes
) -> Iterator[T]:
    """What a reader reads, with the errors of libraries as the user's mistakes."""
    where = f"{option}={spec!r}"
    try:
        yield from reader(file, where, lambda why: notes.skip(spec, file.path, file.size, why))
    except (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error) as e:
        raise _damaged(file, where, e) from None
    except OSError as e:
        # bz2 and pyarrow have no error of their own for damaged data.
        raise (
            _damaged(file, where, e)
            if file.compression and e.errno is None
            else unreadable(spec, option, file.path, e)
        ) from None


def _damaged(file: SourceFile, where: str, error: Exception) -> UserError:
    return UserError(
        f"{where}: {file.path} cannot be unpacked ({reason(error)}). Copy or compress it again."
    )


@contextlib.contextmanager
def _opened(file: SourceFile, where: str) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """-> (the file, unpacked; how many of its bytes on the disk were read since this was last asked)."""
    with contextlib.ExitStack() as held:
        raw = stream = held.enter_context(open(file.path, "rb"))
        if file.compression == ".zst":
            pyarrow = arrow.import_pyarrow(file, where)
            unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            stream = held.enter_context(io.BufferedReader(unpacked, 1 << 20))
        elif file.compression:
            openers: dict[str, Callable[..., Any]] = {
                ".gz": gzip.open,
                ".bz2": bz2.open,
                ".xz": lzma.open,
            }
            stream = held.enter_context(openers[file.compression](raw, "rb"))
        before = 0

        def advanced() -> int:
            nonlocal before
            last, before = before, raw.tell()
            return before - last

        yield stream, advanced


def _read_plain(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[TextPiece]:
    if not file.explicit and not _is_text(file, where):
        skip("not UTF-8 text")
        return
    rest, offset = b"", 0
    with _opened(file, where) as (f, advanced):
        while True:
            block = f.read(BLOCK)
            data, last = rest + block, len(block) < BLOCK
            cut = len(data) if last else _cut(data)
            try:
                text = data[:cut].decode()
            except UnicodeDecodeError as e:
                raise UserError(
                    f"{where}: {file.path} is not UTF-8 text at byte {offset + e.start}. Convert "
                    f"it, as with iconv -t UTF-8, or give another file."
                ) from None
            if not offset:
                text = text.removeprefix("\ufeff")  # the byte order mark of Windows' editors
            if text or offset:
                yield TextPiece(text, last, advanced())
            if last:
                return
            rest, offset = data[cut:], offset + cut


def _is_text(file: SourceFile, where: str) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _opened(file, where) as (f, _):
        try:
            while block := f.read(BLOCK):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _cut(data: bytes) -> int:
    """Where to end a piece of text: at the last SAFE_CUT, or else before the last character."""
    near = max(len(data) - (1 << 20), 0)  # looking further back would cost more than it gains
    ends = [m.end() for m in SAFE_CUT.finditer(data, near)]
    if ends:
        return ends[-1]
    last = len(data) - 1
    # A character has at most 4 bytes, and all but its first look like 10xxxxxx; without a first byte it is no
    # UTF-8 anyway.
    return next((p for p in range(last, max(last - 4, -1), -1) if data[p] & 0xC0 != 0x80), last)


def _read_lines(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[TextPiece]:
    """A JSON object a line (.jsonl, .ndjson)."""
    for place, row, read in lines(file, where, skip):
        if not _has_text(row):
            raise UserError(f"{where}: {place} has no string 'text'. Write every line as {_ROW}.")
        yield TextPiece(row["text"], True, read)


def lines(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[Record]:
    """The values of a file with JSON on every line."""
    del skip  # such a file is data: one that is not what its name says is an error, in a folder too
    with _opened(file, where) as (f, advanced):
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            place = f"line {number} of {file.path}"
            try:
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                row = json.loads(line.decode(errors=ODD_BYTES))
            except (ValueError, RecursionError) as e:
                raise UserError(
                    f"{where}: {place} is not valid JSON ({reason(e)}). Correct or remove that "
                    f"line."
                ) from None
            yield Record(place, row, advanced())


def _read_json(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[TextPiece]:
    """A JSON array of objects, or objects one after the other, on lines or not (.json)."""
    for number, (place, row, read) in enumerate(json_items(file, where, skip), 1):
        if not _has_text(row):
            if number == 1 and not file.explicit:
                return skip("JSON without objects that have a string 'text'")
            raise UserError(
                f"{where}: {place} has no string 'text'. Write an array "
                f"of objects {_ROW}, or one on each line."
            )
        yield TextPiece(row["text"], True, read)


def json_items(file: SourceFile, where: str, skip: Callable[[str], None]) -> Iterator[Record]:
    """The items of a JSON array, or the values of a file one after the other."""
    with _opened(file, where) as (f, advanced):
        items = _items(f)
        for number in itertools.count(1):
            place = f"item {number} of {file.path}"
            try:
                row: Any = next(items, items)
            except (ValueError, RecursionError) as e:
                if number == 1 and not file.explicit:
                    return skip("not JSON")
                raise UserError(
                    f"{where}: {place} is not valid JSON ({reason(e)}). Correct that file."
                ) from None
            if row is items:
                return
            yield Record(place, row, advanced())


def _has_text(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("text"), str)


def _items(f: BinaryIO) -> Iterator[Any]:
    """The items of an array, or values one after the other.

    Raises:
      ValueError: it is not JSON.
    """
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")(ODD_BYTES)
    space = re.compile(r"[ \t\r\n]*")
    text, at, ended, array, first = "", 0, False, False, True

    def more() -> None:
        nonlocal text, at, ended
        block = f.read(max(BLOCK, len(text) - at))  # doubling: an item of n characters costs 2 n
        ended = not block
        text, at = text[at:] + utf8.decode(block, final=ended), 0

    def skip_space() -> str:
        """The next character that is none, or ""."""
        nonlocal at
        while True:
            white = space.match(text, at)
            assert white is not None  # the pattern matches the empty string
            at = white.end()
            if at < len(text) or ended:
                return text[at : at + 1]
            more()

    if skip_space() == "\ufeff":
        at += 1
    if skip_space() == "[":
        at, array = at + 1, True
    while character := skip_space():
        if array and character == "]":
            at += 1
            if skip_space():
                raise ValueError("there is more after the array's end")
            return
        if array and not first:
            if character != ",":
                raise ValueError(f"',' or ']' expected, and there is {character!r}")
            at += 1
            skip_space()
        while True:
            try:
                value, end = decoder.raw_decode(text, at)
                if end < len(text) or ended:
                    break
            except json.JSONDecodeError as e:
                # An item that the block's end cuts fails at that end, or in a string that has none.
                if ended or not e.msg.startswith("Unterminated string") and e.pos < len(text) - 16:
                    raise
            more()
        yield value
        at, first = end, False
    if array:
        raise ValueError("the array has no end")
