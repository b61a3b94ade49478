"""Write a file that starts a run on a cluster: for SLURM, Kubernetes, KubeRay or ssh.

  python -m deepseek_jax.launch template slurm --nodes=4 --time=1-0 --partition=h100 -- \\
      train.py --config=configs/v3.py --workdir=/shared/v3 > v3.sbatch
  python -m deepseek_jax.launch template slurm --from=old.sbatch --out=new.sbatch -- train.py ...
  python -m deepseek_jax.launch template jobset --nodes=4 --job_name=v3 --image=IMAGE --workdir=/runs/v3 -- \\
      train.py --config=configs/v3.py | kubectl apply -f -
  python -m deepseek_jax.launch template rayjob (the same options)
  python -m deepseek_jax.launch template ssh --hosts=node0,node1 --out=run.sh -- train.py ...

The program and its options stand after --. --from reads an sbatch file for another trainer: nodes, GPUs,
names, time, partition and variables; flags come first. What became of its lines, which variables have no
effect here and what was left out is said on stderr. docs/clusters.md describes the files.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from deepseek_jax.cli import arguments
from deepseek_jax.errors import ExitCode, UserError
from deepseek_jax.launch.template.job import KINDS, Job, parse_time
from deepseek_jax.launch.template.sbatch import from_script
from deepseek_jax.launch.template.variables import meaning
from deepseek_jax.launch.template.write import write

_PODS = ("jobset", "rayjob")
_MACHINES = ("slurm", *_PODS)
# flag -> (attribute of Job, type, help, the kinds of file in which it acts)
_FLAGS: dict[str, tuple[str, type, str, tuple[str, ...]]] = {
    "nodes": ("nodes", int, "hosts (default: 1)", _MACHINES),
    "gpus_per_node": ("gpus_per_node", int, "GPUs of a host; 0 for CPUs (default: 8)", KINDS),
    "job_name": ("name", str, "of the job (default: train)", _MACHINES),
    "time": ("time", str, "limit, as for sbatch: minutes, H:MM:SS or D-HH:MM:SS", KINDS),
    "stop_before": (
        "stop_before", int, "seconds before the limit, or after a stop, for saving (default: 300)",
        ("slurm", "jobset", "ssh"),
    ),
    "workdir": ("workdir", str, "of the run: a folder that all hosts see, passed on to the program", KINDS),
    "python": ("python", str, "interpreter on the hosts (default: this one; in images: python)", KINDS),
    "max_restarts": (
        "max_restarts", int, "starts after failures; under SLURM, of those within 10 minutes (default: 10)",
        _MACHINES,
    ),
    "cpus_per_node": ("cpus_per_node", int, "CPUs of a host (SLURM's default: all, --exclusive)", _MACHINES),
    "gib_per_node": ("gib_per_node", int, "memory of a host in GiB (SLURM's default: all)", _MACHINES),
    "gpu_type": ("gpu_type", str, "of --gres=gpu:TYPE:N", ("slurm",)),
    "partition": ("partition", str, "of SLURM", ("slurm",)),
    "account": ("account", str, "of SLURM", ("slurm",)),
    "container": ("container", str, "image for srun --container-image (pyxis)", ("slurm",)),
    "container_mounts": ("container_mounts", str, "for it (default: this folder)", ("slurm",)),
    "image": ("image", str, "of the pods, with this package in it", _PODS),
    "claim": ("claim", str, "PersistentVolumeClaim of the workdir (default: the job's name)", _PODS),
    "queue": ("queue", str, "LocalQueue of Kueue", _PODS),
    "topology": ("topology", str, "node label: the job has one of its values to itself", ("jobset",)),
    "ray_version": ("ray_version", str, "in the image (default: 2.60.0)", ("rayjob",)),
    "hosts": ("hosts", str, "names for ssh, separated by commas; the first has process 0", ("ssh",)),
    "port": ("port", int, "free port of process 0 (default: 8476)", ("jobset", "ssh")),
}  # fmt: skip
_INSTEAD = {
    "container": "--image names the image of pods",
    "image": "--container names an image under SLURM",
    "partition": "--queue names a queue of Kueue",
    "nodes": "there is one process for each of --hosts",
}


class File(NamedTuple):
    """A file that is made, and not yet written.

    Attributes:
      kind: one of KINDS.
      path: of --out; "": none was given.
      job: what it starts.
      text: of the file.
      report: what became of the script of --from; "": there was none.
    """

    kind: str
    path: str
    job: Job
    text: str
    report: str


def main(argv: list[str]) -> int:
    """Writes a file, to stdout or --out.

    Raises:
      UserError: an option is wrong, missing, or cannot act in this kind of file.
    """
    made = make(argv)
    if made.report:
        print(made.report, file=sys.stderr)
    if made.path:
        save(made)
    else:
        print(made.text, end="")
    return ExitCode.DONE


def make(argv: list[str], known: Mapping[str, Any] = MappingProxyType({})) -> File:
    """A file by the options of this command.

    Args:
      argv: without the command's name.
      known: attributes of the job that count where no option says another; they win over --from.

    Raises:
      UserError: as `main`.
    """
    args = _parse(argv)
    fields: dict[str, Any] = {}
    report = ""
    if args.from_:
        try:
            with open(args.from_, encoding="utf-8", errors="replace") as f:
                text = f.read()
        except OSError as e:
            raise UserError(f"--from={args.from_}: {e.strerror}. Name an sbatch file.") from None
        script = from_script(text)
        if args.kind != "slurm":
            script = script.without_slurm()
        report = f"{args.from_}\n{script.report()}"
        fields = {f.name: getattr(script.job, f.name) for f in dataclasses.fields(Job)}
    given = {_FLAGS[name][0]: value for name, value in vars(args).items() if name in _FLAGS}
    fields |= known
    fields |= {name: value for name, value in given.items() if value is not None}
    job = _job(args, fields)
    return File(args.kind, args.out or "", job, write(args.kind, job), report)


def _parse(argv: list[str]) -> argparse.Namespace:
    cut = argv.index("--") if "--" in argv else len(argv)
    p = arguments.Parser(prog="python -m deepseek_jax.launch template", description=__doc__)
    p.add_argument("kind", choices=KINDS, help="of the file", metavar="|".join(KINDS))
    for name, (_, kind, text, kinds) in _FLAGS.items():
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        where = "" if kinds == KINDS else f" [{', '.join(kinds)}]"
        p.add_argument(*names, type=kind, help=text + where)
    repeated: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    p.add_argument(
        "--nccl", help="variable of NCCL, with or without NCCL_; may be repeated", **repeated
    )
    p.add_argument("--env", help="variable for the program; may be repeated", **repeated)
    p.add_argument(
        "--from", dest="from_", type=arguments.path, metavar="FILE", help="an sbatch file"
    )
    p.add_argument(
        "--out", type=arguments.path, metavar="FILE", help="write here (default: stdout)"
    )
    args = p.parse_args(argv[:cut])
    args.command = argv[cut + 1 :]
    for name, (_, _, _, kinds) in _FLAGS.items():
        value = getattr(args, name)
        if value is None:
            continue
        if args.kind not in kinds:
            instead = _INSTEAD.get(name, f"it acts in a file for {' or '.join(kinds)}")
            raise UserError(
                f"--{name}={value} has no effect for {args.kind}: {instead}. Leave it out."
            )
        low = 0 if name in ("gpus_per_node", "max_restarts") else 1
        if isinstance(value, int) and not low <= value <= 1 << 20:
            raise UserError(
                f"--{name}={value} is not between {low} and {1 << 20}. Give a number there."
            )
    if args.out and args.from_ and os.path.realpath(args.out) == os.path.realpath(args.from_):
        raise UserError(f"--out={args.out} is the file of --from. Name another one.")
    return args


def _job(args: argparse.Namespace, fields: dict[str, Any]) -> Job:
    if "time" in fields:
        fields["seconds"] = parse_time(fields.pop("time"))
    if isinstance(fields.get("hosts"), str):
        fields["hosts"] = tuple(h for h in fields["hosts"].split(",") if h)
    if args.kind == "ssh":
        fields["nodes"] = len(fields.get("hosts", ()))
    if args.python is None and args.kind in ("slurm", "ssh") and not fields.get("container"):
        fields["python"] = sys.executable
    fields["variables"] = fields.get("variables", {}) | _variables(args)
    command = list(args.command)
    before = [w for w in command if w.startswith("--workdir=")]
    if before and args.workdir and before != [f"--workdir={args.workdir}"]:
        raise UserError(
            f"--workdir={args.workdir}, and {before[0]} after --: they differ. Give one."
        )
    if before and not args.workdir:
        fields["workdir"] = before[-1].removeprefix("--workdir=")
    fields["command"] = tuple(w for w in command if w not in before)
    if command and not fields.get("workdir"):
        raise UserError("--workdir is missing. Name the folder of the run, which all hosts see.")
    return Job(**fields)


def _variables(args: argparse.Namespace) -> dict[str, str]:
    out = {}
    for flag, text in [*(("nccl", t) for t in args.nccl), *(("env", t) for t in args.env)]:
        name, equals, value = text.partition("=")
        if flag == "nccl" and not name.startswith("NCCL_"):
            name = f"NCCL_{name}"
        if not equals or not name.isidentifier() or not name.isascii():
            raise UserError(f"--{flag}={text} is not NAME=VALUE. Write it so.")
        known = meaning(name)
        if known and not known.kept:
            raise UserError(f"--{flag}={text} has no effect here: {known.text}. Leave it out.")
        out[name] = value
    return out


def save(made: File) -> None:
    """Writes it to its path: a whole file or none; one that bash runs may be executed.

    Raises:
      UserError: it cannot be written there.
    """
    path = made.path
    folder = os.path.dirname(path) or "."
    try:
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as f:
                f.write(made.text)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o755 if made.kind == "ssh" else 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise UserError(
            f"--out={path} cannot be written: {e.strerror}. Name another file."
        ) from None
