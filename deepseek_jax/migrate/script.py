"""Shell scripts that start a run, as SLURM and people have them: the command in them, variables filled in.

Assignments, arrays and #SBATCH lines are read, and nothing is run: what a substitution $(...) would give
stays as it is.
"""

import re
import shlex
from typing import NamedTuple

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.source import Entry, Rank, Source

ENDINGS = (".sh", ".bash", ".sbatch", ".slurm")
# What starts training, as a word of a line.
STARTS = re.compile(
    r"(^|[\s\"'/])(torchrun|accelerate\s+launch|deepspeed|llamafactory-cli\s+train|trl\s+sft|axolotl\s+train|"
    r"swift\s+(sft|pt)|megatron\s+(sft|pt)|python[\d.]*\s+(-\w+\s+)*(-m\s+\S+|\S+\.py))(\s|$)"
)
NOT_TRAINING = re.compile(
    r"^\s*(echo|pip|conda|source|module|cd|mkdir|huggingface-cli|hf|git|wandb)\b"
)
ARRAY = re.compile(
    r"^[ \t]*(?:export[ \t]+|declare[ \t]+-a[ \t]+)?(\w+)\+?=\((.*?)\)", re.MULTILINE | re.DOTALL
)
ASSIGNMENT = re.compile(r"^(\w+)=(.*)$", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?:\[[@*]\])?(?::-([^}]*))?\}|(\w+))")
SBATCH = re.compile(r"^#SBATCH\s+(--?[\w-]+)(?:[= \t][ \t]*(\S+))?", re.MULTILINE)
LONGEST = 1 << 17  # characters of a command line, as Linux has it
SHORT = {"N": "nodes", "n": "ntasks", "G": "gpus", "J": "job_name", "t": "time", "p": "partition"}


class Script(NamedTuple):
    """What a script says."""

    command: str  # its line that starts training, with variables filled in
    scheduler: Source | None  # of its #SBATCH lines


def read(text: str, name: str) -> Script:
    """A script's command line.

    Args:
      text: of the file.
      name: of the file, for messages.

    Raises:
      UserError: no line of it starts training.
    """
    scheduler = _scheduler(text, name)
    values = _known(scheduler)
    text = text.replace("\\\n", " ")

    def array(found: re.Match[str]) -> str:
        inner = "\n".join(
            line.split(" #")[0]
            for line in found[2].splitlines()
            if not line.strip().startswith("#")
        )
        values[found[1]] = " ".join([values.get(found[1], ""), *inner.split()]).strip()
        return ""

    text = ARRAY.sub(array, text)
    exported: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#") or NOT_TRAINING.match(line):
            continue
        assigned = _assigned(line)
        for name_, value in assigned:
            values[name_] = expanded(value, values)
            if line.lstrip().startswith("export ") and " " not in values[name_]:
                exported.append(f"{name_}={shlex.quote(values[name_])}")
        if not assigned and STARTS.search(expanded(line, values)):
            return Script(" ".join([*exported, _inner(expanded(line, values))]), scheduler)
    raise UserError(
        f"{name}: no line starts training by torchrun, accelerate, deepspeed or python. Give the line with "
        f"--command."
    )


def expanded(line: str, values: dict[str, str]) -> str:
    """A line with its variables, as far as they are known, filled in; `${NAME:-other}` where NAME is not. A
    line that would be longer than any command keeps its variables."""
    room = LONGEST

    def value(found: re.Match[str]) -> str:
        nonlocal room
        name, other = found[1] or found[3], found[2]
        new = values.get(name, found[0] if other is None else other)
        room -= len(new)
        return new if room >= 0 else found[0]

    for _ in range(4):  # variables of variables
        line = VARIABLE.sub(value, re.sub(r"\"(\$\{\w+\[[@*]\]\})\"", r"\1", line))
    return line


def _assigned(line: str) -> list[tuple[str, str]]:
    """What a line of assignments and nothing else sets; what a substitution would set is left open."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    words = words[1:] if words[:1] in (["export"], ["readonly"], ["local"]) else words
    pairs = [(m[1], m[2]) for w in words if (m := ASSIGNMENT.match(w))]
    if len(pairs) != len(words) or any(part in line for part in ("$(", "`")):
        return []
    return pairs


def _inner(line: str) -> str:
    """Of `srun ... bash -c "accelerate launch ..."` what stands in quotes."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return line
    inside = [w for w in words if " " in w and STARTS.search(w)]
    return inside[0] if inside else line


def _scheduler(text: str, name: str) -> Source | None:
    entries = []
    for found in SBATCH.finditer(text):
        key = found[1].lstrip("-").replace("-", "_")
        where = f"{name}:{text.count(chr(10), 0, found.start()) + 1} #SBATCH {found[1]}"
        entries.append(
            Entry(f"sbatch.{SHORT.get(key, key)}", found[2] or True, where, Rank.LAUNCHER_FLAG)
        )
    return Source(f"{name} #SBATCH", tuple(entries), "launcher") if entries else None


def _known(scheduler: Source | None) -> dict[str, str]:
    """What SLURM sets from the #SBATCH lines."""
    if scheduler is None:
        return {}
    nodes = scheduler.value("sbatch.nodes")
    gpus = gpus_of(
        str(scheduler.value("sbatch.gres") or scheduler.value("sbatch.gpus_per_node") or "")
    )
    out: dict[str, str] = {}
    if nodes:
        out |= {"SLURM_NNODES": str(nodes), "SLURM_JOB_NUM_NODES": str(nodes)}
    if gpus:
        out |= {"SLURM_GPUS_ON_NODE": gpus, "SLURM_GPUS_PER_NODE": gpus}
    return out


def gpus_of(text: str) -> str:
    """The number in "gpu:8", "gpu:h100:8", "8"; "" without one."""
    found = re.fullmatch(r"(?:gpu:)?(?:[\w-]+:)?(\d+)", text)
    return found[1] if found else ""
