"""Weights & Biases. Written against wandb 0.31; what it reads from the environment (WANDB_*) keeps its
meaning.

The charts' axis is the metric "step", and not W&B's own counter of rows, which may only rise: rows that are
made again after a resume or a rollback stand beside those before.
"""

import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.run.trackers import names
from deepseek_jax.run.trackers.destination import Run, Say, new_id


class WandbRun:
    """A run of W&B, in WORKDIR/wandb and on its server."""

    def __init__(self, run: Run, say: Say):
        self._run = run
        self._say = say
        self._step = names.STEP[run.naming]
        self._wandb: Any = None  # the run there

    def open(self) -> None:
        import wandb

        run, environment = self._run, os.environ
        project = run.project_or("WANDB_PROJECT")
        places = (environment.get("WANDB_BASE_URL"), environment.get("WANDB_ENTITY"), project)
        where = "/".join(place or "" for place in places)
        given: dict[str, Any] = {
            "project": project,
            "name": run.name_or("WANDB_NAME"),
            "id": environment.get("WANDB_RUN_ID") or run.kept(where) or new_id(),
            "config": run.settings("/"),  # a dot in a key is a level of nesting there
            "allow_val_change": True,  # of what another option is on resuming
            # The machine's figures are those of the training process; what this one prints is in its log.
            "settings": {"x_stats_pid": run.pid, "console": "off"},
        }
        if "WANDB_DIR" not in environment:
            given["dir"] = run.workdir
        if "WANDB_RESUME" not in environment:
            given["resume"] = "allow"
        try:
            self._wandb = wandb.init(**given)
        except Exception as e:  # no account, no network
            if environment.get("WANDB_MODE", "online") != "online":
                raise
            wandb.teardown()  # its service holds the id of the run that did not begin
            self._wandb = wandb.init(mode="offline", **given)
            reason = str(e).strip().partition("\n")[0].rstrip(".")
            folder = os.path.dirname(self._wandb.dir)  # of its files
            self._say(f"wandb: {reason}. Rows are kept: `wandb sync {folder}` sends them")
        run.keep(where, self._wandb.id, self._say)
        self._wandb.define_metric(self._step)
        self._wandb.define_metric("*", step_metric=self._step, step_sync=True)
        if url := self._wandb.url:
            self._say(f"wandb: {url}")

    def log(self, row: Mapping[str, Any], time: float) -> None:
        values = {names.tagged(n, self._run.naming): v for n, v in names.numbers(row).items()}
        self._wandb.log(values | {self._step: row["step"]})

    def close(self, failed: bool) -> None:
        self._wandb.finish(exit_code=1 if failed else 0)
