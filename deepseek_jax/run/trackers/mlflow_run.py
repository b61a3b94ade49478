"""MLflow. Written against mlflow 3.17; what it reads from the environment (MLFLOW_*) keeps its meaning.

Without MLFLOW_TRACKING_URI it writes the SQLite file mlflow.db of the folder that the run was started in, as
MLflow does. A metric has any number of values at a step: those that are made again after a resume or a
rollback stand beside those before. A parameter is written once there: one that differs on resuming becomes a
tag.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from deepseek_jax.run.trackers import names
from deepseek_jax.run.trackers.destination import PROJECT, Run, Say

AT_ONCE = 100  # parameters or tags in a call (mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH)
# MLflow waits two minutes for an answer and asks again up to seven times.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
EXPERIMENTS = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")  # read by MLflow itself


class MlflowRun:
    """A run of MLflow."""

    def __init__(self, run: Run, say: Say):
        self._run = run
        self._say = say
        self._mlflow: Any = None  # the package
        self._id = ""

    def open(self) -> None:
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        import mlflow

        run, named = self._run, [os.environ[v] for v in EXPERIMENTS if os.environ.get(v)]
        experiment = run.project or "".join(named[:1]) or PROJECT
        if run.project or not named:
            mlflow.set_experiment(experiment)
        where = f"{mlflow.get_tracking_uri()}/{experiment}"
        known = os.environ.get("MLFLOW_RUN_ID") or run.kept(where)
        if known and not os.environ.get("MLFLOW_RUN_ID") and not _is_there(mlflow, known):
            self._say(f"mlflow: the run {known} is not there any more, and another one begins")
            known = None
        name = run.name or (None if known else run.default_name)
        if mlflow.active_run():  # of an `open` that raised below
            mlflow.end_run()
        begun = mlflow.start_run(run_id=known, run_name=name)
        self._mlflow, self._id = mlflow, begun.info.run_id
        run.keep(where, self._id, self._say)
        self._describe(begun.data.params)

    def _describe(self, known: Mapping[str, str]) -> None:
        """Parameters and tags of the run.

        Args:
          known: parameters that it has.
        """
        settings = {name: str(value) for name, value in self._run.settings(".").items()}
        settings = {name: value for name, value in settings.items() if value}
        new = {name: value for name, value in settings.items() if name not in known}
        tags = {f"now.{n}": v for n, v in settings.items() if known.get(n, v) != v}
        tags |= json.loads(os.environ.get("MLFLOW_TAGS") or "{}")
        if commit := self._run.facts.get("git/commit"):
            tags["mlflow.source.git.commit"] = commit
        for part in _parts(new):
            self._mlflow.log_params(part, synchronous=True)
        for part in _parts(tags):
            self._mlflow.set_tags(part, synchronous=True)

    def log(self, row: Mapping[str, Any], time: float) -> None:
        logged = {names.logged(n, self._run.naming): v for n, v in names.numbers(row).items()}
        # The characters that MLflow takes; an objective may name its parts otherwise.
        allowed = {re.sub(r"[^0-9A-Za-z_\-. :/]", "_", n): v for n, v in logged.items()}
        milliseconds = int(time * 1000)
        self._mlflow.log_metrics(
            allowed, step=row["step"], synchronous=True, run_id=self._id, timestamp=milliseconds
        )

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _is_there(mlflow: Any, run: str) -> bool:
    """Whether a run exists and is not deleted.

    Raises:
      MlflowException: the server does not say.
    """
    try:
        return mlflow.get_run(run).info.lifecycle_stage != "deleted"
    except mlflow.MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _parts(values: Mapping[str, str]) -> list[dict[str, str]]:
    items = list(values.items())
    return [dict(items[i : i + AT_ONCE]) for i in range(0, len(items), AT_ONCE)]
