"""Finds the files behind a data path and reads their text, piece by piece, so that no file need fit in memory."""

import codecs
import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.config import UserError

BLOCK = 16 << 20  # bytes of a text file read at a time
KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".npy": "tokens", ".bin": "tokens"}  # the rest is text
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TEXT_FORMS = "stdlib, a text, .jsonl or .parquet file, a folder or a glob"
FORMS = "stdlib, a text, .jsonl, .parquet, .npy or .bin file, a folder or a glob"

# A newline with no other white space beside it, ASCII or wide. Two newlines would not do: GPT-2's pattern takes them as one
# piece at the end of a text, as two before a word.
SAFE_CUT = re.compile(rb"(?<=[!-~\x80-\xff])(?<!\xc2\xa0|\xc2\x85)(?<!\xe3\x80\x80|\xe2\x80.)\n"
                      rb"(?=[!-~\xc3-\xf4])(?!\xe3\x80\x80|\xe2\x80)")


class File(NamedTuple):
    path: str
    kind: str  # text | jsonl | parquet | tokens
    explicit: bool  # named or matched by a glob: it has to be readable as what it is; in folders other files are skipped
    size: int  # bytes


class Piece(NamedTuple):
    text: str
    last: bool  # the document ends here
    read: float  # bytes of the file behind this piece, for progress


def split_paths(paths: str, option: str) -> list[str]:
    """The sources of a comma-separated option.

    Raises:
      UserError: one of them is empty.
    """
    out = [p.strip() for p in paths.split(",")]
    if not all(out):
        raise UserError(f"{option}={paths!r} has an empty source. Give {_forms(option)}; several separated by commas.")
    return out


def find_files(spec: str, option: str) -> list[File]:
    """The files of one source, in an order that only their names decide.

    Raises:
      UserError: the path is missing, not readable or empty, or the glob matches nothing.
    """
    if spec == "stdlib":
        files = [f for f in _walk(sysconfig.get_paths()["stdlib"], spec, option, STDLIB_SKIP) if f.path.endswith(".py")]
        if not files:
            raise UserError(f"{option}={spec!r}: this Python comes without the sources of its standard library. Give another "
                            f"path.")
        return files
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        files = list(_walk(path, spec, option, {"__pycache__"}))
    elif os.path.exists(path):
        files = [_file(path, spec, option, explicit=True)]
        if not files[0].size:
            raise UserError(f"{option}={spec!r} is empty. Give a file with text or tokens in it.")
    elif glob.has_magic(path):
        matches = [p for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
        files = [_file(p, spec, option, explicit=True) for p in _without_sidecars(matches)]
        if not files:
            raise UserError(f"{option}={spec!r} matches no file. Correct the pattern (relative paths start in {os.getcwd()}).")
    else:
        raise UserError(f"{option}={spec!r} does not exist. Give {_forms(option)} (relative paths start in {os.getcwd()}).")
    files = [f for f in files if f.size]
    if not files:
        raise UserError(f"{option}={spec!r} holds no text. Give {_forms(option)}; the token files of a folder are named with a "
                        f"glob, as in 'DIR/*.npy'.")
    return files


def _forms(option: str) -> str:
    return FORMS if option.startswith("config.") else TEXT_FORMS  # the commands read text only


def read(file: File, spec: str, option: str) -> Iterator[Piece]:
    """The documents of a text, .jsonl or .parquet file. A document longer than BLOCK comes in several pieces.

    Pieces end at a single newline between two lines of text, where byte-level BPE never merges across; only in a file without
    such a place can a cut change the tokens around it.

    Raises:
      UserError: the file cannot be read, or is not what its name says; the line or byte where it goes wrong.
    """
    try:
        yield from {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[file.kind](file, f"{option}={spec!r}")
    except OSError as e:
        raise _unreadable(spec, option, file.path, e) from None


def _unreadable(spec: str, option: str, path: str, error: OSError) -> UserError:
    return UserError(f"{option}={spec!r}: {path} cannot be read ({error.strerror or error}). Make it readable, or give another "
                     f"path.")


def _file(path: str, spec: str, option: str, explicit: bool) -> File:
    if not os.path.isfile(path):
        raise UserError(f"{option}={spec!r} is neither a file nor a folder. Give {_forms(option)}.")
    try:
        size = os.stat(path).st_size
    except OSError as e:
        raise _unreadable(spec, option, path, e) from None
    return File(path, _kind(path), explicit, size)


def _kind(path: str) -> str:
    return KINDS.get(os.path.splitext(path)[1].lower(), "text")


def _without_sidecars(paths: list[str]) -> list[str]:
    """Leaves out the NAME.json and NAME.offsets of a token file that is among the paths."""
    tokens = {os.path.splitext(p)[0] for p in paths if _kind(p) == "tokens"}
    return [p for p in paths if not (os.path.splitext(p)[0] in tokens and os.path.splitext(p)[1] in (".json", ".offsets"))]


def _walk(folder: str, spec: str, option: str, skip: set[str]) -> Iterator[File]:
    """Text, .jsonl and .parquet files below a folder, sorted by path, without hidden ones and what belongs to token files."""

    def fail(error: OSError):
        raise _unreadable(spec, option, error.filename, error)

    found = []
    for here, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [d for d in folders if d not in skip and not d.startswith(".")]
        found += [os.path.join(here, n) for n in _without_sidecars(names) if not n.startswith(".") and _kind(n) != "tokens"]
    # Compared by component, so that the separator's place among the characters does not matter.
    for path in sorted(found, key=lambda p: os.path.relpath(p, folder).split(os.sep)):
        if os.path.isfile(path):
            yield _file(path, spec, option, explicit=False)


def _read_text(file: File, where: str) -> Iterator[Piece]:
    if not file.explicit and not _is_text(file.path):
        return
    rest, offset = b"", 0
    with open(file.path, "rb") as f:
        while True:
            block = f.read(BLOCK)
            data, last = rest + block, len(block) < BLOCK
            cut = len(data) if last else _cut(data)
            try:
                text = data[:cut].decode()
            except UnicodeDecodeError as e:
                raise UserError(f"{where}: {file.path} is not UTF-8 text at byte {offset + e.start}. Convert it, as with "
                                f"iconv -t UTF-8, or give another file.") from None
            if text or offset:
                yield Piece(text, last, cut)
            if last:
                return
            rest, offset = data[cut:], offset + cut


def _is_text(path: str) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as f:
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
    # A character has at most 4 bytes, and all but its first look like 10xxxxxx; without a first byte it is no UTF-8 anyway.
    return next((p for p in range(last, max(last - 4, -1), -1) if data[p] & 0xC0 != 0x80), last)


def _read_jsonl(file: File, where: str) -> Iterator[Piece]:
    with open(file.path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as e:
                raise UserError(f"{where}: line {number} of {file.path} is not valid JSON in UTF-8 ({e}). Correct or remove "
                                f"that line.") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f"{where}: line {number} of {file.path} has no string 'text'. Write every line as "
                                f"{{\"text\": \"...\"}}.")
            yield Piece(row["text"], True, len(line))


def _read_parquet(file: File, where: str) -> Iterator[Piece]:
    try:
        import pyarrow  # slow to import, and only some corpora need it: an optional dependency
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{where}: {file.path} needs pyarrow to be read. Install it with pip install pyarrow, or convert to "
                        f".jsonl.") from None
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        if "text" not in table.schema_arrow.names:
            raise UserError(f"{where}: {file.path} has no column 'text' (it has: {', '.join(table.schema_arrow.names)}). "
                            f"Rename the column that holds the text.")
        size = file.size / max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise UserError(f"{where}: the column 'text' of {file.path} holds {type(text).__name__}, not strings. "
                                    f"Convert the column.")
                yield Piece(text or "", True, size)
    except pyarrow.ArrowException as e:
        raise UserError(f"{where}: {file.path} is not a readable parquet file ({' '.join(str(e).split())[:160]}). Write it "
                        f"again.") from None
