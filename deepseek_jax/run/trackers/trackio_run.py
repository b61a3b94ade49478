"""Trackio. Written against trackio 0.43: a local database without an account, a Space with TRACKIO_SPACE_ID.

It knows a run by its name. Steps may fall: rows that are made again after a resume or a rollback stand beside
those before.
"""

import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.run.trackers import names
from deepseek_jax.run.trackers.destination import Run, Say, new_id


class TrackioRun:
    """A run of Trackio."""

    def __init__(self, run: Run, say: Say):
        self._run = run
        self._say = say
        self._trackio: Any = None  # the package

    def open(self) -> None:
        import trackio

        run = self._run
        project = run.project_or("TRACKIO_PROJECT")
        place = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or ""
        where = f"{place.partition('?')[0]}/{project}"  # what follows is the token of a server
        known = run.kept(where)
        # Two folders of one name are two runs, where nobody has said how to call them.
        name = known or run.name or f"{run.default_name}-{new_id()}"
        trackio.init(
            project=project,
            name=name,
            config=run.settings("/"),
            resume="allow" if known else "never",
            embed=False,
        )
        self._trackio = trackio
        run.keep(where, name, self._say)

    def log(self, row: Mapping[str, Any], time: float) -> None:
        naming = self._run.naming
        values = {names.tagged(n, naming): v for n, v in names.numbers(row).items()}
        if naming == names.HF:
            values[names.STEP[naming]] = row["step"]
        self._trackio.log(values, step=row["step"])

    def close(self, failed: bool) -> None:
        self._trackio.finish()
