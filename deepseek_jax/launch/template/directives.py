"""#SBATCH lines, read as sbatch reads them."""

import re
import shlex
from typing import NamedTuple

from deepseek_jax.errors import UserError

SHORT = {
    "A": "account", "a": "array", "b": "begin", "B": "extra-node-info", "C": "constraint",
    "c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile",
    "G": "gpus", "H": "hold", "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses",
    "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks", "O": "overcommit",
    "o": "output", "p": "partition", "Q": "quiet", "q": "qos", "S": "core-spec",
    "s": "oversubscribe", "t": "time", "v": "verbose", "W": "wait", "w": "nodelist",
    "x": "exclude",
}  # fmt: skip
# Those that take no value, or one only behind "=".
BARE = frozenset(
    "contiguous exclusive get-user-env hold ignore-pbs kill-on-invalid-dep nice no-kill no-requeue "
    "overcommit oversubscribe parsable propagate quiet reboot requeue spread-job stepmgr "
    "test-only use-min-nodes verbose wait".split()
)
LONG = BARE | frozenset(SHORT.values()) | frozenset(
    "bb bbf comment cores-per-socket cpu-freq cpus-per-gpu deadline export export-file gpu-bind gpu-freq "
    "gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint mail-type mail-user mem mem-bind "
    "mem-per-cpu mem-per-gpu mincpus network ntasks-per-core ntasks-per-gpu ntasks-per-node "
    "ntasks-per-socket open-mode prefer priority profile reservation segment signal sockets-per-node "
    "switches threads-per-core time-min tmp tres-bind tres-per-task wait-all-nodes wckey".split()
)  # fmt: skip


class Directive(NamedTuple):
    """One option of sbatch."""

    line: int  # of the file, from 1
    name: str  # its long name, also where the file abbreviates it
    value: str | None

    def __str__(self) -> str:
        return f"--{self.name}" + ("" if self.value is None else f"={shlex.quote(self.value)}")


def read(text: str) -> tuple[list[Directive], int]:
    """(options, the first line of the program below them, from 1).

    sbatch reads no further than the first command; ##SBATCH and what follows # are comments.

    Raises:
      UserError: a line has a quotation that does not end, or is of a heterogeneous job.
    """
    found: list[Directive] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("#SBATCH"):
            if line.strip() and not line.startswith("#"):
                return found, number
            continue
        try:
            words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        except ValueError as e:
            raise UserError(f"line {number}, {line.strip()!r}: {e}. Close the quotation.") from None
        if words[:1] in (["hetjob"], ["packjob"]):
            raise UserError(
                f"line {number}, {line.strip()!r}: the nodes of this job differ. Give the file of one kind."
            )
        found += _options(words, number)
    return found, len(lines) + 1


def _options(words: list[str], line: int) -> list[Directive]:
    found = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            given, equals, rest = word[2:].partition("=")
            name = _full(given)
            value = rest if equals else None
        elif re.match(r"-[A-Za-z]", word):
            name = SHORT.get(word[1], word[1])
            value = word[2:].removeprefix("=") or None
        else:
            continue  # sbatch ignores it as well
        if value is None and name not in BARE and words and not words[0].startswith("-"):
            value = words.pop(0)
        found.append(Directive(line, name, value))
    return found


def _full(given: str) -> str:
    """The option that an unambiguous beginning of its name stands for, as getopt has it."""
    if given in LONG:
        return given
    begun = [name for name in LONG if name.startswith(given)]
    return begun[0] if len(begun) == 1 else given
