"""What a run leaves for who looks at it later: a record of each start, and its report at the end."""

import os
import platform
import sys
import time
from typing import Any

import jax

from deepseek_jax import __version__
from deepseek_jax.cli.texts import clean
from deepseek_jax.errors import UserError, one_line
from deepseek_jax.parallel.mesh import axes_across_hosts
from deepseek_jax.report import page
from deepseek_jax.run import metrics
from deepseek_jax.run.summary import Run
from deepseek_jax.train import process_state, starts


def write(run: Run) -> None:
    """Adds this start to train/starts.py's file. In process 0 only."""
    if jax.process_index() == 0:
        starts.add(run.workdir, clean(_record(run)))


def _record(run: Run) -> dict[str, Any]:
    config, mesh, count = run.config, run.mesh, run.count
    done = run.resume_step or 0
    try:
        reached = max((p["step"] for p in process_state.read(run.workdir)), default=done)
    except UserError:
        reached = done
    return {
        "step": done,
        "time": round(time.time(), 3),  # of this host's clock, since 1970
        "reached": max(reached, done) if done else 0,  # by the start before
        "sequence": run.history.first_row(done),  # of the data order, with which it goes on
        "changed": run.changed,
        "stage": run.stage.title if run.stage else "",
        "mesh": [[axis, size] for axis, size in mesh.shape.items()],
        "processes": starts.in_runs([d.process_index for d in mesh.devices.flat]),
        "across": list(axes_across_hosts(mesh)),
        "device_kind": mesh.devices.flat[0].device_kind,
        "strategy": config.sharding.canonical,
        "dispatch": config.moe.dispatch if config.model.has_experts else "",
        "parameters": count.total,
        "active": count.active,
        "flops_per_token": count.flops_per_token,
        "bytes_per_device": run.layout.bytes_per_device(mesh),
        "data": run.data.description,
        "versions": {
            "deepseek_jax": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }


def report(workdir: str) -> None:
    """Writes the run's report. In process 0 only; what keeps it from it is a line on stderr, and no reason
    for a run to fail."""
    if jax.process_index() != 0:
        return
    path = os.path.join(workdir, page.NAME)
    try:
        page.write(path, page.build([workdir], metrics.METRICS))
    except Exception as e:  # of a page about the run, which has its results
        why = e.strerror if isinstance(e, OSError) else one_line(e)
        print(f"{path} is not written ({why}).", file=sys.stderr)
