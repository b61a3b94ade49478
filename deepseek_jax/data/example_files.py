"""Tokenised examples on disk: three raw arrays that are memory-mapped, and a file that says what they hold.

    KEY.tokens   the ids, example after example: uint16, or int32 for vocabularies that need it
    KEY.scored   uint8, 1 where a token is a training target: the one before it predicts it
    KEY.offsets  int64, where examples begin, and the end
    KEY.json     the rest of an `ExampleSet`, sizes and SHA-256 of the others; written last

All little-endian. KEY is a digest of what they were made of (examples.py). Files that are damaged, cut short
or of another kind count as none.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from deepseek_jax.config.paths import temporary

FORMAT = "deepseek_jax examples 1"
ARRAYS = ("tokens", "scored", "offsets")
BLOCK = 1 << 18  # bytes that are hashed at a time
MAX_JSON = 1 << 24  # bytes


class Facts(NamedTuple):
    """What is known of the examples besides."""

    format: str = ""  # of the rows, as config.sft.format
    dropped_reasoning: int = 0  # messages whose reasoning the template left out
    prompts_differ: int = 0  # examples whose prompt by itself is not rendered as in the whole chat
    about: tuple[str, ...] = ()  # what was scored, in words
    notes: tuple[str, ...] = ()  # what was left out or changed in reading


class ExampleSet(NamedTuple):
    """Examples in the order of their files. Example i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray  # uint16 or int32 [N]
    scored: np.ndarray  # uint8 [N], 1 where a token is a training target; never an example's first
    offsets: np.ndarray  # int64 [n + 1]
    sources: (
        np.ndarray
    )  # int64 [sources + 1]: source s has examples sources[s] to sources[s + 1] - 1
    facts: Facts

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [n]."""
        return np.diff(self.offsets)


class ExampleWriter:
    """Writes examples as they come, holding none of them. A context manager.

    Everything goes to temporary names; `finish` gives the files theirs.

    Args:
      stem: the files without their endings, or None for files without a name, gone with the process.
      vocab_size: of the tokenizer; decides the dtype of the ids.

    Attributes:
      examples: written so far.

    Raises:
      OSError: the files cannot be made or written.
    """

    def __init__(self, stem: str | None, vocab_size: int):
        self.examples = 0
        self._stem = stem
        dtypes = {
            "tokens": "<u2" if vocab_size <= 1 << 16 else "<i4",
            "scored": "|u1",
            "offsets": "<i8",
        }
        self._dtypes = {name: np.dtype(d) for name, d in dtypes.items()}
        self._temp = {name: temporary(f"{stem}.{name}") for name in (*ARRAYS, "json") if stem}
        self._files: dict[str, IO[bytes]] = {}
        self._hashes = {name: hashlib.sha256() for name in ARRAYS}
        self._sizes = dict.fromkeys(ARRAYS, 0)
        self._sources = [0]
        self._tokens = 0

    def __enter__(self) -> "ExampleWriter":
        try:
            for name in ARRAYS:
                if self._stem is None:
                    self._files[name] = tempfile.TemporaryFile()
                else:
                    self._files[name] = open(self._temp[name], "x+b")
            self._append("offsets", np.zeros(1))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # on a full disk closing fails too
                file.close()
        for path in self._temp.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def write(self, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Appends examples: (ids [n], scored [n]) of each."""
        if not examples:
            return
        scored = [np.array(s, np.uint8) for _, s in examples]
        for one in scored:
            one[:1] = 0  # nothing stands before it that could predict it
        ends = self._tokens + np.cumsum([len(ids) for ids, _ in examples])
        self._append("tokens", np.concatenate([ids for ids, _ in examples]))
        self._append("scored", np.concatenate(scored))
        self._append("offsets", ends)
        self.examples += len(examples)
        self._tokens = int(ends[-1])

    def end_source(self) -> None:
        """The examples that follow are of the next source."""
        self._sources.append(self.examples)

    def finish(self, facts: Facts) -> ExampleSet:
        """All that was written, memory-mapped. Named files appear, the one that vouches for them last."""
        head = {
            "format": FORMAT,
            "key": os.path.basename(self._stem or ""),
            "dtypes": {name: dtype.str for name, dtype in self._dtypes.items()},
            "sizes": self._sizes,
            "sha256": {name: h.hexdigest() for name, h in self._hashes.items()},
            "sources": self._sources,
            "facts": facts._asdict(),
        }
        for file in self._files.values():
            file.flush()
        arrays = [_map(self._files[n], self._dtypes[n], self._sizes[n]) for n in ARRAYS]
        if self._stem is not None:
            with open(self._temp["json"], "x", encoding="utf-8") as out:
                json.dump(head, out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            for name in ARRAYS:
                os.fsync(self._files[name].fileno())
            for name in (*ARRAYS, "json"):
                os.replace(self._temp[name], f"{self._stem}.{name}")
        return _set_of(arrays, head)

    def _append(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, self._dtypes[name]).tobytes()
        self._files[name].write(data)
        self._hashes[name].update(data)
        self._sizes[name] += len(data)


def open_kept(stem: str) -> ExampleSet | None:
    """What an `ExampleWriter` wrote under a name; None if there is nothing, or it is not whole."""
    try:
        with open(f"{stem}.json", encoding="utf-8") as file:
            head = json.loads(file.read(MAX_JSON))
        if head["format"] != FORMAT or head["key"] != os.path.basename(stem):
            return None
        if head["dtypes"]["tokens"] not in ("<u2", "<i4"):
            return None
        dtypes = {"tokens": head["dtypes"]["tokens"], "scored": "|u1", "offsets": "<i8"}
        arrays = []
        for name in ARRAYS:
            with open(f"{stem}.{name}", "rb") as f:
                size = os.fstat(f.fileno()).st_size
                if size != head["sizes"][name] or _sha256(f) != head["sha256"][name]:
                    return None
                arrays.append(_map(f, np.dtype(dtypes[name]), size))
        found = _set_of(arrays, head)
        return found if _fits(found) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@contextlib.contextmanager
def only_one(stem: str) -> Iterator[None]:
    """Lets one process of a host at a time make the files of a name: the others then find them."""
    with contextlib.ExitStack() as held:
        # where there are no locks each makes them, and they are the same
        with contextlib.suppress(OSError):
            file = held.enter_context(open(f"{stem}.lock", "a+b"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_of(path: str) -> str:
    """Of a file's bytes.

    Raises:
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return _sha256(file)


def _sha256(file: IO[bytes]) -> str:
    out = hashlib.sha256()
    while block := file.read(BLOCK):
        out.update(block)
    return out.hexdigest()


def _map(file: IO[bytes], dtype: np.dtype, size: int) -> np.ndarray:
    if not size:
        return np.zeros(0, dtype)
    # a plain view: np.memmap's own operations cost more
    return np.asarray(np.memmap(file, dtype, "r", shape=(size // dtype.itemsize,)))


def _set_of(arrays: Sequence[np.ndarray], head: dict[str, Any]) -> ExampleSet:
    known = dict(head["facts"])
    about, notes = (tuple(map(str, known.pop(name))) for name in ("about", "notes"))
    facts = Facts(**known, about=about, notes=notes)
    tokens, scored, offsets = arrays
    return ExampleSet(tokens, scored, offsets, np.array(head["sources"], np.int64), facts)


def _fits(found: ExampleSet) -> bool:
    """Whether the arrays belong together."""

    def covers(edges: np.ndarray, count: int) -> bool:
        ends = len(edges) > 0 and edges[0] == 0 and edges[-1] == count
        return bool(ends and (np.diff(edges) >= 0).all())

    same = len(found.tokens) == len(found.scored)
    whole = covers(found.offsets, len(found.tokens))
    return same and whole and covers(found.sources, len(found.offsets) - 1)
