"""The options of `launch ray`, from a command line or from Python, and what is wrong with them."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_jax.cli import arguments
from deepseek_jax.config import paths
from deepseek_jax.errors import UserError

REMOTE = ("s3", "gs")  # schemes that Ray's storage and the checkpoints both know
STRATEGIES = ("SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK")


@dataclass(frozen=True)
class RayOptions:
    """What Ray Train is asked for, and what its workers run.

    Attributes:
      command: the program and its arguments.
      storage_path: of all runs: a folder that all hosts see, s3://... or gs://...
      num_workers: hosts.
      gpus_per_worker: GPUs of a host; 0: CPUs.
      cpus_per_worker: CPUs that Ray keeps for a worker.
      name: of this run; "": that of its config file.
      max_failures: how often a run that failed is started again; -1: always.
      min_workers: start with fewer hosts, down to this number; 0: all are needed.
      placement_strategy: Ray's word for how workers are laid over hosts.
      address: of the cluster; "": RAY_ADDRESS, the one that runs here, or a new one on this host.
      module: the program is a module.
      grace: seconds from a signal, or from the end of one process, to SIGKILL.
      local_dir: where a host keeps metrics and config of a run whose storage is remote; "": in its
        folder for temporary files.
      env: NAME=VALUE for every process.
      ray_logs: show Ray's own lines too, and those of the processes as Ray shows them.
    """

    command: tuple[str, ...]
    storage_path: str
    num_workers: int = 1
    gpus_per_worker: int = 0
    cpus_per_worker: int = 1
    name: str = ""
    max_failures: int = 0
    min_workers: int = 0
    placement_strategy: str = "SPREAD"
    address: str = ""
    module: bool = False
    grace: float = 120.0
    local_dir: str = ""
    env: tuple[str, ...] = ()
    ray_logs: bool = False

    @property
    def remote(self) -> bool:
        """Whether the storage is no folder."""
        return "://" in self.storage_path

    @property
    def run_folder(self) -> str:
        """The folder of the run in the storage, which holds what a --workdir holds."""
        return f"{self.storage_path.rstrip('/')}/{self.name}/run"


_RANGES = {
    "num_workers": (1, 1 << 16),
    "gpus_per_worker": (0, 1024),
    "cpus_per_worker": (0, 4096),
    "max_failures": (-1, 1 << 20),
    "grace": (0, 1e6),
}


def parse(argv: list[str], about: str = "") -> RayOptions:
    """The options of a command line.

    Args:
      argv: what follows `launch ray`.
      about: for --help.

    Raises:
      UserError: a wrong or missing one.
    """
    p = arguments.Parser(prog="python -m deepseek_jax.launch ray", description=about)

    def add(name: str, help: str, kind: Any = int, **more: Any) -> None:
        default = RayOptions.__dict__.get(name)
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        p.add_argument(*spellings, **{"default": default, "help": help, "type": kind} | more)

    add("num_workers", "hosts, one worker and one process on each (default: 1)")
    add("gpus_per_worker", "GPUs of a host, all of them; 0: train on CPUs (default: 0)")
    add("cpus_per_worker", "CPUs that Ray keeps for a worker (default: 1)")
    add("storage_path", "folder that all hosts see, s3://... or gs://...", str, required=True)
    add("name", "of the run (default: that of the config file); the same one goes on", str)
    add("max_failures", "how often to start again after a failure; -1: always (default: 0)")
    add("min_workers", "go on with fewer hosts, down to this number (default: all are needed)")
    add("placement_strategy", f"{', '.join(STRATEGIES)} (default: SPREAD)", str)
    add("address", "of the cluster (default: RAY_ADDRESS, a cluster here, or a new one)", str)
    add("grace", "seconds from a signal to SIGKILL (default: 120)", float)
    add("local_dir", "folder on each host for metrics and config, with remote storage", str)
    p.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable of every process, with its value or with the one that it has here",
    )
    p.add_argument(
        *("--ray_logs", "--ray-logs"), action="store_true", help="show Ray's own lines, too"
    )
    p.add_argument(
        "-m", "--module", action="store_true", help="the program is a module, as for python -m"
    )
    p.add_argument("program", help="a Python file, or with -m a module")
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="its own")
    a = vars(p.parse_args(argv))
    return checked(RayOptions(command=(a.pop("program"), *a.pop("arguments")), **a))


def from_python(command: Sequence[str], **options: Any) -> RayOptions:
    """The options of a call.

    Raises:
      UserError: a wrong one, or one that there is not.
    """
    unknown = sorted(options.keys() - RayOptions.__dataclass_fields__.keys())
    if unknown:
        known = ", ".join(RayOptions.__dataclass_fields__)
        raise UserError(f"{unknown[0]} is not an option of ray.fit. Choose of {known}.")
    if isinstance(command, str) or not command:
        raise UserError(
            f"command={command!r} is not a list. Give the program and its arguments, for instance "
            "['train.py', '--config=configs/tiny.py']."
        )
    return checked(RayOptions(command=tuple(command), **options))


def checked(o: RayOptions) -> RayOptions:
    """The options with paths, name and variables resolved.

    Raises:
      UserError: the first wrong one.
    """
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(o, name) <= high:
            raise UserError(
                f"--{name}={getattr(o, name)} is not between {low} and {high}. Give a number in that range."
            )
    if not 0 <= o.min_workers <= o.num_workers:
        raise UserError(
            f"--min_workers={o.min_workers} is not between 1 and --num_workers={o.num_workers}. Give a "
            "number in that range, or leave it out."
        )
    if o.placement_strategy not in STRATEGIES:
        raise UserError(
            f"--placement_strategy={o.placement_strategy} is not known. Choose of {', '.join(STRATEGIES)}."
        )
    program, *rest = o.command
    if not o.module and not os.path.isfile(os.path.expanduser(program)):
        raise UserError(f"{program} is not a file. Name a Python program, or a module after -m.")
    for argument in rest:
        _check_argument(argument, o)
    name = o.name or _name_of_config(rest)
    if not re.fullmatch(r"[A-Za-z0-9_][\w.=+-]*", name, flags=re.ASCII):
        raise UserError(
            f"--name={name} is no name of a folder. Use letters, digits, '_', '-' and '.', and no '/'."
        )
    return RayOptions(
        **vars(o)
        | {
            "command": (program if o.module else os.path.expanduser(program), *rest),
            "storage_path": _storage(o.storage_path),
            "name": name,
            "local_dir": paths.expanded(o.local_dir, "--local_dir") if o.local_dir else "",
            "env": tuple(_variable(text) for text in o.env),
        }
    )


# Given to every process by `launch ray`, or for one of them only.
_OURS = {
    "workdir": "--storage_path and --name say where the run is",
    "coordinator_address": "the workers find each other",
    "num_processes": "--num_workers says how many",
    "process_id": "the workers find each other",
}


def _check_argument(argument: str, o: RayOptions) -> None:
    found = re.match(r"--?([\w.]+)(?:=(.*))?$", argument, flags=re.DOTALL)
    name, value = (found[1], found[2]) if found else ("", "")
    if name in _OURS:
        raise UserError(
            f"{argument} cannot be given to a program that Ray starts: {_OURS[name]}. Leave it out."
        )
    if name == "config.checkpoint.dir":
        raise UserError(
            f"{argument}: Ray knows of checkpoints below --storage_path={o.storage_path} only. Leave it "
            "out, or name another --storage_path."
        )


def _name_of_config(arguments_: Sequence[str]) -> str:
    """The stem of --config=configs/NAME.py:ARG, or "run"."""
    for argument in arguments_:
        if found := re.match(r"--?config=(.*?)(?:\.py)?(?::.*)?$", argument):
            return re.sub(r"[^\w.-]", "_", os.path.basename(found[1]), flags=re.ASCII) or "run"
    return "run"


def _storage(text: str) -> str:
    scheme, sign, rest = text.partition("://")
    if not sign:
        if not text:
            raise UserError("--storage_path is missing. Name a folder that all hosts see.")
        return os.path.abspath(paths.expanded(text, "--storage_path"))
    if scheme == "file":
        return os.path.abspath(rest)
    if scheme not in REMOTE or not rest.strip("/"):
        raise UserError(
            f"--storage_path={text} is no place for checkpoints. Name a folder that all hosts see, "
            "s3://BUCKET/FOLDER or gs://BUCKET/FOLDER."
        )
    if "?" in rest or "@" in rest:
        raise UserError(
            f"--storage_path={text} has more than a bucket and a folder. Set AWS_ENDPOINT_URL, AWS_REGION "
            "and the like in the environment of the hosts instead."
        )
    return text.rstrip("/")


def _variable(text: str) -> str:
    name, sign, _ = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
        raise UserError(f"--env={text} names no variable. Write it as NAME or NAME=VALUE.")
    if sign:
        return text
    if name not in os.environ:
        raise UserError(
            f"--env={name}: there is no such variable here. Give its value, as --env={name}=VALUE."
        )
    return f"{name}={os.environ[name]}"
