"""One save: the state to files, checksums, manifest, name; then the checkpoints that it replaces go."""

import datetime
import json
import math
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.checkpoint import integrity, kinds, manifest
from deepseek_jax.checkpoint.folder import Folder, keepers
from deepseek_jax.checkpoint.kind import Kind
from deepseek_jax.checkpoint.manifest import Manifest
from deepseek_jax.cluster.exchange import exchange
from deepseek_jax.config.options import CheckpointConfig
from deepseek_jax.errors import one_line
from deepseek_jax.tensorfile.arrays import Tree, bytes_of, mesh_of


class Failed(Exception):
    """Some process could not do its part: which, and why."""


class Save:
    """A save by all processes: `prepare` while the state is there, `complete` in a thread. Neither raises.

    Attributes:
      error: why there is no checkpoint of this step; None while it is written and when it is on disk.
      report: a line for the user, or None.
    """

    def __init__(
        self,
        folder: Folder,
        options: CheckpointConfig,
        step: int,
        state: Tree,
        extra: dict[str, Any],
        eval_loss: float | None,
    ):
        self._folder = folder
        self._options = options
        self._step = step
        self._extra = extra
        self._state: Tree | None = state
        self._kind: Kind = kinds.KINDS[options.kind]
        # This process finishes a checkpoint: one that all write together, or its own.
        self._chief = jax.process_index() == 0 or self._kind.each_process
        self._about: dict[str, Any] = {
            "bytes": bytes_of(state),
            "mesh": [[axis, n] for axis, n in mesh_of(state).items()],
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "jax": jax.__version__,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        if eval_loss is not None and math.isfinite(eval_loss):
            self._about["eval_loss"] = float(eval_loss)
        self._finish: Callable[[], None] | None = None
        self.error: str | None = None
        self.report: str | None = None

    def prepare(self) -> None:
        """Copies the state to the host, or writes it at once: what the arrays are needed for."""
        try:
            self._together(lambda: self._begin() if self._chief else None)
            self._together(self._start)
        except Exception as e:
            self._fail(e)
        self._state = None

    def complete(self) -> None:
        """Waits for the files, writes the manifest and gives the checkpoint its name."""
        if self.error is not None:
            return
        draft = self._folder.draft(self._step)
        try:
            finish, self._finish = self._finish, None
            self._together(lambda: finish() if finish else None)
            self._together(lambda: self._merge_parts(draft) if self._chief else None)
            files = self._together(lambda: self._sums(draft), everybodys=True)
            self._together(lambda: self._commit(draft, files) if self._chief else None)
        except Exception as e:
            self._fail(e)
            return
        try:
            self._retire()
        except OSError as e:
            self.report = (
                f"old checkpoints in {self._folder.path} cannot be deleted ({e.strerror or e}): "
                f"they stay for now"
            )

    def _start(self) -> None:
        assert self._state is not None
        self._finish = self._kind.start(self._folder.draft(self._step) / "state", self._state)

    def _begin(self) -> None:
        # Parts of later steps, which other processes lack: this run has begun before them again.
        if self._kind.each_process:
            for step in self._folder.steps():
                if step >= self._step:
                    self._folder.delete(step)
        self._folder.begin(self._step)

    def _merge_parts(self, draft) -> None:
        self._kind.merge(draft / "state")
        integrity.write_extra(draft, self._extra)

    def _sums(self, draft) -> dict[str, tuple[int, str]]:
        own = [name for name in manifest.files_of(draft) if self._is_own(name)]
        sums = manifest.checksums(draft, own)
        manifest.sync(draft, own)
        return sums

    def _is_own(self, name: str) -> bool:
        if self._kind.each_process:
            return True
        if name.startswith("state/"):
            return self._kind.is_own(name.removeprefix("state/"))
        return self._chief

    def _commit(self, draft, everybodys: list[dict[str, tuple[int, str]]]) -> None:
        files = (
            everybodys[jax.process_index()]
            if self._kind.each_process
            else {n: s for files in everybodys for n, s in files.items()}
        )
        manifest.write(draft, Manifest(self._options.kind, self._step, files, self._about))
        self._folder.commit(self._step)

    def _retire(self) -> None:
        """Deletes the checkpoints that nothing keeps, now that the new one is durable."""
        o = self._options
        if not o.keep or not self._chief:
            return
        steps = self._folder.steps()
        losses = {s: loss for s in steps if o.keep_best and (loss := self._loss(s)) is not None}
        for step in sorted(set(steps) - keepers(steps, losses, o.keep, o.keep_best, o.keep_every)):
            self._folder.delete(step)

    def _loss(self, step: int) -> float | None:
        try:
            found = manifest.read(self._folder.at(step))
        except (manifest.BadFile, manifest.NewerFormat):
            return None
        loss = found.about.get("eval_loss") if found else None
        return loss if isinstance(loss, float) else None

    def _together(self, part: Callable[[], Any], everybodys: bool = False) -> Any:
        """Does this process's part of a step, and returns when all have done theirs.

        Args:
          part: what this process does.
          everybodys: return what the parts of all processes returned, and not this one's.

        Raises:
          Failed: one could not.
        """
        out, error = None, ""
        try:
            out = part()
        except Exception as e:
            error = _reason(e)
        if jax.process_count() == 1:
            said = [{"error": error, "out": out}]
        else:
            mine = json.dumps({"error": error, "out": out if everybodys else None})
            said = [json.loads(text) for text in exchange("save", mine)]
        wrong = [(i, s["error"]) for i, s in enumerate(said) if s["error"]]
        if wrong:
            process, what = wrong[0]
            raise Failed(what if len(said) == 1 else f"process {process}: {what}")
        return [s["out"] for s in said] if everybodys else out

    def _fail(self, error: Exception) -> None:
        self.error = str(error) if isinstance(error, Failed) else _reason(error)
        try:
            if self._finish:
                self._finish()  # this process may still be writing where another failed to begin
        except Exception as e:
            self.error += f"; then {_reason(e)}"
        if self._chief:
            try:
                self._folder.discard(self._step)
                # This process had its part on disk, another had not.
                if self._kind.each_process and self._step in self._folder.steps():
                    self._folder.delete(self._step)
            except OSError:
                pass  # the next save begins with it
        try:
            before = max(self._folder.steps(), default=None)
        except OSError:
            before = None
        stays = f"that of step {before} stays" if before is not None else "there is none before it"
        self.report = (
            f"no checkpoint of step {self._step}: {self.error}; {stays}, "
            f"training goes on and tries again"
        )


def _reason(error: Exception) -> str:
    """One line. TensorStore's would be long, with the path of every file."""
    full = "No space left on device"
    return full if full in str(error) and not isinstance(error, OSError) else one_line(error)
