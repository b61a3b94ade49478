"""Ray from outside: connects to a cluster, lets Ray Train run the workers, says how the run ended."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deepseek_jax.cluster.signals import SIGNALS
from deepseek_jax.errors import ExitCode, Failure, UserError, one_line
from deepseek_jax.launch.ray import job, options, worker
from deepseek_jax.launch.ray.job import Outcome
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
    if outcome.code in (ExitCode.DONE, *(128 + s for s in SIGNALS)):
        return outcome
    raise RunFailed(job.explained(outcome.code, outcome.said), outcome.code)


def run(o: RayOptions, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Trains with checked options.

    Args:
      o: the options.
      say: takes a line for the user.

    Raises:
      UserError: Ray is not installed, or no cluster is there.
      RunFailed: the last of the failures that Ray did not start again.
    """
    with connected(o) as ray:
        stop = ray.remote(num_cpus=0)(Stop).remote()
        _check_room(ray, o, say)
        say(f"run {o.name} in {o.run_folder}, {_workers(o)}")
        plan = job.plan(o, os.getcwd(), os.environ)._asdict()
        while True:
            result = _fitted(o, {"plan": plan, "stop": stop}, lambda n: stop.add.remote(n))
            outcome = Outcome(**(result.return_value or {"code": ExitCode.ERROR}))
            if not outcome.preempted:
                return outcome
            say(f"stopped at step {outcome.step}, as Ray takes a host away; starting again.")


class Stop:
    """An actor: the signals that the driver has got, for worker 0 to ask for."""

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def add(self, number: int) -> None:
        self._numbers.append(number)

    def numbers(self) -> list[int]:
        return self._numbers


@contextlib.contextmanager
def connected(o: RayOptions) -> Iterator[Any]:
    """Ray, connected to a cluster: as the caller left it, or until the end of the block.

    Raises:
      UserError: Ray is not installed, or no cluster answers at --address.
    """
    try:
        import ray
        import ray.train.v2.jax  # noqa: F401  the newest part of it that is used
    except ImportError as e:
        raise UserError(
            f"Ray Train cannot be used ({one_line(e)}). Install it: pip install 'deepseek_jax[ray]'."
        ) from e
    if ray.is_initialized():
        yield ray
        return
    try:
        try:
            ray.init(address=o.address or "auto")
        except ConnectionError:
            if o.address or os.environ.get("RAY_ADDRESS"):
                raise
            _start_here(ray, o)
    except (ConnectionError, RuntimeError, ValueError) as e:
        where = o.address or os.environ.get("RAY_ADDRESS") or "this host"
        raise UserError(
            f"--address={where}: Ray cannot be reached or started there ({one_line(e)}). Name the cluster's "
            "HOST:PORT, or leave it out for one on this host."
        ) from e
    try:
        yield ray
    finally:
        ray.shutdown()


def _start_here(ray: Any, o: RayOptions) -> None:
    """A cluster of this host alone. Nobody else needs to reach it."""
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(os.cpu_count() or 1, o.num_workers * o.cpus_per_worker),
        _node_ip_address="127.0.0.1",
    )


def fitting(nodes: Sequence[dict[str, float]], o: RayOptions) -> int:
    """How many workers the hosts of a cluster could hold.

    Args:
      nodes: resources of each host, as Ray names them.
    """
    each = [("GPU", o.gpus_per_worker), ("CPU", o.cpus_per_worker)]
    counts = [
        min((int(node.get(name, 0.0) // n) for name, n in each if n), default=o.num_workers)
        for node in nodes
    ]
    return sum(min(c, 1) if o.placement_strategy == "STRICT_SPREAD" else c for c in counts)


def _check_room(ray: Any, o: RayOptions, say: Callable[[str], None]) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed, found = o.min_workers or o.num_workers, fitting(nodes, o)
    if found >= needed:
        return
    text = (
        f"the cluster has room for {found} of {needed} workers with {o.gpus_per_worker} GPUs and "
        f"{o.cpus_per_worker} CPUs each"
    )
    if len(nodes) == 1 and nodes[0].get("node:127.0.0.1"):  # of this host alone: no host will join
        raise UserError(
            f"--num_workers={o.num_workers} --gpus_per_worker={o.gpus_per_worker}: {text}. Name another "
            "number, or a larger cluster by --address."
        )
    say(f"{text} now; waiting for hosts.")


def _workers(o: RayOptions) -> str:
    count = f"{o.min_workers} to {o.num_workers}" if o.min_workers else str(o.num_workers)
    devices = f"{o.gpus_per_worker} GPUs each" if o.gpus_per_worker else "on CPUs"
    return f"{count} worker{'s' * (count != '1')} {devices}"


def _fitted(o: RayOptions, config: dict[str, Any], pass_on: Callable[[int], Any]) -> Any:
    """The result of one trainer. It runs in a thread, as in the main thread it would take SIGINT, and end
    the workers without a checkpoint.

    Raises:
      RunFailed: it failed more often than max_failures.
    """
    from ray.train import TrainingFailedError

    trainer = _trainer(o, config)
    result: list[Any] = []
    error: list[BaseException] = []

    def target() -> None:
        try:
            result.append(trainer.fit())
        except BaseException as e:
            error.append(e)

    thread = threading.Thread(target=target, name="ray.train", daemon=True)
    with _signals(pass_on):
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
    if not error:
        return result[0]
    if isinstance(error[0], TrainingFailedError):
        code, text = _reason(error[0])
        raise RunFailed(text, code) from error[0]
    raise error[0]


def _reason(error: Any) -> tuple[int, str]:
    """Exit code and line of the failure that was one too many: that of the first process that was not
    ended by the end of another."""
    found = [
        e
        for _, e in sorted(getattr(error, "worker_failures", {}).items())
        if isinstance(e, worker.WorkerFailed)
    ]
    own = [e for e in found if e.code != ExitCode.LOST] or found
    return (own[0].code, own[0].said) if own else (ExitCode.ERROR, one_line(error))


def _trainer(o: RayOptions, config: dict[str, Any]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    gpus = {"GPU": o.gpus_per_worker} if o.gpus_per_worker else {}
    elastic = bool(o.min_workers) and o.min_workers < o.num_workers
    run_config = RunConfig(
        name=o.name,
        storage_path=o.storage_path,
        failure_config=FailureConfig(max_failures=o.max_failures),
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
    """Signals to this process go to train.py, which stops with a checkpoint; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda n, _: pass_on(n))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """A line of `launch ray` on stderr."""
    print(f"deepseek_jax.launch: {text}", file=sys.stderr, flush=True)
