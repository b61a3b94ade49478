"""Which checkpoint is read: the newest, of any kind, whose files are what was written."""

import json
import os
import secrets
from collections.abc import Callable
from typing import NamedTuple

import jax
from etils import epath

from deepseek_jax.checkpoint import integrity, local, manifest
from deepseek_jax.checkpoint.folder import DAMAGED, Folder, steps_in
from deepseek_jax.cluster.exchange import exchange, from_first
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile.arrays import Tree
from deepseek_jax.tensorfile.bounded_json import BadFile

RUN_ID = "run_id"  # file beside the checkpoints of a run that also has local ones


class Found(NamedTuple):
    """A checkpoint that may be read."""

    step: int
    local: bool
    # One folder STEP/; of kind local, those of the processes that are needed and seen from here.
    paths: tuple[epath.Path, ...]

    @property
    def path(self) -> epath.Path:
        return self.paths[0]


def has_steps(folder: str, local_dir: str = "") -> bool:
    """Whether a run has saved a checkpoint, as far as this host sees.

    Args:
      folder: its folder of checkpoints, here or remote; it need not exist.
      local_dir: config.checkpoint.local_dir, for those of kind `local`.
    """
    if steps_in(folder):
        return True
    name = os.path.join(folder, RUN_ID)
    if not local_dir or "://" in folder or not os.path.exists(name):
        return False
    with open(name, encoding="utf-8") as f:
        run = os.path.basename(f.read().strip())
    return bool(LocalRun(local_dir, run, read_only=True).steps())


class LocalRun:
    """The folders LOCAL_DIR/RUN/process_00003 of one run, as far as this process sees them."""

    def __init__(self, local_dir: str, run: str, read_only: bool):
        """Raises UserError: the folder cannot be written."""
        self._root = epath.Path(os.path.abspath(local_dir)) / run
        self.own = (
            None
            if read_only
            else Folder(os.fspath(self._root / f"process_{jax.process_index():05d}"), read_only)
        )

    def paths(self, step: int, wanted: Tree | None) -> tuple[epath.Path, ...]:
        """The folders STEP/ to read: this process's own, if enough, or all; () if pieces are missing."""
        if self.own is not None and step in self.own.steps():
            mine = self.own.at(step)
            try:
                found = manifest.read(mine)
                if found is None:
                    return (mine,)  # its check will say that the manifest is missing
                alone = jax.process_count() == 1
                if found.about.get("processes") == jax.process_count() and (
                    alone or wanted is None or local.covers(mine / "state", wanted)
                ):
                    return (mine,)
            except (BadFile, manifest.NewerFormat):
                return (mine,)  # its check will say what is wrong
        seen = {p.name: p / str(step) for p in self._processes() if (p / str(step)).is_dir()}
        try:
            read = [manifest.read(p) for p in seen.values()]
        except (BadFile, manifest.NewerFormat):
            return tuple(seen.values())
        if None in read:
            return tuple(seen.values())
        count = read[0].about.get("processes") if read and read[0] else None
        if type(count) is not int or set(seen) != {
            f"process_{i:05d}" for i in range(min(count, 10**5))
        }:
            return ()
        return tuple(seen[name] for name in sorted(seen))

    def steps(self) -> list[int]:
        """Those that some process has, as seen from here."""
        return sorted(
            {s for p in self._processes() for s in Folder(os.fspath(p), read_only=True).steps()}
        )

    def damaged(self) -> list[str]:
        return [
            f"{p.name}/{name}"
            for p in self._processes()
            for name in Folder(os.fspath(p), read_only=True).damaged()
        ]

    def _processes(self) -> list[epath.Path]:
        try:
            return sorted(p for p in self._root.iterdir() if p.name.startswith("process_"))
        except OSError:
            return []


class Finder:
    """Looks for checkpoints in the folder that all processes share and in their local ones."""

    def __init__(
        self, shared: Folder, local_dir: str, read_only: bool, warn: Callable[[str], None]
    ):
        self.shared = shared
        self._read_only = read_only
        self._warn = warn
        self.local: LocalRun | None = None
        if local_dir and (run := self._run(read_only)):
            self.local = LocalRun(local_dir, run, read_only)
        self._sound: set[str] = set()  # folders that were checked and are as they were
        self.found: Found | None = None  # the newest good one

    def forget(self) -> None:
        """Looks afresh the next time."""
        self._sound = set()
        self.found = None

    def _run(self, read_only: bool) -> str:
        """The name of this run among those with the same local_dir.

        A new run in an old place must not find the checkpoints of the run before it.
        """
        path = self.shared.path / RUN_ID
        try:
            if jax.process_index() == 0 and not read_only and not path.exists():
                path.write_text(secrets.token_hex(8))
            name = path.read_text() if jax.process_index() == 0 and path.exists() else ""
        except OSError as e:
            raise UserError(
                f"{path} cannot be read or written ({e.strerror or e}). Name a --workdir that you may write "
                f"to."
            ) from e
        name = from_first("run", name)
        if name and not (name.isascii() and name.isalnum() and len(name) <= 64):
            raise UserError(
                f"{path} is damaged: it names no run. Delete it; local checkpoints of this run will not be "
                f"found."
            )
        return name

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, as seen from this process."""
        return sorted({*self.shared.steps(), *(self.local.steps() if self.local else [])})

    def newest(self, wanted: Tree | None) -> Found | None:
        """The newest good checkpoint, or None if there is none at all. Damaged ones are put aside on the way.

        Raises:
          UserError: all there are are damaged, or one is of a later version.
        """
        if self.found is None:
            candidates = self._candidates(wanted)
            for candidate in candidates:
                if self._is_sound(candidate):
                    self.found = candidate
                    return candidate
            aside = self.shared.damaged() + (self.local.damaged() if self.local else [])
            if aside := aside or [str(c.step) for c in candidates]:
                raise UserError(
                    f"{self.shared.path} holds damaged checkpoints only ({', '.join(aside)[:200]}). Put a "
                    f"good copy in the place of one, or delete them to begin at step 0."
                )
        return self.found

    def at(self, step: int, wanted: Tree | None) -> Found:
        """The checkpoint of a step, checked.

        Raises:
          UserError: there is none, or it is damaged.
        """
        here = [c for c in self._candidates(wanted, step) if c.step == step]
        if not here:
            steps = self.steps()
            known = (
                f"Name one of these steps: {', '.join(map(str, steps))}."
                if steps
                else "Name the --workdir of a run that saved one."
            )
            raise UserError(f"{self.shared.path} holds no checkpoint of step {step}. {known}")
        why = ""
        for candidate in here:
            verdict = self._inspect(candidate)
            if verdict is None or not verdict.bad:
                return candidate
            why = verdict.line()
        raise UserError(
            f"The checkpoint {here[-1].path} is damaged ({why}). Name another step, or none for "
            f"the newest that is whole."
        )

    def put_aside(self, bad: Found, mine: bool = True) -> str:
        """Renames a checkpoint, so that it no longer counts.

        Args:
          bad: the checkpoint.
          mine: whether this process's part of a local one is bad.

        Returns:
          Its new name.
        """
        self.found = None
        self._sound -= {os.fspath(p) for p in bad.paths}
        name = f"{bad.step}{DAMAGED}"
        if bad.local:
            own = self.local.own if self.local else None
            if mine and own and bad.step in own.steps():
                name = own.put_aside(bad.step)
        elif jax.process_index() == 0:
            name = self.shared.put_aside(bad.step)
        exchange("aside", "")
        return name

    def _candidates(self, wanted: Tree | None, only: int | None = None) -> list[Found]:
        """Newest first; of the same step the local one, which is nearer.

        The same in every process, but for the paths of local ones.
        """
        shared = json.loads(from_first("steps", json.dumps(self.shared.steps())))
        out = [Found(s, False, (self.shared.at(s),)) for s in shared]
        if self.local:
            mine = {
                s: paths
                for s in self.local.steps()
                if only in (None, s) and (paths := self.local.paths(s, wanted))
            }
            everybodys = [
                set(json.loads(text)) for text in exchange("local", json.dumps(sorted(mine)))
            ]
            out += [Found(s, True, mine[s]) for s in set.intersection(*everybodys)]
        return sorted(out, key=lambda c: (-c.step, not c.local))

    def _inspect(self, found: Found) -> integrity.Verdict | None:
        """None: it was checked before, and nothing was saved since."""
        if self._sound.issuperset(os.fspath(p) for p in found.paths):
            return None
        verdict = integrity.inspect_together(found.paths, shared=not found.local)
        if verdict.newer:
            raise UserError(
                f"The checkpoint {found.path} {verdict.newer}. Update this program, or name another "
                f"--workdir or step."
            )
        if not verdict.bad:
            self._sound |= {os.fspath(p) for p in found.paths}
            if not verdict.protected:
                self._warn(
                    f"the checkpoint {found.path} was written by an earlier version, without checksums: "
                    f"damage to its files may go unseen"
                )
        return verdict

    def _is_sound(self, found: Found) -> bool:
        verdict = self._inspect(found)
        if verdict is None or not verdict.bad:
            return True
        if not self._read_only:
            name = self.put_aside(found, mine=verdict.mine)
            self._warn(
                f"the checkpoint {found.path} is damaged ({verdict.line()}): kept aside as {name}"
            )
        elif found.path.exists():  # else the run that goes on here has just deleted it
            self._warn(f"the checkpoint {found.path} is damaged ({verdict.line()}): passed over")
        return False
