"""Whether a checkpoint is what was written: all processes find out together, each by a share of the files."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.manifest import Manifest, NewerFormat
from deepseek_jax.cluster.exchange import exchange
from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.bounded_json import BadFile

EXTRA = "extra/metadata"
# A key in `extra` of every checkpoint that was written with a manifest: one with this key and without a
# manifest has lost it.
MARK = "__manifest__"
_LIMIT = 1 << 24  # bytes of `extra`


class Verdict(NamedTuple):
    """What the check of one checkpoint found."""

    manifest: Manifest | None  # None: of an earlier version, without one, or damaged itself
    bad: list[tuple[str, str]]  # (file, what is wrong with it)
    newer: str = ""  # why a later version's checkpoint cannot be read
    mine: bool = True  # did this process find some of it?

    @property
    def protected(self) -> bool:
        return self.manifest is not None

    def line(self) -> str:
        """The first bad file, and how many there are."""
        file, what = self.bad[0]
        more = f", and {len(self.bad) - 1} more" if len(self.bad) > 1 else ""
        return f"{file}: {what}{more}" if file else f"{what}{more}"


def inspect(
    folder: epath.PathLike, share: int = 0, shares: int = 1, contents: bool = True
) -> Verdict:
    """Checks one folder STEP/.

    Args:
      folder: STEP/.
      share, shares: as `manifest.check`.
      contents: also read all bytes; without, names and sizes are compared.
    """
    try:
        found = manifest.read(folder)
        if found is None:
            _check_unprotected(folder)
            return Verdict(None, [])
        step = epath.Path(folder).name.partition(".")[0]
        if step.isdigit() and int(step) != found.step:
            return Verdict(None, [(manifest.NAME, f"it is of step {found.step}")])
    except BadFile as e:
        return Verdict(None, [(e.file, e.what)])
    except NewerFormat as e:
        return Verdict(None, [], str(e))
    except OSError as e:
        return Verdict(None, [("", f"cannot be read ({e.strerror or e})")])
    return Verdict(found, manifest.check(folder, found, share, shares, contents))


def inspect_together(folders: Sequence[epath.PathLike], shared: bool) -> Verdict:
    """`inspect` by all processes, with one result.

    Args:
      folders: STEP/, or of kind `local` those that this process reads.
      shared: all see the same folder; otherwise each has its own, and any bad one counts.
    """
    me, count = jax.process_index(), jax.process_count()
    found = [inspect(folder, me, count) if shared else inspect(folder) for folder in folders]
    owner = "" if shared or count == 1 else f" (process {me})"
    bad = [(file, what + owner) for verdict in found for file, what in verdict.bad]
    verdict = Verdict(
        found[0].manifest, bad, next((v.newer for v in found if v.newer), ""), bool(bad)
    )
    if count == 1:
        return verdict
    everybodys = [
        json.loads(text)
        for text in exchange("verify", json.dumps({"bad": bad, "newer": verdict.newer}))
    ]
    all_bad = sorted({(file, what) for v in everybodys for file, what in v["bad"]})
    return verdict._replace(
        bad=all_bad, newer=next((v["newer"] for v in everybodys if v["newer"]), "")
    )


def read_extra(folder: epath.PathLike) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
      BadFile: it is missing or damaged.
    """
    value = bounded_json.read(epath.Path(folder) / EXTRA, EXTRA, _LIMIT)
    if not isinstance(value, dict):
        raise BadFile(EXTRA, "not a JSON object")
    return value


def write_extra(folder: epath.PathLike, extra: dict[str, Any]) -> None:
    """The inverse of `read_extra`."""
    path = epath.Path(folder) / EXTRA
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps({**extra, MARK: manifest.FORMAT}).encode())


def _check_unprotected(folder: epath.PathLike) -> None:
    """What an earlier version wrote has Orbax's files and no mark; anything else has lost its manifest."""
    if MARK in read_extra(folder) or not (epath.Path(folder) / "state" / "_METADATA").exists():
        raise BadFile(manifest.NAME, "missing")
    manifest.files_of(folder)  # no links
