"""A file that starts the new run on a cluster: --template, made by launch/template."""

import os
import shlex
from collections.abc import Sequence
from typing import Any

from deepseek_jax.config import paths
from deepseek_jax.errors import UserError
from deepseek_jax.launch.template import command
from deepseek_jax.launch.template.job import KINDS
from deepseek_jax.migrate import launch, script
from deepseek_jax.migrate.arithmetic import devices
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.reading import read_text

OPTION = "--template"
ENDINGS = {"slurm": ".sbatch", "jobset": ".jobset.yaml", "rayjob": ".rayjob.yaml", "ssh": ".sh"}
SUBMIT = {
    "slurm": "sbatch",
    "jobset": "kubectl apply -f",
    "rayjob": "kubectl apply -f",
    "ssh": "bash",
}


def make(m: Migration, given: str, config: str, files: Sequence[str]) -> command.File:
    """The file, not yet written.

    Args:
      m: the migration, done.
      given: of --template: a kind, and options of `launch template` behind it.
      config: path of the new config.
      files: that are migrated; of a SLURM script the names, the time and the variables are taken.

    Raises:
      UserError: an option is wrong or missing, or means other devices than the migration.
    """
    words = _words(given)
    kind = words[0]
    count = m.devices or devices.world(m) or 1
    hosts = devices.hosts(m, count)
    if count % hosts:
        raise UserError(
            f"{count} GPUs are not divided by {hosts} hosts. Give --gpus_per_node with {OPTION}."
        )
    name = os.path.basename(os.path.normpath(launch.workdir(m)))
    known: dict[str, Any] = {
        "nodes": hosts,
        "gpus_per_node": count // hosts,
        "workdir": launch.workdir(m),
        "name": _kubernetes(name) if kind in ("jobset", "rayjob") else name,
    }
    old = [f"--from={f}" for f in files if f.endswith(script.ENDINGS) and _is_of_slurm(f)]
    if any(w.partition("=")[0] == "--from" for w in words):
        old = []
    found = command.make([*words, *old[:1], "--", *launch.arguments(m, config)], known)
    there = found.job.nodes * max(found.job.gpus_per_node, 1)
    if there != count:
        raise UserError(
            f"{OPTION}={given!r} starts {found.job.nodes} hosts with {found.job.gpus_per_node} GPUs each, "
            f"and the migrated run has {count}. Give --devices={there}, or hosts for {count}."
        )
    if not found.path:
        path = os.path.splitext(config)[0] + ENDINGS[kind]
        beside = {path: lambda file: _is_ours(file, found.text)}
        paths.check_output("--out", config, (), beside)
        found = found._replace(path=path)
    paths.check_output(f"--out of {OPTION}", found.path, [*files, config])
    return found


def submitted(made: command.File) -> str:
    """The command that starts it."""
    return f"{SUBMIT[made.kind]} {shlex.quote(made.path)}"


def _words(given: str) -> list[str]:
    try:
        words = shlex.split(given)
    except ValueError as e:
        raise UserError(f"{OPTION}={given!r} cannot be read: {e}. Close the quotation.") from None
    if not words or words[0] not in KINDS:
        raise UserError(
            f"{OPTION}={given!r}: the first word is no kind of file. Choose of {', '.join(KINDS)}."
        )
    if "--" in words:
        raise UserError(
            f"{OPTION}={given!r}: the program behind -- is that of the migration. Leave it out."
        )
    return words


def _kubernetes(name: str) -> str:
    """A name that Kubernetes takes."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower())
    return kept.lstrip("-0123456789")[:40].rstrip("-") or "train"


def _is_of_slurm(file: str) -> bool:
    return any(line.startswith("#SBATCH") for line in read_text(file, file).splitlines())


def _is_ours(file: str, text: str) -> bool:
    """Whether a file was written from the same template: its first two lines never differ."""
    try:
        with open(file, encoding="utf-8", errors="replace") as f:
            return [next(f, ""), next(f, "")] == text.splitlines(keepends=True)[:2]
    except OSError:
        return False
