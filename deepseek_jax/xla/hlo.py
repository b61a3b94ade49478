"""Reads the text of a compiled XLA program: its instructions, where they come from, and how often each runs.

Knows nothing of meshes or models; program.py does. The text is `compiled.as_text()`, of the CPU or the GPU compiler.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deepseek_jax.xla.loops import trip_count

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation|branch_computations|"
    r"called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_TABLE_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shape: str  # as written: "f32[2,3]{1,0}", "(f32[2], s32[])"
    operands: tuple[str, ...]  # names of instructions of the same computation
    attributes: str  # all that follows the operands

    @property
    def bytes(self) -> int:
        """Of the result, all parts of a tuple together."""
        return shape_bytes(self.shape)

    @property
    def op_name(self) -> str:
        """The JAX operation it was made for, with the transformations around it; empty if the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> dict[str, list[str]]:
        """Attribute -> names of the computations it calls. The end of an async operation names the one that its start calls."""
        if self.opcode in ("async-done", "async-update"):
            return {}
        return {
            a: [n.strip().lstrip("%") for n in (many or one).split(",")]
            for a, many, one in _CALLED.findall(self.attributes)
        }


class Visit(NamedTuple):
    """One way from the entry to a computation."""

    loops: tuple[
        int | None, ...
    ]  # trip counts of the loops around it, outermost first; None: not known before it runs
    caller: tuple[str, Instruction] | None  # (computation, instruction) that calls it
    conditional: bool  # below a branch of a conditional, which may not be taken

    @property
    def times(self) -> int:
        """How often a run of the program comes here; loops of unknown length count once."""
        return math.prod(n for n in self.loops if n is not None)


class Module:
    """A parsed program."""

    def __init__(self, text: str):
        """Raises: ValueError: the text is not that of an XLA program."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}  # computation -> its result
        self.entry = ""
        self.name = found[1] if (found := re.match(r"HloModule ([\w.\-]+)", text)) else ""
        self.scheduled = (
            "is_scheduled=true" in text[:10_000]
        )  # the lines of a computation are in the order they run
        self._tables: dict[str, dict[int, str]] = {}
        here, name = None, ""
        table: dict[int, str] | None = None
        for line in text.splitlines():
            if line.startswith((" ", "\t")):
                if here is not None and (found := _INSTRUCTION.match(line)):
                    instruction = _parse(found[1], found[2])
                    here[instruction.name] = instruction
                    if line.lstrip().startswith("ROOT "):
                        self.roots[name] = instruction
            elif found := _COMPUTATION.match(line):
                name = found[2]
                here = self.computations.setdefault(name, {})
                self.entry = name if found[1] else self.entry
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables.setdefault(line, {})
            elif table is not None and (found := _TABLE_ROW.match(line)):
                table[int(found[1])] = found[2] if found[2] is not None else found[3]
        if not self.entry:
            raise ValueError("this text is not an XLA program: it has no ENTRY computation")

    def frames(self, instruction: Instruction) -> list[tuple[str, str]]:
        """(file, function) of the Python calls that made an instruction, innermost first; empty if the text does not say."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self._frames(int(found[1])) if found else []

    def _frames(self, frame: int) -> list[tuple[str, str]]:
        table = lambda name, key: self._tables.get(name, {}).get(key, "")
        number = lambda text, key: (
            int(found[1]) if (found := re.search(rf"\b{key}=(\d+)", text)) else 0
        )
        # Frame 1 has no parent, so what is written there for "none" shows whether parents are counted from 0 or from 1.
        offset = number(table("StackFrames", 1), "parent_frame_id")
        out = []
        while row := table("StackFrames", frame):
            place = table("FileLocations", number(row, "file_location_id"))
            file, function = number(place, "file_name_id"), number(place, "function_name_id")
            out.append((table("FileNames", file), table("FunctionNames", function)))
            parent = number(row, "parent_frame_id") - offset
            if parent >= frame:
                break
            frame = parent
        return out

    def producers(
        self, computation: str, instruction: Instruction
    ) -> list[tuple[str, Instruction]]:
        """(computation, instruction) of what an instruction reads.

        What a loop carries is what its body returns: an element of a loop's result, and of a body's argument, leads there.
        """
        here = self.computations[computation]
        read = [here[name] for name in instruction.operands if name in here]
        if (
            instruction.opcode == "get-tuple-element"
            and read
            and read[0].opcode in ("while", "parameter")
        ):
            body = read[0].called["body"][0] if read[0].opcode == "while" else computation
            root, index = (
                self.roots.get(body),
                int(re.search(r"\bindex=(\d+)", instruction.attributes)[1]),
            )
            if root and root.opcode == "tuple" and index < len(root.operands):
                return [(body, self.computations[body][root.operands[index]])]
        return [(computation, i) for i in read]

    def visits(
        self, wanted: Callable[[Instruction], bool]
    ) -> Iterator[tuple[str, Instruction, Visit]]:
        """(computation, instruction, visit) for every wanted instruction and every way to it from the entry.

        A branch of a conditional counts as if it always ran.
        """
        holds = self._holders(wanted)

        def walk(name: str, visit: Visit) -> Iterator[tuple[str, Instruction, Visit]]:
            for instruction in self.computations[name].values():
                if wanted(instruction):
                    yield name, instruction, visit
                for callees in instruction.called.values():
                    wanted_callees = [c for c in callees if c in holds]
                    if not wanted_callees:
                        continue
                    loops = (
                        (*visit.loops, trip_count(self, name, instruction))
                        if instruction.opcode == "while"
                        else visit.loops
                    )
                    inner = Visit(
                        loops,
                        (name, instruction),
                        visit.conditional or instruction.opcode == "conditional",
                    )
                    for callee in wanted_callees:
                        yield from walk(callee, inner)

        yield from walk(self.entry, Visit((), None, False))

    def _holders(self, wanted: Callable[[Instruction], bool]) -> set[str]:
        """Computations with a wanted instruction in them or below them."""

        @functools.cache
        def holds(name: str) -> bool:
            body = self.computations.get(name, {}).values()
            return any(
                wanted(i) or any(holds(c) for cs in i.called.values() for c in cs) for i in body
            )

        return {name for name in self.computations if holds(name)}


def shape_bytes(shape: str) -> int:
    """Bytes of an array or tuple type as XLA writes it."""
    total = 0.0
    for dtype, dims in _ARRAY.findall(shape):
        size = math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
        bits = re.match(r"(?:bf|[fsuc])(\d+)", dtype)
        total += size * (int(bits[1]) / 8 if bits else float(dtype == "pred"))
    return math.ceil(total)


def _closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _parse(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    shape, rest = text[:end], text[end:].lstrip()
    bracket = rest.find("(")
    close = _closing(rest, bracket)
    inside = re.sub(r"/\*.*?\*/", "", rest[bracket + 1 : close - 1])
    operands = tuple(
        re.findall(r"%([\w.\-]+)", inside)
        if "%" in inside
        else (o.strip() for o in inside.split(",") if o.strip())
    )
    return Instruction(name, rest[:bracket], shape, operands, rest[close:].lstrip(", "))
