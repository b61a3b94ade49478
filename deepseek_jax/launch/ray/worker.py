"""What Ray Train runs on every host: starts train.py, reports its checkpoints, says how it ended.

Calls of ray.train.report and of its collectives are barriers: every worker must make as many as any
other. So worker 0 decides at every tick what all do (`Order`), and all do that and nothing else.
"""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_jax.errors import ExitCode
from deepseek_jax.launch.ray import job
from deepseek_jax.launch.ray.job import Outcome, Plan
from deepseek_jax.launch.ray.link import Output
from deepseek_jax.launch.ray.process import Process
from deepseek_jax.launch.ray.storage import Storage, metrics_at

SEND_SECONDS = 20.0  # between two copies of metrics and config to a bucket


class WorkerFailed(Exception):
    """A process ended in a way after which Ray starts all again, while max_failures lasts.

    Attributes:
      code: its exit code.
      said: the line that explains it.
    """

    def __init__(self, code: int, said: str):
        super().__init__(code, said)
        self.code = code
        self.said = said

    def __str__(self) -> str:
        return self.said


class Order(NamedTuple):
    """What all workers do at one tick; worker 0 decides."""

    report: tuple[int, ...] = ()  # steps of checkpoints
    end: int | None = None  # the exit code of process 0


def work(config: dict[str, Any]) -> dict[str, Any]:
    """One worker of a run.

    Args:
      config: "plan", a job.Plan, and "link", an actor: link.Link.

    Returns:
      A job.Outcome as a dict, the one of worker 0 counts.

    Raises:
      WorkerFailed: the process ended in a way that is worth another try.
    """
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    plan, context = Plan(**config["plan"]), ray.train.get_context()
    rank, count = context.get_world_rank(), context.get_world_size()
    kept = context.get_storage()
    storage = Storage(kept.storage_filesystem, f"{kept.experiment_fs_path}/run")
    workdir = _local_workdir(plan) if plan.remote else plan.workdir
    if plan.remote and context.get_local_rank() == 0:
        storage.fetch(workdir)
    link, output = config["link"], Output(rank)
    # Also a barrier: what has been fetched is there for all workers of a host.
    meeting = broadcast_from_rank_zero(
        job.meeting(ray.util.get_node_ip_address()) if rank == 0 else None
    )
    try:
        process = Process(
            [*plan.command, f"--workdir={workdir}"],
            plan.folder,
            job.environment(os.environ, plan, meeting, rank, count),
            output,
        )
    except OSError as e:
        raise WorkerFailed(
            ExitCode.MISTAKE,
            f"{plan.folder} cannot be entered on host {socket.gethostname()} ({e.strerror}). Let all hosts "
            "see the project there, or submit it with `ray job submit --working-dir=.`",
        ) from e
    chief = None
    if rank == 0:
        link.began.remote(count)
        local = workdir if plan.remote else ""
        chief = Chief(storage, process, lambda: _signals(link), _known_to_ray(), local)
    try:
        code = _until_end(Run(plan, storage, workdir, process, output, link), chief)
    finally:
        process.end(0)
        # Waits, as Ray ends this worker after the function.
        output.send(lambda lines: ray.get(link.put.remote(lines)))
    where = f"process {rank} of {count} on {socket.gethostname()}:"
    if not job.is_final(code):
        own = process.code or code
        raise WorkerFailed(own, job.explained(own, process.said, where))
    step = chief.reported if chief else None
    return Outcome(
        code=code,
        step=step,
        checkpoint=None if step is None else f"{plan.workdir}/checkpoints/{step}",
        metrics={} if step is None else metrics_at(workdir, step),
        workdir=plan.workdir,
        preempted=bool(chief and chief.preempted and code),
        said=process.said,
    )._asdict()


class Run(NamedTuple):
    """What a worker has in hand."""

    plan: Plan
    storage: Storage
    workdir: str  # on this host
    process: Process
    output: Output
    link: Any


def _until_end(run: Run, chief: "Chief | None") -> int:
    """Does what worker 0 says, until its process has ended. Returns that one's exit code.

    Raises:
      WorkerFailed: this worker's process has ended, and process 0 goes on without it.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    process, grace = run.process, run.plan.grace
    ended: float | None = None
    while True:
        _wait(run.plan.tick, process if chief else None)
        run.output.send(run.link.put.remote)
        preempted = ray.train.get_preemption_info() is not None
        order = Order(*broadcast_from_rank_zero(chief.decide(preempted) if chief else None))
        for step in order.report:
            ray.train.report(
                metrics_at(run.workdir, step) if chief else {},
                checkpoint=ray.train.Checkpoint(
                    run.storage.checkpoint(step), run.storage.filesystem
                ),
                checkpoint_upload_mode=_no_upload(),
            )
        if order.end is not None:
            process.end(grace)
            return order.end
        if process.code is not None:
            ended = ended or time.monotonic()
            if not chief and time.monotonic() - ended > grace:
                raise WorkerFailed(process.code, job.explained(process.code, process.said))


def _no_upload() -> Any:
    from ray.train import CheckpointUploadMode

    return CheckpointUploadMode.NO_UPLOAD


def _wait(seconds: float, process: Process | None) -> None:
    """Until the next tick; not so long where `process` ends."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and (process is None or process.code is None):
        time.sleep(0.1)


def _local_workdir(plan: Plan) -> str:
    """Where this host keeps the files of a run whose storage is remote."""
    top = plan.local_dir or os.path.join(tempfile.gettempdir(), f"deepseek_jax.{os.getuid()}")
    return os.path.join(top, plan.workdir.replace("://", "/").removesuffix("/run"))


def _signals(link: Any) -> list[int]:
    """All signals to the driver so far."""
    import ray

    try:
        return ray.get(link.signals.remote(), timeout=30)
    except ray.exceptions.RayError:  # the driver is gone: Ray ends this worker, too
        return []


def _known_to_ray() -> int | None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    name = os.path.basename(checkpoint.path) if checkpoint else ""
    return int(name) if name.isdigit() else None


class Chief:
    """What worker 0 knows beside its process.

    Attributes:
      reported: the step of the newest checkpoint that Ray knows of.
      preempted: Ray takes a host away, so the processes were stopped.
    """

    def __init__(
        self,
        storage: Storage,
        process: Process,
        asked: Callable[[], list[int]],
        known: int | None,
        local: str = "",
    ):
        """
        Args:
          storage: of the run.
          process: number 0.
          asked: all signals to the driver so far.
          known: step of the newest checkpoint that Ray's controller knows of; None: of none.
          local: the folder of metrics and config where the storage is remote.
        """
        self._storage = storage
        self._process = process
        self._asked = asked
        self._local = local
        self._passed_on = 0  # signals
        self._sent_at = time.monotonic()
        self.preempted = False
        # Ray's controller may be new where the run is not: the newest checkpoint is news to it.
        self.reported = max(storage.steps()[:-1], default=None) if known is None else known

    def decide(self, preempted: bool) -> Order:
        """Passes signals on, and says what all workers do now.

        Args:
          preempted: Ray takes a host away.
        """
        code = self._process.code  # before the checkpoints: none comes after the end
        numbers = self._asked()
        for number in numbers[self._passed_on :]:
            self._process.signal(number)
        self._passed_on = max(self._passed_on, len(numbers))
        if preempted and not self.preempted and code is None:
            self.preempted = True
            print("Ray takes a host away: train.py is told to save and stop.", file=sys.stderr)
            self._process.signal(signal.SIGTERM)
        after = -1 if self.reported is None else self.reported
        steps = tuple(step for step in self._storage.steps() if step > after)
        if self._local:
            self._send(bool(steps) or code is not None)
        if steps:
            self.reported = steps[-1]
        return Order(report=steps, end=code)

    def _send(self, now: bool) -> None:
        """Copies metrics and config to the storage: before a checkpoint of theirs is reported, at the end,
        and from time to time."""
        if not now and time.monotonic() - self._sent_at < SEND_SECONDS:
            return
        self._sent_at = time.monotonic()
        try:
            self._storage.send(self._local)
        except OSError as e:
            text = (
                f"{self._storage.folder} cannot be written ({e}): metrics there are not the newest."
            )
            print(text, file=sys.stderr)
