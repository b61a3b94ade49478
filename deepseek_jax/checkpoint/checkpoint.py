"""Saves and restores the training state, sharded and asynchronously, by Orbax.

WORKDIR/checkpoints/STEP/ holds `state`, the arrays, and `extra`, a JSON object. A folder with a plain number for a name is
whole: Orbax writes into a temporary folder beside it and renames that at the end, so a killed save leaves nothing that
counts.
"""

import logging
import os
import shutil
import tempfile
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

from deepseek_jax.config import UserError

Tree = dict[str, Any]  # nested dicts with string keys; arrays, or ShapeDtypeStructs with shardings, for leaves


def _quiet(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def _flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        out |= _flatten(value, path) if isinstance(value, dict) else {path: value}
    return out


class Checkpointer:
    """The checkpoints of one folder. In a job of several processes every method is called by all of them."""

    def __init__(self, directory: str, keep: int, read_only: bool = False):
        """Opens the folder, and creates it unless `read_only`.

        Args:
          directory: WORKDIR/checkpoints.
          keep: how many of the newest checkpoints stay; 0 keeps all.
          read_only: neither write nor create anything: for readers of a run that may be going on.

        Raises:
          UserError: the folder cannot be created, read or, unless `read_only`, written.
        """
        # Orbax speaks through absl's logger, at length and from the start.
        logging.getLogger("absl").addFilter(_quiet)
        warnings.filterwarnings("ignore", module=r"orbax\..*")
        self._directory = os.path.abspath(directory)
        self._open_directory(read_only)
        self._cleaned = False
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep or None),
                read_only=read_only, create=False, save_root_metadata=False),
        )

    def _open_directory(self, read_only: bool) -> None:
        try:
            if read_only:
                os.listdir(self._directory)
                return
            os.makedirs(self._directory, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                pass
        except OSError as e:
            access, repair = ("read", "holds checkpoints") if read_only else ("written", "you may write to")
            raise UserError(f"The checkpoint folder {self._directory} cannot be {access} ({e.strerror}). "
                            f"Name a --workdir that {repair}.") from e

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, or one that is being written, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree, extra: dict[str, Any]) -> None:
        """Copies the state to the host and returns; a thread writes it. The arrays may be donated at once.

        Waits for the save before, if that is still being written; an error of that one is raised here.

        Args:
          step: the folder's name, above all steps saved before.
          state: sharded jax.Arrays. extra: anything that `json` can write.

        Raises:
          ValueError: there is a checkpoint of this step already.
        """
        if not self._cleaned:
            self._remove_leftovers()
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), extra=ocp.args.JsonSave(extra))
        self._manager.save(step, args=args, force=True)

    def restore(self, abstract_state: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """Reads a checkpoint straight into shards: every device's part by its own process, on any mesh.

        Args:
          abstract_state: jax.ShapeDtypeStructs with shardings, the whole state.
          step: None reads the newest.

        Returns:
          The state and the `extra` that was saved with it.

        Raises:
          UserError: there is no such checkpoint, its arrays are not the wanted ones, or its files are damaged.
        """
        step = self._existing(step)
        self._check(abstract_state, step, partial=False)
        out = self._read(step, state=self._state_args(abstract_state, partial=False), extra=ocp.args.JsonRestore())
        return out["state"], out["extra"]

    def restore_params(self, abstract_params: Tree, step: int | None = None) -> Tree:
        """Reads a part of the state only, and nothing of the rest from disk.

        Args:
          abstract_params: as in `restore`, with the wanted branches of the state's tree only, for instance
            {"params": ..., "bias": ...}.

        Raises:
          UserError: as `restore`.
        """
        step = self._existing(step)
        self._check(abstract_params, step, partial=True)
        return self._read(step, state=self._state_args(abstract_params, partial=True))["state"]

    def shapes(self, step: int | None = None) -> Tree:
        """The state's tree of a checkpoint, with leaves that have a shape and a dtype.

        Raises:
          UserError: there is no such checkpoint, or its files are damaged.
        """
        step = self._existing(step)
        try:
            return self._manager.item_metadata(step)["state"].tree
        except Exception as e:
            raise self._damaged(step, e) from e

    def read_extra(self, step: int | None = None) -> dict[str, Any]:
        """The JSON part of a checkpoint.

        Raises:
          UserError: there is no such checkpoint, or its file is damaged.
        """
        return self._read(self._existing(step), extra=ocp.args.JsonRestore())["extra"]

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises what went wrong with it, if anything did."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()

    def _remove_leftovers(self) -> None:
        """Deletes temporary folders of killed saves, which would fill the disk. Only a writer may: no other writer exists."""
        self._cleaned = True
        if jax.process_index() == 0:
            for name in os.listdir(self._directory):
                if ".orbax-checkpoint-tmp" in name:
                    shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)

    def _existing(self, step: int | None) -> int:
        self.wait()
        steps = self.steps()
        if not steps:
            raise UserError(f"{self._directory} holds no checkpoint. Name the --workdir of a run that saved one.")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"{self._directory} holds no checkpoint of step {step}. "
                            f"Name one of these steps: {', '.join(map(str, steps))}.")
        return step

    def _check(self, wanted: Tree, step: int, partial: bool) -> None:
        # Orbax itself would cast another dtype in silence.
        stored = _flatten(self.shapes(step))
        describe = lambda leaf: f"{leaf.dtype}{list(leaf.shape)}"
        flat = _flatten(wanted)
        for path in sorted(flat.keys() | stored.keys()):
            here, there = flat.get(path), stored.get(path)
            if here is None and partial:
                continue
            if here is None or there is None or tuple(here.shape) != tuple(there.shape) or here.dtype != there.dtype:
                raise UserError(f"The checkpoint {self._directory}/{step} is of another model or optimizer: {path} is "
                                f"{describe(there) if there is not None else 'absent'} there and "
                                f"{describe(here) if here is not None else 'absent'} here. "
                                f"Set the options that it was written with, or name another --workdir.")

    @staticmethod
    def _state_args(abstract: Tree, partial: bool) -> ocp.args.PyTreeRestore:
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        return ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # names, shapes and dtypes fit: what is left is a file that is missing or cannot be decoded
            raise self._damaged(step, e) from e

    def _damaged(self, step: int, error: Exception) -> UserError:
        first_line = (str(error).splitlines() or [""])[0][:200]
        older = [s for s in self.steps() if s < step]
        repair = f"Delete that folder to go on from step {older[-1]}." if older else "There is no older one in this folder."
        what = f"{type(error).__name__}: {first_line}"
        return UserError(f"The checkpoint {self._directory}/{step} cannot be read ({what}). {repair}")
