"""Ray from outside: connects to a cluster, lets Ray Train run the workers, says how the run ended."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deepseek_jax.cluster.signals import SIGNALS, URGENT
from deepseek_jax.errors import ExitCode, Failure, UserError, one_line, stopped_by
from deepseek_jax.launch.ray import cluster, job, options, worker
from deepseek_jax.launch.ray.job import Outcome
from deepseek_jax.launch.ray.link import SPEAKER, Link, show
from deepseek_jax.launch.ray.options import RayOptions

# Ray's own file in the folder of a run, with the checkpoints that it knows of. A controller that finds
# one whose checkpoints config.checkpoint.keep has deleted meanwhile does not start.
_SNAPSHOT = "checkpoint_manager_snapshot.json"


class RunFailed(Failure):
    """A run on Ray ended with an exit code other than 0, and Ray does not start it again.

    Attributes:
      code: the exit code.
    """

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code  # type: ignore[assignment]  # a signal's is 128 + N


def fit(
    command: Sequence[str],
    *,
    storage_path: str,
    num_workers: int = 1,
    gpus_per_worker: int = 0,
    name: str = "",
    max_failures: int = 0,
    **more: Any,
) -> Outcome:
    """Trains on a Ray cluster, or goes on with the run of that name. As `launch ray`, from Python.

    Without ray.init before it, the cluster is the one that RAY_ADDRESS names, the one that runs on this
    host, or a new one on this host.

    Args:
      command: train.py and its arguments: ["train.py", "--config=configs/base.py"].
      storage_path: of all runs: a folder that all hosts see, s3://... or gs://...
      num_workers: hosts; one worker and one process on each.
      gpus_per_worker: GPUs of a host, all of them; 0: CPUs.
      name: of the run; "": that of the config file.
      max_failures: how often to start again after a failure; -1: always.
      **more: further fields of options.RayOptions.

    Returns:
      How it ended: with code 0, or 128 + N after signal N and a checkpoint.

    Raises:
      UserError: a wrong option, of Ray or of train.py.
      RunFailed: bad numbers, or a failure after max_failures others.
    """
    given = options.from_python(
        command,
        storage_path=storage_path,
        num_workers=num_workers,
        gpus_per_worker=gpus_per_worker,
        name=name,
        max_failures=max_failures,
        **more,
    )
    outcome = run(given)
    if outcome.code == ExitCode.MISTAKE:
        raise UserError(outcome.said)
    if outcome.code in (ExitCode.DONE, *map(stopped_by, SIGNALS)):
        return outcome
    raise RunFailed(job.explained(outcome.code, outcome.said), outcome.code)


def run(o: RayOptions) -> Outcome:
    """Trains with checked options.

    Raises:
      UserError: Ray is not installed, or no cluster is there.
      RunFailed: the last of the failures that Ray did not start again.
    """
    with cluster.connected(o) as to:
        ray, link = to.ray, _link(to.ray)
        cluster.check_room(to, o, say)
        say(f"run {o.name} in {o.run_folder}, {_workers(o)}")
        plan = job.plan(o, os.getcwd(), os.environ)._asdict()

        def meanwhile() -> None:
            lines = ray.get(link.take.remote())
            if to.quiet:  # else Ray prints them
                show(lines)

        while True:
            trainer = _trainer(o, {"plan": plan, "link": link})
            with _signals(lambda number: link.signal.remote(number)):
                result = _fitted(trainer, meanwhile, o.max_failures)
            outcome = Outcome(**(result.return_value or {"code": ExitCode.ERROR}))
            if not outcome.preempted:
                return outcome
            say(f"stopped at step {outcome.step}, as Ray takes a host away; starting again.")


def _link(ray: Any) -> Any:
    """On this host, which lives as long as the command."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Link).remote()


def _workers(o: RayOptions) -> str:
    count = f"{o.min_workers} to {o.num_workers}" if o.min_workers else str(o.num_workers)
    devices = f"{o.gpus_per_worker} GPUs each" if o.gpus_per_worker else "on CPUs"
    return f"{count} worker{'s' * (count != '1')} {devices}"


def _fitted(trainer: Any, meanwhile: Callable[[], None], max_failures: int) -> Any:
    """The result of a trainer. It runs in a thread, as in the main thread it would take SIGINT, and end the
    workers without a checkpoint.

    Args:
      meanwhile: is called now and then, and once when it has ended.
      max_failures: of the options.

    Raises:
      RunFailed: it failed more often than max_failures.
    """
    from ray.train import TrainingFailedError

    result: list[Any] = []
    error: list[BaseException] = []

    def target() -> None:
        try:
            result.append(trainer.fit())
        except BaseException as e:
            error.append(e)

    thread = threading.Thread(target=target, name="ray.train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.3)
        meanwhile()
    if not error:
        return result[0]
    failed = error[0]
    if not isinstance(failed, TrainingFailedError):
        raise failed
    failures = getattr(failed, "worker_failures", {})
    code, text = _reason(failures) if failures else (ExitCode.ERROR, one_line(failed))
    raise RunFailed(f"no try is left (--max_failures={max_failures}): {text}", code) from failed


def _reason(failures: Mapping[int, BaseException]) -> tuple[int, str]:
    """Exit code and line of a failure: those of the first process that was not ended by another's end.

    Args:
      failures: what each worker that failed has raised, by rank.
    """
    processes = [e for _, e in sorted(failures.items()) if isinstance(e, worker.WorkerFailed)]
    for failed in processes:
        if failed.code != ExitCode.LOST:
            return failed.code, failed.said
    for rank, error in sorted(failures.items()):
        if error not in processes:
            return ExitCode.ERROR, f"worker {rank}: {one_line(error)}"
    return processes[0].code, processes[0].said


def _callback(link: Any) -> Any:
    """Says of each failure, in Ray's controller, what it was. Ray's own lines are long, and not shown."""
    from ray.train import UserCallback

    class Failures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            link.put.remote([(True, f"{SPEAKER}: {_reason(worker_exceptions)[1]}")])

    return Failures()


def _trainer(o: RayOptions, config: dict[str, Any]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    gpus = {"GPU": o.gpus_per_worker} if o.gpus_per_worker else {}
    elastic = bool(o.min_workers) and o.min_workers < o.num_workers
    run_config = RunConfig(
        name=o.name,
        storage_path=o.storage_path,
        failure_config=FailureConfig(max_failures=o.max_failures),
        callbacks=[_callback(config["link"])],
    )
    try:
        kept = run_config.storage_context
        _forget(kept.storage_filesystem, f"{kept.experiment_fs_path}/{_SNAPSHOT}")
    except (OSError, RuntimeError) as e:
        raise UserError(
            f"--storage_path={o.storage_path} cannot be written ({one_line(e)}). Name one that you may write "
            "to."
        ) from e
    return JaxTrainer(
        worker.work,
        train_loop_config=config,
        jax_config=JaxConfig(),  # JAX is started by train.py, not by Ray in the worker
        scaling_config=ScalingConfig(
            num_workers=(o.min_workers, o.num_workers) if elastic else o.num_workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": o.cpus_per_worker, **gpus},
            placement_strategy=o.placement_strategy,
        ),
        run_config=run_config,
    )


def _forget(filesystem: Any, file: str) -> None:
    from pyarrow import fs

    if filesystem.get_file_info(file).type == fs.FileType.File:
        filesystem.delete_file(file)


@contextlib.contextmanager
def _signals(pass_on: Callable[[int], Any]) -> Iterator[None]:
    """Signals to this process go to train.py, which stops with a checkpoint; in the main thread only.

    Raises:
      RunFailed: inside, by a second SIGINT or SIGTERM: there may be no process yet, or none any more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    urgent: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if number in URGENT:
            urgent.append(number)
        if len(urgent) > 1:
            raise RunFailed(f"ended at once by a second signal, {number}.", stopped_by(number))
        pass_on(number)

    before = {}
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """A line of `launch ray` on stderr."""
    print(f"{SPEAKER}: {text}", file=sys.stderr, flush=True)
