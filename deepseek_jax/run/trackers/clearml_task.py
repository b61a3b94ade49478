"""ClearML. Written against clearml 2.1; what it reads from the environment (CLEARML_*) keeps its meaning.

With CLEARML_OFFLINE_MODE=1 it writes a folder in its cache, whose name the log has (WORKDIR/trackers).
"""

import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.run.trackers import names
from deepseek_jax.run.trackers.destination import Run, Say

# ClearML looks into these packages, the program's command line and its repository by itself. The process that
# calls it is not the one that trains, and has none of them.
NOTHING = dict.fromkeys(
    "catboost detect_repository fastai gradio hydra joblib lightgbm matplotlib megengine pytorch scikit "
    "tensorboard tensorflow tfdefines xgboost".split(),
    False,
)


class ClearmlTask:
    """A task of ClearML."""

    def __init__(self, run: Run, say: Say):
        self._run = run
        self._say = say
        self._task: Any = None

    def open(self) -> None:
        from clearml import Task

        run = self._run
        project = run.project_or("CLEARML_PROJECT")
        where = f"{os.environ.get('CLEARML_API_HOST', '')}/{project}"
        known = run.kept(where)
        self._task = task = Task.init(
            project_name=project,
            task_name=run.name_or("CLEARML_TASK"),
            reuse_last_task_id=known or False,
            # 0 added to the steps of what goes on: they are those of the run, and not of this start
            continue_last_task=0 if known else False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=NOTHING,
            auto_connect_streams=False,
        )
        run.keep(where, task.id, self._say)
        settings = run.settings("/")
        task.update_parameters(  # in the section before the first slash
            {n if "/" in n else f"run/{n}": str(v) for n, v in settings.items()}
        )
        if Task.is_offline():
            self._say(f"clearml: offline, in {task.get_offline_mode_folder()}")
        else:
            self._say(f"clearml: {task.get_output_log_web_page()}")

    def log(self, row: Mapping[str, Any], time: float) -> None:
        logger = self._task.get_logger()
        for name, value in names.numbers(row).items():
            title, series = names.in_groups(name, self._run.naming)
            logger.report_scalar(title=title, series=series, value=value, iteration=row["step"])

    def close(self, failed: bool) -> None:
        if failed:
            self._task.mark_failed(status_message="the training process is gone")
        self._task.close()
