"""Finds the files behind a data path, by their names; formats.py, arrow.py and tokenfile.py read them."""

import glob
import os
import sysconfig
from collections.abc import Iterator
from typing import Any, NamedTuple

from deepseek_jax.cli.texts import gb, plural
from deepseek_jax.errors import UserError

KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".npy": "tokens",
    ".bin": "tokens",
    ".idx": "index",
}  # other endings are text, unless REFUSED
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # of text and JSON
# Names whose files are text to no reader, or text only by accident: rows of a table, not documents.
REFUSED = {
    **dict.fromkeys((".csv", ".tsv"), "a table"),
    **dict.fromkeys(
        (
            ".zip",
            ".tar",
            ".tgz",
            ".tbz2",
            ".txz",
            ".7z",
            ".rar",
            ".lz4",
            ".lzo",
            ".lz",
            ".lzma",
            ".zstd",
            ".br",
            ".z",
        ),
        "an archive",
    ),
    **dict.fromkeys(
        (
            ".pkl",
            ".pickle",
            ".pt",
            ".pth",
            ".npz",
            ".safetensors",
            ".h5",
            ".hdf5",
            ".tfrecord",
            ".feather",
            ".avro",
            ".orc",
            ".mds",
        ),
        "a file of arrays or records that is not read",
    ),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".xlsx"), "a formatted document"),
}
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TEXT_FORMS = (
    "stdlib, a text, .jsonl, .json, .parquet or .arrow file, one of text or JSON as .gz, .bz2, .xz "
    "or .zst, a folder or a glob"
)
FORMS = f"{TEXT_FORMS}, or token files .npy and .bin"


# Bytes of a record that are no UTF-8 become lone surrogates, as JSON can spell them; clean_text cleans both.
ODD_BYTES = "surrogateescape"


class SourceFile(NamedTuple):
    """A file of a source."""

    path: str
    kind: str  # text | lines | json | parquet | arrow | tokens
    explicit: bool  # the user named it, or a glob matched: unreadable is an error, in a folder it is skipped
    size: int  # bytes
    compression: str = ""  # "" or one of COMPRESSED


class TextPiece(NamedTuple):
    """Some text of a document."""

    text: str
    last: bool  # the document ends here
    read: float  # bytes of the file behind this piece, for progress


class Record(NamedTuple):
    """A row with all its columns. One of a table (parquet, Arrow) has all keys of the others, with None."""

    place: str  # where it stands, for messages
    row: Any  # a dict, where the file is what it should be
    read: float  # bytes of the file behind this row, for progress


class DataNotes:
    """What was left out of the data or changed in it, for people to read."""

    def __init__(self) -> None:
        # (source, kind of file, why) -> [files, bytes]
        self._skipped: dict[tuple[str, str, str], list[int]] = {}
        self.cleaned = 0  # documents in which something is not Unicode text
        self.others: list[str] = []

    def skip(self, spec: str, path: str, size: int, why: str) -> None:
        ending = "".join(_endings(path)) or os.path.basename(path)
        count = self._skipped.setdefault((spec, ending, why), [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + size

    def skipped(self, spec: str) -> str:
        """The files of a source that were left out: "2 .png, 31 kB (not UTF-8 text)"; "" if none were."""
        return ", ".join(
            f"{n} {ending}, {gb(size)} ({why})"
            for (s, ending, why), (n, size) in self._skipped.items()
            if s == spec
        )

    def lines(self) -> list[str]:
        out = [
            f"skipped in {spec}: {self.skipped(spec)}"
            for spec in dict.fromkeys(s for s, _, _ in self._skipped)
        ]
        if self.cleaned:
            out.append(
                f"{plural(self.cleaned, 'document')} held bytes or characters that are not Unicode "
                f"text: U+FFFD stands in their place"
            )
        return out + self.others


def split_paths(paths: str, option: str) -> list[str]:
    """The sources of a comma-separated option.

    Raises:
      UserError: one of them is empty.
    """
    out = [p.strip() for p in paths.split(",")]
    if not all(out):
        raise UserError(
            f"{option}={paths!r} has an empty source. Give {_forms(option)}; several separated by commas."
        )
    return out


def find_files(spec: str, option: str, notes: DataNotes | None = None) -> list[SourceFile]:
    """The files of one source, in an order that only their names decide. `notes` is told what else a folder
    holds.

    Raises:
      UserError: the path is missing, not readable, empty or of a kind that is not read, or the glob matches
        nothing.
    """
    notes = DataNotes() if notes is None else notes
    if spec == "stdlib":
        files = [
            f
            for f in _walk(sysconfig.get_paths()["stdlib"], spec, option, STDLIB_SKIP, DataNotes())
            if f.path.endswith(".py")
        ]
        if not files:
            raise UserError(
                f"{option}={spec!r}: this Python comes without the sources of its standard "
                "library. Give another path."
            )
        return files
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        files = list(_walk(path, spec, option, {"__pycache__"}, notes))
    elif os.path.exists(path) or _is_prefix(path):
        files = [_file(f"{path}.bin" if _is_prefix(path) else path, spec, option, explicit=True)]
        if not files[0].size:
            raise UserError(f"{option}={spec!r} is empty. Give a file with text or tokens in it.")
    elif glob.has_magic(path):
        matches = [p for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
        files = [_file(p, spec, option, explicit=True) for p in _without_sidecars(matches)]
        if not files:
            raise UserError(
                f"{option}={spec!r} matches no file. Correct the pattern (relative paths start in "
                f"{os.getcwd()})."
            )
    else:
        raise UserError(
            f"{option}={spec!r} does not exist. Give {_forms(option)} (relative paths start in "
            f"{os.getcwd()})."
        )
    files = [f for f in files if f.size]
    if not files:
        raise no_text(spec, option, notes)
    return files


def no_text(spec: str, option: str, notes: DataNotes) -> UserError:
    """For a source in which nothing was found."""
    skipped = f" (skipped: {notes.skipped(spec)})" if notes.skipped(spec) else ""
    return UserError(
        f"{option}={spec!r} holds no text{skipped}. Give a source with at least one document "
        f"that is not empty; the token files of a folder are named with a glob, as in 'DIR/*.npy'."
    )


def reason(error: Exception) -> str:
    """An error of a library in one short line."""
    return " ".join(str(error).split())[:160]


def unreadable(spec: str, option: str, path: str, error: OSError) -> UserError:
    """For a file that the system does not let us read."""
    return UserError(
        f"{option}={spec!r}: {path} cannot be read ({error.strerror or error}). Make it "
        f"readable, or give another path."
    )


def _forms(option: str) -> str:
    return FORMS if option.startswith("config.") else TEXT_FORMS  # the commands read text only


def _endings(path: str) -> tuple[str, str]:
    """The kind and the compression: "x.json.gz" -> (".json", ".gz"), "x.json" -> (".json", "")."""
    stem, last = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, "")


def _kind(path: str) -> str:
    ending, compression = _endings(path)
    kind = "refused" if ending in REFUSED else KINDS.get(ending, "text")
    return "refused" if compression and kind in ("parquet", "arrow", "tokens", "index") else kind


def _file(path: str, spec: str, option: str, explicit: bool) -> SourceFile:
    if not os.path.isfile(path):
        raise UserError(f"{option}={spec!r} is neither a file nor a folder. Give {_forms(option)}.")
    kind, (ending, compression) = _kind(path), _endings(path)
    if kind == "index":
        if not os.path.isfile(path[:-4] + ".bin"):
            raise UserError(
                f"{option}={spec!r}: {path} is the index of a token file, and {path[:-4]}.bin is "
                f"not there. Put both beside each other."
            )
        path, kind = path[:-4] + ".bin", "tokens"
    if kind == "refused" and explicit:
        what = REFUSED.get(ending) or f"a compressed {ending} file"
        packed = what.startswith(("an archive", "a compressed"))
        repair = (
            "Unpack it" if packed else 'Write its text as .jsonl, a line {"text": "..."} a document'
        )
        raise UserError(f"{option}={spec!r}: {path} is {what}. {repair}, or give {_forms(option)}.")
    try:
        size = os.stat(path).st_size
    except OSError as e:
        raise unreadable(spec, option, path, e) from None
    return SourceFile(path, kind, explicit, size, compression)


def _is_prefix(path: str) -> bool:
    """Megatron names a token file and its index by what both names begin with."""
    return (
        not os.path.exists(path) and os.path.isfile(f"{path}.bin") and os.path.isfile(f"{path}.idx")
    )


def _without_sidecars(paths: list[str]) -> list[str]:
    """Leaves out the NAME.json, NAME.offsets and NAME.idx of a token file that is among the paths."""
    tokens = {os.path.splitext(p)[0] for p in paths if _kind(p) == "tokens"}
    return [
        p
        for p in paths
        if not (
            os.path.splitext(p)[0] in tokens
            and os.path.splitext(p)[1] in (".json", ".offsets", ".idx")
        )
    ]


def _walk(
    folder: str, spec: str, option: str, skip: set[str], notes: DataNotes
) -> Iterator[SourceFile]:
    """The files with text below a folder, sorted by path, without hidden ones and what belongs to token
    files."""

    def fail(error: OSError):
        raise unreadable(spec, option, error.filename, error)

    found = []
    for here, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [d for d in folders if d not in skip and not d.startswith(".")]
        found += [os.path.join(here, n) for n in _without_sidecars(names) if not n.startswith(".")]
    # Compared by component, so that the separator's place among the characters does not matter.
    for path in sorted(found, key=lambda p: os.path.relpath(p, folder).split(os.sep)):
        if not os.path.isfile(path):
            continue
        kind, (ending, _) = _kind(path), _endings(path)
        if kind in ("tokens", "index", "refused"):
            why = {
                "tokens": "token ids: name them with a glob",
                "index": "an index without its .bin",
            }
            notes.skip(
                spec,
                path,
                os.path.getsize(path),
                why.get(kind) or REFUSED.get(ending, "compressed"),
            )
        else:
            yield _file(path, spec, option, explicit=False)
