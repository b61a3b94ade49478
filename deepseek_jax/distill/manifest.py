"""What a cached teacher is, and what it is of: manifest.json in its folder, written before the first shard.

manifest.json is one line of JSON with sorted keys; its key "checksum" is the SHA-256 of the same line without
that key. It says of which rows, teacher and program the records are, so that others are refused, and so
fixes every byte of every shard (shards.py), whoever makes it.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint.manifest import sync_folder
from deepseek_jax.config.paths import temporary
from deepseek_jax.data.contents import Contents
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.bounded_json import BadFile

NAME = "manifest.json"
FORMAT = 1  # raise it where an older version would misread a cache
LIMIT = 1 << 24  # bytes of a manifest
SHORT_IDS = 1 << 16  # words that 2 bytes tell apart


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A cache.

    Attributes:
      top: K, words of a record.
      temperatures: whose log-sum-exp a record has, in their order.
      vocab_size: of the teacher.
      teacher: its identity. dtype: its weights', and that it computes in.
      program: of what shape a forward pass is, and where: rows_per_call, mesh, platform.
      options: of the run, by name, which make other rows; `train.sequence_length` among them.
      contents: of the data (data/contents.py), without the mixture, which only orders rows.
      train_rows, eval_rows: how many rows there are. Records are of the first ones, then of the second.
      rows_per_shard: of every shard but the last.
      command: that makes it. Two manifests that differ in nothing else are of the same cache.
    """

    top: int
    temperatures: tuple[float, ...]
    vocab_size: int
    teacher: str
    dtype: str
    program: Mapping[str, Any]
    options: Mapping[str, Any]
    contents: Contents
    train_rows: int
    eval_rows: int
    rows_per_shard: int
    command: str = ""

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return int(self.options["train.sequence_length"])

    @property
    def rows(self) -> int:
        return self.train_rows + self.eval_rows

    @property
    def id_bytes(self) -> int:
        return 2 if self.vocab_size <= SHORT_IDS else 3

    @property
    def token_bytes(self) -> int:
        """Of a record: ids, float16 values, float32 log-sum-exps."""
        return self.top * (self.id_bytes + 2) + 4 * len(self.temperatures)

    @property
    def row_bytes(self) -> int:
        return self.length * self.token_bytes

    @property
    def total_bytes(self) -> int:
        """Of all shards."""
        return self.rows * self.row_bytes

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """The records that are in a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def to_bytes(self) -> bytes:
        return _sealed(dataclasses.asdict(self) | {"format": FORMAT})

    def difference(self, other: "Manifest") -> str:
        """The first thing in which another cache differs from this one, in words; "" if none does."""
        before, now = (_flat(json.loads(_line(dataclasses.asdict(m)))) for m in (self, other))
        for name in before.keys() | now.keys():
            if name != "command" and before.get(name) != now.get(name):
                return f"{name}={_short(now.get(name))} differs from {_short(before.get(name))}"
        return ""


def write(folder: str, manifest: Manifest) -> Manifest:
    """Makes the folder a cache, or finds that it is one already, of others' making.

    Returns:
      The manifest that the folder has now.

    Raises:
      UserError: it is another cache's, or holds something else, or cannot be written.
    """
    path = os.path.join(folder, NAME)
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.path.lexists(path):
            # Once killed here a temporary file stays, and nothing else: it is no file of a cache.
            if others := [n for n in os.listdir(folder) if not n.startswith(f"{NAME}.tmp")]:
                raise UserError(
                    f"--out={folder} holds {others[0]!r} and is no cache. Name a folder that does not exist."
                )
            _create(path, manifest.to_bytes())
    except OSError as e:
        raise UserError(
            f"--out={folder} cannot be written ({e.strerror}). Name a folder that you may write to."
        ) from e
    return read(folder, "--out")


def _create(path: str, raw: bytes) -> None:
    """Makes a file, whole or not at all, where there is none; another's stays."""
    part = temporary(path)
    try:
        with open(part, "xb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
    sync_folder(os.path.dirname(path))


def read(folder: str, option: str) -> Manifest:
    """The manifest of a cache.

    Args:
      option: that names the folder, for messages.

    Raises:
      UserError: it is no cache, or its manifest is damaged or of a later version.
    """
    if not os.path.lexists(os.path.join(folder, NAME)):
        raise UserError(
            f"{option}={folder} has no {NAME} of a cached teacher. Name a folder that `python -m "
            "deepseek_jax.distill cache` has made."
        )
    try:
        return parse(bounded_json.read_bytes(os.path.join(folder, NAME), NAME, LIMIT))
    except BadFile as e:
        raise UserError(
            f"{option}={folder}: {e.file} is damaged ({e.what}). Make the cache again, in another folder."
        ) from e


def parse(raw: bytes) -> Manifest:
    """What `to_bytes` made.

    Raises:
      BadFile: it did not.
    """
    value = bounded_json.parse(raw, NAME)
    if not isinstance(value, dict) or "checksum" not in value:
        raise BadFile(NAME, "not a manifest")
    if raw != _sealed({k: v for k, v in value.items() if k != "checksum"}):
        raise BadFile(NAME, "its own checksum is wrong")
    if value.get("format") != FORMAT:
        raise BadFile(NAME, f"it has format {value.get('format')}, and this version reads {FORMAT}")
    names = {f.name for f in dataclasses.fields(Manifest)}
    if value.keys() != names | {"checksum", "format"}:
        raise BadFile(NAME, "not a manifest of this format")
    if not _has_types(value):
        raise BadFile(NAME, "a value is of another type than a cache has")
    out = Manifest(
        **{k: v for k, v in value.items() if k in names}
        | {"temperatures": tuple(value["temperatures"])}
    )
    counts = (out.top, out.vocab_size, out.length, out.rows_per_shard, len(out.temperatures))
    if min(counts) < 1 or out.train_rows < 0 or out.eval_rows < 0 or out.top > out.vocab_size:
        raise BadFile(NAME, "its sizes are none of a cache")
    return out


def _has_types(value: Mapping[str, Any]) -> bool:
    """Whether the values that are read have the types that `to_bytes` gives them."""
    counts = ("top", "vocab_size", "train_rows", "eval_rows", "rows_per_shard")
    program, options, contents = (value[k] for k in ("program", "options", "contents"))
    if not all(isinstance(v, dict) for v in (program, options, contents)):
        return False
    whole = (*(value[k] for k in counts), options.get("train.sequence_length"))
    texts = (value["teacher"], value["dtype"], value["command"], contents.get("tokenizer"))
    mesh, scales = program.get("mesh"), value["temperatures"]
    return (
        all(type(v) is int for v in whole)
        and all(isinstance(v, str) for v in texts)
        and isinstance(contents.get("sources"), list)
        and isinstance(mesh, dict)
        and all(type(n) is int for n in mesh.values())
        and {"rows_per_call", "platform"} <= program.keys()
        and isinstance(scales, list)
        and all(isinstance(t, (int, float)) and 0 < t < math.inf for t in scales)
    )


def _sealed(value: dict[str, Any]) -> bytes:
    checksum = hashlib.sha256(_line(value).encode()).hexdigest()
    return (_line(value | {"checksum": checksum}) + "\n").encode()


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Values by their path: {"options.seed": 0}."""
    if not isinstance(value, dict):
        return {name: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{name}.{key}" if name else key)
    return out


def _short(value: Any) -> str:
    text = _line(value)
    return text if len(text) <= 80 else text[:77] + "..."
