"""What a launch script says about its environment, without running it."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.launch.template.variables import Meaning, meaning

_WORD = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|\$\(\(.*?\)\)|\$?\([^)]*\)|\$\{[^}]*\}|[^\s;&|"'`()])*"""
_ASSIGNMENT = re.compile(rf"""(?<![\w$'{{.-])([A-Z][A-Z0-9_]*)=({_WORD})""")
_REFERENCE = re.compile(r"\$(?:\{(\w+)(?::[-=]([^}$]*))?\}|(\w+))")
_DEFAULTED = re.compile(r"^\s*:\s+(.*)$")  # : "${NAME:=value}"
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")


class Assignment(NamedTuple):
    """NAME=VALUE somewhere in a script."""

    line: int
    name: str
    text: str  # the value as it is written
    exported: bool
    whole_line: str  # the line, where it is nothing but this export; else ""

    @property
    def meaning(self) -> Meaning | None:
        return meaning(self.name)

    @property
    def secret(self) -> bool:
        return bool(_SECRET.search(self.name))

    @property
    def shown(self) -> str:
        text = self.text or "..."
        return f"{self.name}={text if len(text) <= 50 else text[:47] + '...'}"


class Shell:
    """The lines of a script below its #SBATCH lines.

    Attributes:
      assignments: in order.
    """

    def __init__(self, text: str, first: int):
        """`first`: the line that the program begins with, from 1."""
        self._lines = [
            (number, line)
            for number, line in enumerate(text.splitlines(), 1)
            if number >= first and not line.lstrip().startswith("#")
        ]
        self._exported_later: set[str] = set()
        self.assignments = [
            a._replace(exported=a.exported or a.name in self._exported_later)
            for a in list(self._found())
        ]
        self._values = {a.name: a.text for a in self.assignments}

    def _found(self) -> Iterator[Assignment]:
        for number, line in self._lines:
            if defaulted := _DEFAULTED.match(line):
                for name, default in re.findall(r"\$\{([A-Z]\w*):=([^}]*)\}", defaulted[1]):
                    yield Assignment(number, name, default, True, "")
                continue
            export = re.match(r"\s*(?:export|declare -x)\s", line)
            if export and "=" not in line:
                self._exported_later |= set(line.split()[1:])
            matches = list(_ASSIGNMENT.finditer(line))
            alone = export and len(matches) == 1 and not line.rstrip().endswith("\\")
            for m in matches:
                # Before a command it is exported too, also inside of what a shell is given.
                alone_there = not line[: m.start()].strip() and not line[m.end() :].strip(" \t\\;")
                exported = bool(export) or not alone_there
                yield Assignment(number, m[1], m[2], exported, line.strip() if alone else "")

    def uses(self, name: str) -> bool:
        """Whether the script itself reads a variable."""
        return any(re.search(rf"\$\{{?{name}\b", line) for _, line in self._lines)

    def value(self, text: str, depth: int = 0) -> str | None:
        """The value of a word, where the script alone says it; None where it is made up at run time."""
        if text[:1] == "'" == text[-1:]:
            return text[1:-1]
        text = text[1:-1] if len(text) > 1 and text[0] == '"' == text[-1] else text
        if "$(" in text or "`" in text or depth > 5:
            return None

        def known(m: re.Match[str]) -> str:
            name, default = m[1] or m[3], m[2]
            other = self._values.get(name)
            if other is not None and m[0] not in other:
                value = self.value(other, depth + 1)
                return m[0] if value is None else value
            return m[0] if default is None else default

        out = _REFERENCE.sub(known, text)
        return None if "$" in out else out.replace('\\"', '"')

    def option(self, name: str) -> tuple[int, str] | None:
        """(line, value as it is written) of --NAME in a command."""
        for number, line in self._lines:
            if m := re.search(rf"--{name}[= ](\"[^\"]*\"|'[^']*'|[^\s\\]+)", line):
                return number, m[1]
        return None

    def gpus_per_node(self) -> tuple[int, str, int] | None:
        """(line, text, number), of torchrun's option or a variable that is called so."""
        for names in (r"--nproc[_-]per[_-]node", r"GPUS_PER_NODE|NUM_GPUS|NPROC_PER_NODE|NGPU"):
            for number, line in self._lines:
                for m in re.finditer(rf"(?<![\w$])(?:{names})[= ](\"[^\"]*\"|[^\s\\;]+)", line):
                    value = self.value(m[1].replace("\\$", "$"))
                    if value and value.isdecimal() and 0 < int(value) <= 64:
                        return number, m[0], int(value)
        return None

    def commands(self) -> Iterator[tuple[int, str, str]]:
        """(line, command, why it is left out) of those that prepare the old trainer or start it."""
        for number, line in self._lines:
            text = " ".join(line.split())
            if re.match(r"(module|ml|spack) ", text):
                yield number, text, "JAX brings its own CUDA (extras cuda12, cuda13)"
            elif re.match(r"(source|\.) .*|(conda|mamba|micromamba) (activate|run)", text):
                yield (
                    number,
                    text,
                    "--python names the interpreter of an environment with this package",
                )
            elif m := re.search(
                r"\b(torchrun|accelerate launch|deepspeed|torch\.distributed\.\w+)\b", text
            ):
                yield (
                    number,
                    m[0],
                    "one process per node needs no launcher; migrate reads its options",
                )
