"""What a job is, whatever starts it: the program, the machines, the time, the names."""

import dataclasses
import re

from deepseek_jax.errors import UserError

KINDS = ("slurm", "jobset", "rayjob", "ssh")
STOP_BEFORE = 300  # seconds that a run gets to save


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One process per node, with all of its GPUs.

    Attributes:
      command: the program and its arguments, without the interpreter: train.py --config=..., or -m
        and a module.
      name: of the job.
      nodes: hosts, or pods.
      gpus_per_node: 0 trains on CPUs.
      gpu_type: of --gres=gpu:TYPE:N; "" takes any.
      cpus_per_node: None: the whole node under SLURM, the image's share under Kubernetes.
      gib_per_node: of memory, likewise.
      seconds: until the run is stopped; None: no limit of its own.
      stop_before: seconds before the limit at which the run is told to save.
      max_restarts: how often it starts again after a failure.
      python: the interpreter on the nodes.
      workdir: of the run, seen by all nodes; "" leaves --workdir of `command` as it is.
      variables: exported to the program, by name.
      setup: lines of shell before it, under SLURM.
      partition: of SLURM.
      account: of SLURM.
      directives: further options of sbatch, for instance --qos=high.
      container: image for srun --container-image (pyxis).
      container_mounts: SOURCE:TARGET,... for it.
      image: of the pods.
      claim: the PersistentVolumeClaim with the workdir.
      queue: LocalQueue of Kueue.
      topology: label of nodes; a JobSet has one of its values to itself.
      ray_version: in the image.
      hosts: for ssh, as its configuration has them.
      port: of process 0, for those that do not find it themselves.
    """

    command: tuple[str, ...]
    name: str = "train"
    nodes: int = 1
    gpus_per_node: int = 8
    gpu_type: str = ""
    cpus_per_node: int | None = None
    gib_per_node: int | None = None
    seconds: int | None = None
    stop_before: int = STOP_BEFORE
    max_restarts: int = 10
    python: str = "python"
    workdir: str = ""
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    setup: tuple[str, ...] = ()
    partition: str = ""
    account: str = ""
    directives: tuple[str, ...] = ()
    container: str = ""
    container_mounts: str = ""
    image: str = ""
    claim: str = ""
    queue: str = ""
    topology: str = ""
    ray_version: str = "2.60.0"
    hosts: tuple[str, ...] = ()
    port: int = 8476


def parse_time(text: str) -> int:
    """Seconds of a time as SLURM has it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
      UserError: it is none of these.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise UserError(
            f"--time={text} is not a time. Write minutes, H:MM:SS or D-HH:MM:SS, as for sbatch."
        )
    days, *rest = found.groups()
    numbers = [int(n) for n in rest if n is not None]
    if days is not None or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def format_time(seconds: int) -> str:
    """93784 -> '1-02:03:04'."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}"


def check(job: Job, kind: str) -> None:
    """What no file of this kind can say.

    Raises:
      UserError: with the option, its value and the repair.
    """
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        parts = value.values() if isinstance(value, dict) else value
        for text in (
            [parts] if isinstance(parts, str) else parts if isinstance(value, (dict, tuple)) else ()
        ):
            if re.search(r"[\x00-\x1f\x7f]", text):
                raise UserError(
                    f"{text!r} ({field.name}) has a line break or another control character. Leave it out."
                )
    if not job.command:
        raise UserError(
            "The program is missing. Give it after --, for instance -- train.py --config=configs/base.py"
        )
    if job.seconds is not None and job.seconds <= job.stop_before:
        raise UserError(
            f"--time={format_time(job.seconds)} is not above --stop_before={job.stop_before}, the seconds "
            "for saving before it. Raise the first or lower the second."
        )
    if kind in ("jobset", "rayjob"):
        _check_pods(job, kind)
    if kind == "ssh" and not job.hosts:
        raise UserError("--hosts is missing. Name the hosts, for instance --hosts=node0,node1")


def _check_pods(job: Job, kind: str) -> None:
    if not job.image:
        raise UserError("--image is missing. Name an image with this package in it.")
    # The longest name made of it: a pod's, with its number and five random characters.
    most = 63 - len(f"-workers-0-{job.nodes - 1}-xxxxx") if kind == "jobset" else 47
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job.name) or len(job.name) > most:
        raise UserError(
            f"--job_name={job.name} is no name for Kubernetes. Give at most {most} of a-z, 0-9 and -, a "
            "letter first."
        )
    if kind == "rayjob" and job.command[0] != "-m" and not job.command[0].endswith(".py"):
        raise UserError(
            f"{job.command[0]} is no Python program. Give a .py file, or -m and a module, after --."
        )
    if kind == "rayjob" and "://" in job.workdir:
        return
    if not job.workdir.startswith("/") or job.workdir.count("/") < 2:
        raise UserError(
            f"--workdir={job.workdir} does not lie in a volume. Give /VOLUME/FOLDER: --claim is mounted at "
            "/VOLUME, and what a pod writes elsewhere ends with it."
        )
