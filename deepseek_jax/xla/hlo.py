"""The text of a compiled XLA program, parsed: its instructions and the Python calls that they come from.

Knows nothing of meshes or models. The text is `compiled.as_text()`, of the CPU or the GPU compiler.
"""

import math
import re
from typing import NamedTuple

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
        """The JAX operation it was made for, with the transformations around it; empty if the
        compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> dict[str, list[str]]:
        """Attribute -> names of the computations it calls. The end of an async operation names the
        one that its start calls."""
        if self.opcode in ("async-done", "async-update"):
            return {}
        return {
            a: [n.strip().lstrip("%") for n in (many or one).split(",")]
            for a, many, one in _CALLED.findall(self.attributes)
        }

    @property
    def element(self) -> int:
        """Of a get-tuple-element: which element of the tuple it takes."""
        found = re.search(r"\bindex=(\d+)", self.attributes)
        assert found is not None  # XLA writes it for every get-tuple-element
        return int(found[1])


class Frame(NamedTuple):
    """A Python call."""

    file: str
    function: str  # its qualified name
    line: int  # 0 if the text does not say


class Module:
    """A parsed program.

    Attributes:
      computations: instructions by computation, in the order of the text.
      roots: result of every computation.
      entry: name of the computation that runs first.
      name: of the program; "" if the text does not say.
      scheduled: the instructions of a computation are in the order in which they run.
    """

    def __init__(self, text: str):
        """Raises: ValueError: the text is not that of an XLA program."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = ""
        found = re.match(r"HloModule ([\w.\-]+)", text)
        self.name = found[1] if found else ""
        self.scheduled = "is_scheduled=true" in text[:10_000]
        self._tables: dict[str, dict[int, str]] = {}
        here: dict[str, Instruction] | None = None
        name = ""
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
        """(file, function) of the Python calls that made an instruction, innermost first; empty if
        the text does not say."""
        return [(frame.file, frame.function) for frame in self.calls(instruction)]

    def calls(self, instruction: Instruction) -> list[Frame]:
        """The Python calls that made an instruction, innermost first; empty if the text does not say."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self._calls(int(found[1])) if found else []

    def _calls(self, frame: int) -> list[Frame]:
        def table(name: str, key: int) -> str:
            return self._tables.get(name, {}).get(key, "")

        def number(text: str, key: str) -> int:
            found = re.search(rf"\b{key}=(\d+)", text)
            return int(found[1]) if found else 0

        # Frame 1 has no parent, so what is written there for "none" shows whether parents are
        # counted from 0 or from 1.
        offset = number(table("StackFrames", 1), "parent_frame_id")
        out = []
        while row := table("StackFrames", frame):
            place = table("FileLocations", number(row, "file_location_id"))
            file, function = number(place, "file_name_id"), number(place, "function_name_id")
            out.append(
                Frame(
                    table("FileNames", file),
                    table("FunctionNames", function),
                    number(place, "line"),
                )
            )
            parent = number(row, "parent_frame_id") - offset
            if parent >= frame:
                break
            frame = parent
        return out

    def producers(
        self, computation: str, instruction: Instruction
    ) -> list[tuple[str, Instruction]]:
        """(computation, instruction) of what an instruction reads.

        What a loop carries is what its body returns: an element of a loop's result, and of a body's
        argument, leads there.
        """
        here = self.computations[computation]
        read = [here[name] for name in instruction.operands if name in here]
        if (
            instruction.opcode == "get-tuple-element"
            and read
            and read[0].opcode in ("while", "parameter")
        ):
            body = read[0].called["body"][0] if read[0].opcode == "while" else computation
            root = self.roots.get(body)
            element = instruction.element
            if root and root.opcode == "tuple" and element < len(root.operands):
                return [(body, self.computations[body][root.operands[element]])]
        return [(computation, i) for i in read]


class Array(NamedTuple):
    """An array type."""

    dtype: str  # as XLA writes it: "bf16", "s32", "pred"
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        bits = re.match(r"(?:bf|[fsuc])(\d+)", self.dtype)
        return self.size * (int(bits[1]) / 8 if bits else float(self.dtype == "pred"))


def arrays(shape: str) -> list[Array]:
    """The arrays of an array or tuple type as XLA writes it."""
    return [
        Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))
        for dtype, dims in _ARRAY.findall(shape)
    ]


def shape_bytes(shape: str) -> int:
    """Bytes of an array or tuple type as XLA writes it."""
    return math.ceil(sum(a.bytes for a in arrays(shape)))


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
