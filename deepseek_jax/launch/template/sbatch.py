"""An sbatch file for another trainer, read: nodes, GPUs, names, time and variables, and what became of the
rest."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError
from deepseek_jax.launch.template import directives
from deepseek_jax.launch.template.directives import Directive
from deepseek_jax.launch.template.job import Job, format_time, parse_time
from deepseek_jax.launch.template.shell import Assignment, Shell

# Options of sbatch that keep their meaning, as they are.
_KEPT = frozenset(
    "begin chdir clusters comment constraint contiguous dependency error exclude exclusive export "
    "get-user-env hold licenses mail-type mail-user mem mem-per-cpu mem-per-gpu network nice nodelist "
    "output prefer priority qos reservation segment switches time-min tmp wckey".split()
)
_REPLACED = {
    "ntasks": "one process per node drives all of its GPUs",
    "signal": "SIGTERM to the processes saves; --stop_before says how early",
    "requeue": "the file has it",
    "no-requeue": "the file queues a stopped run again; its last lines say after which exit codes",
    "open-mode": "the file appends",
    "array": "the tasks of an array would be so many runs in one folder",
    "gpus-per-task": "one process per node drives all of its GPUs",
    "gpus-per-socket": "one process per node drives all of its GPUs",
    "gpu-bind": "one process per node drives all of its GPUs",
    "wait-all-nodes": "the processes wait for each other (--cluster_timeout)",
    "distribution": "there is one process per node",
    "hint": "there is one process per node, and it may use every CPU of the job",
}


_OF_SLURM = ("--partition", "--account", "--container", "--container_mounts")


class Line(NamedTuple):
    """What became of something in the file."""

    number: int
    what: str
    text: str


@dataclasses.dataclass
class Script:
    """An sbatch file, read.

    Attributes:
      job: what it says of the job; its command is the one given to `from_script`.
      became: what is in the job, with its option here.
      no_effect: variables that do nothing here, and why.
      left_out: what is not taken, and why.
      missing: options of ours that the file does not say.
    """

    job: Job
    became: list[Line]
    no_effect: list[Line]
    left_out: list[Line]
    missing: list[str]

    def without_slurm(self) -> "Script":
        """The same for what is not SLURM, where its options have no place."""
        of_slurm = [
            line
            for line in self.became
            if line.text.startswith("the same") or line.text in _OF_SLURM
        ]
        left = [Line(n, what, "SLURM's alone") for n, what, _ in of_slurm]
        job = dataclasses.replace(
            self.job, directives=(), setup=(), partition="", account="", gpu_type="", container="",
            container_mounts="",
        )  # fmt: skip
        became = [line for line in self.became if line not in of_slurm]
        return dataclasses.replace(self, job=job, became=became, left_out=self.left_out + left)

    def report(self) -> str:
        """The lists, for people."""
        lines = []
        for heading, rows in (
            ("taken", self.became),
            ("no effect here", self.no_effect),
            ("left out", self.left_out),
        ):
            lines += [
                f"{heading}:",
                *(f"  line {n}: {what}: {text}" for n, what, text in sorted(rows)),
            ]
        if self.missing:
            lines.append(f"not in the file: {', '.join(self.missing)}")
        return "\n".join(lines)


def from_script(text: str, command: Sequence[str] = ()) -> Script:
    """Reads an sbatch file for another trainer.

    Args:
      text: of the file.
      command: the program here; that of the file is the other trainer's.

    Raises:
      UserError: the file cannot be understood as a job of equal nodes.
    """
    found, body = directives.read(text)
    reader = _Reader({d.name: d for d in found}, Shell(text, body))
    job = Job(command=tuple(command), **reader.fields())
    return Script(job, reader.became, reader.no_effect, reader.left_out, reader.missing)


class _Reader:
    """Goes through the options, the last of each counts, then through the program below."""

    def __init__(self, options: dict[str, Directive], shell: Shell):
        self._options = options
        self._shell = shell
        self.became: list[Line] = []
        self.no_effect: list[Line] = []
        self.left_out: list[Line] = []
        self.missing: list[str] = []

    def fields(self) -> dict[str, Any]:
        """Attributes of a Job."""
        out: dict[str, Any] = {}
        for option, name in (
            ("job-name", "name"),
            ("partition", "partition"),
            ("account", "account"),
        ):
            if d := self._take(option, f"--{'job_name' if name == 'name' else name}"):
                out[name] = d.value or ""
        if d := self._take("time", "--time"):
            self._time(d, out)
        nodes = self._nodes()
        gpus, kind = self._gpus(nodes)
        cpus = self._cpus(nodes, gpus)
        out |= {"gpu_type": kind, "cpus_per_node": cpus}
        if nodes is None:
            self.missing.append("--nodes (1 is taken)")
        if gpus is None:
            self.missing.append("--gpus_per_node (8 is taken)")
        out |= {k: v for k, v in (("nodes", nodes), ("gpus_per_node", gpus)) if v is not None}
        kept = []
        for d in self._options.values():
            why = _REPLACED.get(d.name, _REPLACED["ntasks"] if d.name.startswith("ntasks") else "")
            if why:
                self.left_out.append(Line(d.line, str(d), why))
            else:
                # One that is not known belongs to a plugin of the site.
                known = d.name in directives.LONG
                text = "the same" if d.name in _KEPT or not known else "the same, unchecked"
                self.became.append(
                    Line(d.line, str(d), text if known else "the same, unknown here")
                )
                kept.append(str(d))
        out["directives"] = tuple(kept)
        return out | self._environment()

    def _take(self, option: str, ours: str) -> Directive | None:
        d = self._options.pop(option, None)
        if d:
            self.became.append(Line(d.line, str(d), ours))
        return d

    def _time(self, d: Directive, out: dict[str, Any]) -> None:
        if d.value and d.value.upper() in ("UNLIMITED", "INFINITE", "0"):
            return
        try:
            out["seconds"] = parse_time(d.value or "")
        except UserError:
            raise UserError(
                f"line {d.line}, {d}: not a time as sbatch has it. Correct it."
            ) from None
        self.became[-1] = Line(d.line, str(d), f"--time={format_time(out['seconds'])}")

    def _number(self, d: Directive | None) -> int | None:
        if d is None:
            return None
        value = re.match(r"\d+", d.value or "")
        if not value and "$" in (d.value or ""):
            self.left_out.append(Line(d.line, str(d), "sbatch does not expand variables"))
            return None
        if not value:
            raise UserError(
                f"line {d.line}, {d}: not a number. Put one there, or leave the line out."
            )
        return int(value[0])

    def _nodes(self) -> int | None:
        d = self._options.pop("nodes", None)
        if (nodes := self._number(d)) and d:  # of MIN-MAX the first
            self.became.append(Line(d.line, str(d), f"--nodes={nodes}"))
            return nodes
        tasks = self._number(self._options.get("ntasks"))
        each = self._number(self._options.get("ntasks-per-node"))
        return -(-tasks // each) if tasks and each else None

    def _tasks_per_node(self, nodes: int | None) -> int:
        each = self._number(self._options.get("ntasks-per-node"))
        tasks = self._number(self._options.get("ntasks"))
        return each or (tasks // nodes if tasks and nodes else 1) or 1

    def _gpus(self, nodes: int | None) -> tuple[int | None, str]:
        """(GPUs per node, their type)."""
        for name, factor in (
            ("gpus-per-node", 1.0),
            ("gres", 1.0),
            ("gpus-per-task", float(self._tasks_per_node(nodes))),
            ("gpus", 1 / (nodes or 1)),
        ):
            d = self._options.get(name)
            of_gres = "gpu" if name == "gres" else ""
            parts = [p for p in (d.value or "").split(",") if p.startswith(of_gres)] if d else []
            if not d or not parts:
                continue
            *kind, count = parts[0].removeprefix("gpu").removeprefix(":").split("(")[0].split(":")
            if not count.isdecimal():  # a kind alone is one of it
                kind, count = [count, *kind], "1"
            number = max(int(int(count) * factor), 1)
            if name != "gpus-per-task":  # which is among those that are left out
                del self._options[name]
                self.became.append(Line(d.line, str(d), f"--gpus_per_node={number}"))
            others = [p for p in (d.value or "").split(",") if p not in parts]
            if others:
                self.left_out.append(Line(d.line, ",".join(others), "not a GPU"))
            return number, kind[0] if kind else ""
        if found := self._shell.gpus_per_node():
            self.became.append(Line(found[0], found[1], f"--gpus_per_node={found[2]}"))
            return found[2], ""
        return None, ""

    def _cpus(self, nodes: int | None, gpus: int | None) -> int | None:
        for name, factor in (
            ("cpus-per-task", self._tasks_per_node(nodes)),
            ("cpus-per-gpu", gpus or 1),
        ):
            if d := self._options.pop(name, None):
                cpus = (self._number(d) or 1) * factor
                self.became.append(Line(d.line, str(d), f"--cpus_per_node={cpus}"))
                return cpus
        return None

    # The program below

    def _environment(self) -> dict[str, Any]:
        variables: dict[str, str] = {}
        setup: list[str] = []
        said: set[str] = set()
        for a in self._shell.assignments:
            meaning = a.meaning
            if meaning is None or not meaning.kept:
                if a.name in said or (meaning is None and not a.exported):
                    continue
                said.add(a.name)
                if meaning:
                    self.no_effect.append(Line(a.line, a.shown, meaning.text))
                else:
                    own = self._shell.uses(a.name)
                    why = (
                        "the script's own"
                        if own
                        else "not known here; --env gives it to the program"
                    )
                    self.left_out.append(Line(a.line, a.shown, why))
            elif not a.exported:
                continue
            elif a.name == "PYTHONPATH":
                self.left_out.append(Line(a.line, a.shown, "where the other trainer's code lies"))
            elif a.secret:
                why = "a secret: export it before sbatch, which passes it on"
                self.left_out.append(Line(a.line, f"{a.name}=...", why))
            else:
                self._keep(a, variables, setup)
        for number, text, why in self._shell.commands():
            self.left_out.append(Line(number, text, why))
        container = self._shell.option("container-image")
        mounts = self._shell.option("container-mounts")
        out: dict[str, Any] = {"variables": variables, "setup": tuple(setup)}
        for name, found in (("container", container), ("container_mounts", mounts)):
            if found and (value := self._shell.value(found[1])):
                self.became.append(Line(found[0], f"{name}={value}", f"--{name}"))
                out[name] = value
            elif found:
                why = f"made up when the script runs; give --{name}"
                self.left_out.append(Line(found[0], found[1], why))
        return out

    def _keep(self, a: Assignment, variables: dict[str, str], setup: list[str]) -> None:
        value = self._shell.value(a.text)
        if value is not None:
            variables[a.name] = value
            self.became.append(Line(a.line, a.shown, f"--env={shlex.quote(f'{a.name}={value}')}"))
        elif a.whole_line:
            setup.append(a.whole_line)
            self.became.append(Line(a.line, a.shown, "the same line, under SLURM"))
        else:
            why = f"made up when the script runs; give --env={a.name}=VALUE"
            self.left_out.append(Line(a.line, a.shown, why))
