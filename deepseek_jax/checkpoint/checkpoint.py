"""Saves and restores the training state: nothing that counts is torn, nothing torn is restored in silence.

WORKDIR/checkpoints/STEP/ holds `state`, the arrays in one of three kinds, `extra`, a JSON object, and
`manifest.json`, the names, sizes and checksums of all files, written last. A folder with a plain number for a
name is whole: it was written under another name (folder.py). A checkpoint of kind `local` is one such folder
for each process, in `checkpoint.local_dir`, and counts where every process has its own.

Plain Orbax restores the kinds `sharded` and `full`; sharded.py and full.py say how.
"""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.checkpoint import integrity, kinds, manifest
from deepseek_jax.checkpoint.finder import Finder, Found
from deepseek_jax.checkpoint.folder import Folder
from deepseek_jax.checkpoint.kind import TensorReader
from deepseek_jax.checkpoint.saver import Save
from deepseek_jax.cluster.exchange import exchange, from_first
from deepseek_jax.config.options import CheckpointConfig
from deepseek_jax.errors import SaveFailed, UserError, one_line
from deepseek_jax.tensorfile.arrays import Tree, flatten, spec_of

FINAL_TRIES = 5  # of the last save; 2, 4, 8 and 16 s between them
RETRY_SECONDS = (
    60.0  # after which a failed save is tried again, if that is before the next interval
)


def _quiet(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname  # its errors are raised, too


def _say(text: str) -> None:
    print(f"checkpoint: {text}", file=sys.stderr, flush=True)


class Checkpointer:
    """The checkpoints of one run. Every method is called by all processes of a job, at the same step."""

    def __init__(
        self,
        directory: str,
        read_only: bool = False,
        options: CheckpointConfig | None = None,
        warn: Callable[[str], None] = _say,
    ):
        """Opens the folder, and creates it unless `read_only`.

        Args:
          directory: WORKDIR/checkpoints, or a remote folder (gs://..., s3://...).
          read_only: neither write, rename nor create anything: for readers of a run that may be going on.
          options: config.checkpoint; without, of the default kind, and all stay.
          warn: is told, in process 0, in one line, what went wrong and what follows.

        Raises:
          UserError: the folder cannot be created, read or, unless `read_only`, written.
        """
        # Orbax speaks through absl's logger, at length and from the start.
        logging.getLogger("absl").addFilter(_quiet)
        warnings.filterwarnings("ignore", module=r"orbax\..*")
        self.options = options or CheckpointConfig(keep=0)
        self._warn = warn if jax.process_index() == 0 else lambda text: None
        self._finder = Finder(
            Folder(directory, read_only), self.options.local_dir, read_only, self._warn
        )
        self._own = self._finder.local.own if self._finder.local else None  # of kind local
        self._target = self._finder.shared
        if self.options.kind == "local" and self._own:
            self._target = self._own
        self._read_only = read_only
        self._cleaned = read_only
        self._wanted: Tree | None = None  # what the arrays are restored into, once that is known
        self._thread: threading.Thread | None = None
        self._last: Save | None = None  # the save that is going on, or was last
        self._saved_at = time.monotonic()

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None. Its files are not looked at: `newest_good` does that."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> str:
        """Where this run saves the checkpoint of a step; of a local one, this process's part."""
        return str(self._target.at(step))

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, in order."""
        return self._finder.steps()

    def due(self, step: int, every_steps: int, every_minutes: float = 0.0) -> bool:
        """Whether a checkpoint is due after this step, the same in every process.

        Also says what went wrong with the last one.

        Args:
          step: of the state.
          every_steps: from one checkpoint to the next; 0: none by steps.
          every_minutes: since the last one; 0: none by time.
        """
        self._flush()
        by_steps = bool(every_steps) and step % every_steps == 0
        if jax.process_count() > 1 and not every_minutes:
            return by_steps
        waited = time.monotonic() - self._saved_at
        failed = self._last is not None and self._last.error is not None and waited >= RETRY_SECONDS
        by_time = bool(every_minutes) and waited >= 60 * every_minutes
        return by_steps or from_first("due", str(by_time or failed)) == "True"

    def save(
        self,
        step: int,
        state: Tree,
        extra: dict[str, Any],
        eval_loss: float | None = None,
        final: bool = False,
    ) -> None:
        """Copies the state to the host and returns (`async_checkpointing`); a thread writes it.

        The arrays may be donated at once. Waits for the save before. What fails is said in one line, and the
        checkpoints before stay; the caller goes on.

        Args:
          step: the folder's name, above all steps saved before.
          state: sharded jax.Arrays.
          extra: anything that `json` can write.
          eval_loss: the held-out loss of this state, for `keep_best`.
          final: return when it is on disk; try again if it fails.

        Raises:
          ValueError: there is a checkpoint of this step already.
          SaveFailed: a final one failed every time.
        """
        self.wait()
        if self._target is self._finder.shared and step in self._target.steps():
            raise ValueError(f"A checkpoint of step {step} already exists in {self._target.path}.")
        self._finder.forget()
        if not self._cleaned:
            self._cleaned = True
            if jax.process_index() == 0:
                self._finder.shared.clean()
            if self._own:
                self._own.clean()
        for attempt in range(FINAL_TRIES if final else 1):
            if attempt:
                time.sleep(2.0**attempt)
            self._saved_at = time.monotonic()
            save = Save(self._target, self.options, step, state, extra, eval_loss)
            self._last = save
            save.prepare()
            self._thread = threading.Thread(target=save.complete, name="checkpoint")
            self._thread.start()
            if not final and self.options.async_checkpointing:
                return
            self.wait()
            if save.error is None or not final:
                return
        before = max(self.steps(), default=None)
        stays = (
            f"Step {before} is the last that is saved" if before is not None else "Nothing is saved"
        )
        raise SaveFailed(
            f"The checkpoint of step {step}, the last, could not be written in {FINAL_TRIES} tries "
            f"({save.error}). {stays}; make room or repair {self._target.path}, and the same command "
            f"goes on from there."
        )

    def wait(self) -> None:
        """Returns when the last save is on disk or has failed, which is said and not raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self._flush()

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()

    def newest_good(self, wanted: Tree | None = None) -> int | None:
        """The newest checkpoint whose files are what was written, or None if there is none at all.

        All files of it are read. Newer ones that are damaged are put aside as STEP.damaged, each with one
        line that names the file.

        Args:
          wanted: what will be restored, so that local checkpoints that lack a piece of it do not count.

        Raises:
          UserError: there are checkpoints, but all are damaged; or one is of a later version.
        """
        self.wait()
        self._finder.forget()
        self._wanted = wanted
        found = self._finder.newest(wanted)
        return found and found.step

    def restore(self, abstract_state: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """Reads a checkpoint straight into shards: every device's part by its own process, on any mesh.

        Args:
          abstract_state: jax.ShapeDtypeStructs with shardings, the whole state.
          step: None reads the newest that is not damaged.

        Returns:
          The state and the `extra` that was saved with it.

        Raises:
          UserError: there is no such checkpoint, its arrays are not the wanted ones, or its files are
            damaged.
        """
        self._wanted = abstract_state

        def read(found: Found) -> tuple[Tree, dict[str, Any]]:
            return self._arrays(found, abstract_state, partial=False), _own_extra(found)

        return self._reading(step, read)

    def restore_params(self, abstract_params: Tree, step: int | None = None) -> Tree:
        """Reads a part of the state only.

        Args:
          abstract_params: as in `restore`, with the wanted branches of the state's tree only, for instance
            {"params": ..., "bias": ...}.

        Raises:
          UserError: as `restore`.
        """
        return self._reading(step, lambda found: self._arrays(found, abstract_params, partial=True))

    def shapes(self, step: int | None = None) -> Tree:
        """The state's tree of a checkpoint, with leaves that have a shape and a dtype.

        Raises:
          UserError: there is no such checkpoint, or its files are damaged.
        """
        return self._reading(step, lambda found: kinds.shapes(found.paths))

    def source(self, step: int | None = None) -> TensorReader:
        """The arrays of a checkpoint, to be read part by part without a mesh.

        Raises:
          UserError: there is no such checkpoint, or its files are damaged.
        """
        return self._reading(step, lambda found: kinds.reader(found.paths))

    def read_extra(self, step: int | None = None) -> dict[str, Any]:
        """The JSON part of a checkpoint.

        Raises:
          UserError: there is no such checkpoint, or its file is damaged.
        """
        return self._reading(step, _own_extra)

    def _flush(self) -> None:
        if self._last and self._last.report:
            text, self._last.report = self._last.report, None
            self._warn(text)

    def _reading(self, step: int | None, read: Callable[[Found], Any]) -> Any:
        """What `read` makes of a checkpoint.

        One without checksums that cannot be read is put aside for the one before.
        """
        self.wait()
        while True:
            found = (
                self._finder.newest(self._wanted)
                if step is None
                else self._finder.at(step, self._wanted)
            )
            if found is None:
                raise UserError(
                    f"{self._finder.shared.path} holds no checkpoint. Name the --workdir of a run that saved "
                    f"one."
                )
            out, error = None, None
            try:
                out = read(found)
            except UserError:  # in every process
                raise
            except Exception as e:
                error = e
            what = next(filter(None, exchange("read", one_line(error) if error else "")), "")
            if not what:
                return out
            # What has checksums is what was written: it is not the files that are wrong.
            if step is not None or self._read_only or (found.path / manifest.NAME).exists():
                raise UserError(f"The checkpoint {found.path} cannot be read ({what}).") from error
            name = self._finder.put_aside(found)
            self._warn(f"the checkpoint {found.path} cannot be read ({what}): kept aside as {name}")

    def _arrays(self, found: Found, wanted: Tree, partial: bool) -> Tree:
        # Orbax itself would cast another dtype in silence.
        stored, flat = flatten(kinds.shapes(found.paths)), flatten(wanted)
        for path in sorted(flat.keys() | stored.keys()):
            here, there = flat.get(path), stored.get(path)
            if here is None and partial:
                continue
            if here is None or there is None or spec_of(here) != spec_of(there):
                raise UserError(
                    f"The checkpoint {found.path} is of another model or optimizer: {path} is "
                    f"{_describe(there)} there and {_describe(here)} here. Set the options that it was "
                    f"written with, or name another --workdir."
                )
        return kinds.restore(found.paths, wanted)


def _describe(leaf: Any) -> str:
    return "absent" if leaf is None else str(spec_of(leaf))


def _own_extra(found: Found) -> dict[str, Any]:
    extra = integrity.read_extra(found.path)
    extra.pop(integrity.MARK, None)
    return extra
