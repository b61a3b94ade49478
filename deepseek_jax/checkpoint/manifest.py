"""The manifest of a checkpoint: name, size and CRC-32 of each of its files, written last.

STEP/manifest.json is one line of JSON with sorted keys; its key "checksum" is the CRC-32 of the same line
without that key, so that damage to the manifest is found too, in this format and every later one. CRC-32
(zlib's, which runs without the GIL) finds what disks and networks do to files; it is no protection against
somebody who changes file and manifest together, which is why everything that parses a file checks bounds as
if there were no manifest.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath

from deepseek_jax.config.options import CHECKPOINT_KINDS
from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.bounded_json import BadFile, check_name

NAME = "manifest.json"
FORMAT = 1  # raise it where an older version would misread a checkpoint
_LIMIT = 1 << 24  # bytes of a manifest: some hundred thousand files
_CHUNK = 1 << 22  # bytes read at once
_THREADS = min(8, os.cpu_count() or 1)


class NewerFormat(Exception):
    """A checkpoint of a later version of this program."""


class Manifest(NamedTuple):
    """What a checkpoint consists of.

    Attributes:
      kind: of its arrays.
      step: of the state.
      files: name inside the checkpoint -> (bytes, CRC-32 as 8 hexadecimal digits).
      about: mesh, processes, bytes of the arrays, eval_loss and what else `show` prints.
    """

    kind: str
    step: int
    files: dict[str, tuple[int, str]]
    about: dict[str, Any]

    def to_bytes(self) -> bytes:
        return _sealed(
            {
                "format": FORMAT,
                "kind": self.kind,
                "step": self.step,
                "files": self.files,
                "about": self.about,
            }
        )


def read(folder: epath.PathLike) -> Manifest | None:
    """The manifest of a checkpoint's folder, or None without one.

    Raises:
      BadFile: it is damaged, or names what no checkpoint of ours has. NewerFormat: says which.
    """
    path = epath.Path(folder) / NAME
    if not path.exists():
        return None
    raw = bounded_json.read_bytes(path, NAME, _LIMIT)
    value = bounded_json.parse(raw, NAME)
    if not isinstance(value, dict) or "checksum" not in value:
        raise BadFile(NAME, "not a manifest")
    try:
        whole = raw == _sealed({k: v for k, v in value.items() if k != "checksum"})
    except (ValueError, RecursionError, UnicodeEncodeError):
        whole = False
    if not whole:
        raise BadFile(NAME, "its own checksum is wrong")
    version = value.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BadFile(NAME, "it has no format number")
    if version > FORMAT:
        raise NewerFormat(f"has format {version}, and this version reads up to {FORMAT}")
    files, kind, step, about = (value.get(k) for k in ("files", "kind", "step", "about"))
    if (
        kind not in CHECKPOINT_KINDS
        or not isinstance(step, int)
        or not isinstance(files, dict)
        or not isinstance(about, dict)
    ):
        raise BadFile(NAME, "not a manifest of this format")
    for name, entry in files.items():
        check_name(name, NAME)
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[0], int)
            and entry[0] >= 0
            and isinstance(entry[1], str)
        ):
            raise BadFile(NAME, f"its entry of {name[:80]!r} is not a size and a checksum")
    return Manifest(kind, step, {name: (size, crc) for name, (size, crc) in files.items()}, about)


def files_of(folder: epath.PathLike) -> dict[str, int]:
    """The files below a folder and their sizes, the manifest left out.

    Raises:
      BadFile: one of them is a link, a device or another thing that is not a file.
    """
    out: dict[str, int] = {}
    folder = epath.Path(folder)
    if "://" in os.fspath(folder):
        todo = [folder]
        while todo:
            for path in todo.pop().iterdir():
                if path.is_dir():
                    todo.append(path)
                else:
                    out[path.relative_to(folder).as_posix()] = path.stat().length
    else:
        _walk(os.fspath(folder), "", out)
    out.pop(NAME, None)
    return out


def _walk(folder: str, prefix: str, out: dict[str, int]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_symlink() or not (
                entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
            ):
                raise BadFile(
                    name, "neither a file nor a folder, which a checkpoint holds nothing else than"
                )
            if entry.is_dir():
                _walk(entry.path, name + "/", out)
            else:
                out[name] = entry.stat(follow_symlinks=False).st_size


def checksums(folder: epath.PathLike, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Bytes and CRC-32 of files, read by some threads.

    Raises:
      OSError: one cannot be read.
    """
    folder, names = epath.Path(folder), list(names)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _checksum(folder / name), names)
        return dict(zip(names, sums, strict=True))


def check(
    folder: epath.PathLike,
    manifest: Manifest,
    share: int = 0,
    shares: int = 1,
    contents: bool = True,
) -> list[tuple[str, str]]:
    """What is wrong with a checkpoint's files: (file, what), sorted; [] if nothing is.

    Args:
      folder: STEP/.
      manifest: of it.
      share: read every `shares`-th file only, from this one on, by size. Sizes are always compared.
      shares: processes that read a share each.
      contents: compare checksums too.
    """
    try:
        there = files_of(folder)
    except BadFile as e:
        return [(e.file, e.what)]
    except OSError as e:
        return [("", f"cannot be read ({e.strerror or e})")]
    bad = [(name, "missing") for name in manifest.files.keys() - there.keys()]
    # What nobody named could still be read by Orbax, so nothing may be added to its part.
    bad += [
        (name, "not in the manifest")
        for name in there.keys() - manifest.files.keys()
        if name.startswith("state/")
    ]
    bad += [
        (name, f"{there[name]} bytes, was {size}")
        for name, (size, _) in manifest.files.items()
        if there.get(name, size) != size
    ]
    if not contents:
        return sorted(bad)
    damaged = {name for name, _ in bad}
    by_size = sorted(
        (n for n in manifest.files if n not in damaged), key=lambda n: (-manifest.files[n][0], n)
    )
    mine = by_size[share::shares]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        bad += [
            found
            for found in pool.map(
                lambda name: _compare(epath.Path(folder), name, manifest.files[name]), mine
            )
            if found
        ]
    return sorted(bad)


def _compare(folder: epath.Path, name: str, wanted: tuple[int, str]) -> tuple[str, str] | None:
    try:
        found = _checksum(folder / name)
    except OSError as e:
        return name, f"cannot be read ({e.strerror or e})"
    return None if found == wanted else (name, "its bytes are not those that were written")


def _checksum(path: epath.Path) -> tuple[int, str]:
    size = crc = 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb") if "://" in os.fspath(path) else open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            crc = zlib.crc32(buffer[:n], crc)
            size += n
    return size, f"{crc:08x}"


def write(folder: epath.PathLike, manifest: Manifest) -> None:
    """Writes the manifest, whole or not at all. What it names must be on disk already (`sync`)."""
    path = epath.Path(folder) / NAME
    if "://" in os.fspath(path):
        path.write_bytes(manifest.to_bytes())  # an object store shows an object when it is whole
        return
    part = os.fspath(path) + ".tmp"
    with open(part, "wb") as f:
        f.write(manifest.to_bytes())
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    sync_folder(os.path.dirname(path))


def sync(folder: epath.PathLike, names: Iterable[str]) -> None:
    """Returns when these files and their folders are on the disk. Remote ones are when they are closed."""
    if "://" in os.fspath(folder):
        return
    folders = {os.fspath(folder)}
    for name in names:
        path = os.path.join(folder, name)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        folders |= {os.path.join(folder, p) for p in pathlib.PurePosixPath(name).parents}
    for each in sorted(folders, key=len, reverse=True):
        sync_folder(each)


def sync_folder(folder: epath.PathLike) -> None:
    """Returns when the names in a local folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:  # some network file systems have no such call for folders, and need none
        pass
    finally:
        os.close(fd)


def _sealed(value: dict[str, Any]) -> bytes:
    checksum = f"{zlib.crc32(_line(value).encode()):08x}"
    return (_line(value | {"checksum": checksum}) + "\n").encode()


def _line(value: dict[str, Any]) -> str:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
