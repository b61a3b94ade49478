"""What one instruction of a compiled program has to do: floating point operations, and bytes of
device memory read and written.

A fusion reads of its operands what its outputs need of them, and writes those; what is computed
inside never leaves the chip. An update in place counts the update, not the array. Every operand is
read once: caches that are too small for that are not seen, nor is what a cache still holds from the
instruction before. Operations that are no matrix products count as bytes alone.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.xla import kernels
from deepseek_jax.xla.hlo import Array, Instruction, Module, arrays

# Names, views, ends of what was started, and what is known before the program runs.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier "
    "add-dependency domain".split()
)
# These need their operands whole, or as large a share of them as is needed of the result.
WHOLE = frozenset(
    "dot reduce scatter sort concatenate pad reduce-window convolution custom-call transpose reverse "
    "select-and-scatter dynamic-update-slice".split()
)
SLICES = ("slice", "dynamic-slice", "gather")
# From jax 0.11 on a slice of a stack, or an update of one, may be a kernel on a stream beside the others. It
# counts as one among them: what else runs then wants the memory's bytes too.
FUSIONS = ("fusion", "fusion-start")
# What an element of the result costs a CPU beside its bytes, relative to each other: measured on one (x86
# with AVX-512), good to a factor of two. `plan calibrate` measures how many of them a second; all else costs
# its bytes alone.
VECTOR = {
    "exponential": 4.0,
    "exponential-minus-one": 4.0,
    "log": 4.0,
    "log-plus-one": 4.0,
    "tanh": 3.0,
    "logistic": 4.0,
    "sine": 6.0,
    "cosine": 6.0,
    "power": 6.0,
    "divide": 0.5,
    "sqrt": 0.5,
    "rsqrt": 0.5,
    "concatenate": 4.0,
    "transpose": 6.0,
    "gather": 2.0,
    "scatter": 2.0,
}
REDUCED = 4.0  # of an element that is added up
SORTED = 50.0  # of an element and each halving of the keys
SORTED_AT_ONCE = 2**11  # keys that one block of a bitonic sort holds in shared memory


def is_fusion(i: Instruction) -> bool:
    """Whether an instruction runs a fused computation."""
    return i.opcode in FUSIONS and "calls" in i.called


class Work(NamedTuple):
    """Of one run of an instruction.

    Attributes:
      flops: by kind (kernels.py): which unit of the device does them.
      read, written: bytes of device memory.
      launches: kernels.
      unknown: the target of a custom call whose operations are not known; "" else.
      vector: operations outside products by VECTOR, of a CPU; a GPU hides them behind their bytes.
    """

    flops: dict[str, float]
    read: float
    written: float
    launches: int = 1
    unknown: str = ""
    vector: float = 0.0

    @property
    def bytes(self) -> float:
        return self.read + self.written


class Reader:
    """Says what the instructions of a module have to do.

    Args:
      on_gpu: float32 products that ask for no precision are tf32, and a sort is bitonic.
      assignments: rows that the routing gives this device, on average, in one call of a grouped product;
        None: as many as there is room for.
    """

    def __init__(
        self, module: Module, on_gpu: bool = True, assignments: float | None = None
    ) -> None:
        self.module = module
        self.on_gpu = on_gpu
        self.float32 = "tf32" if on_gpu else "f32"
        self.assignments = assignments
        self._fusions: dict[str, _Fused] = {}

    def of(self, computation: str, i: Instruction) -> Work:
        """The work of an instruction that runs by itself: none of FREE, no loop, branch or call."""
        done = self._of(computation, i)
        if self.on_gpu or is_fusion(i):
            return done
        return done._replace(vector=self._vector(self.module.computations[computation], i))

    def _vector(self, here: dict[str, Instruction], i: Instruction) -> float:
        """Operations outside products of one instruction, by VECTOR."""
        size = _first(i).size
        if i.opcode in ("reduce", "reduce-window") and i.operands[0] in here:
            return REDUCED * _first(here[i.operands[0]]).size
        if i.opcode == "sort":
            return SORTED * size * math.log2(max(2, _first(i).dims[-1]))
        return VECTOR.get(i.opcode, 0.0) * size

    def _of(self, computation: str, i: Instruction) -> Work:
        here = self.module.computations[computation]
        operands = [here[name] for name in i.operands if name in here]
        read, written = float(sum(o.bytes for o in operands)), float(i.bytes)
        if is_fusion(i):
            f = self._fusion(i.called["calls"][0])
            read, written = f.passes * f.read, f.passes * f.written
            return Work(dict(f.flops), read, written, f.passes, vector=f.vector)
        if i.opcode == "dot":
            kind, flops_of_dot = kernels.dot(i, _types(operands), self.float32)
            return Work({kind: flops_of_dot}, read, written)
        if i.opcode == "custom-call":
            found = kernels.custom_call(i, _types(operands), self.float32, self.assignments)
            if found is None:
                return Work({}, read, written, unknown=kernels.target(i))
            return Work(found.flops, read, written - found.workspace)
        if i.opcode == "dynamic-update-slice":
            return Work({}, operands[1].bytes, operands[1].bytes)
        if i.opcode == "scatter":
            updates = operands[len(operands) // 2 + 1 :]
            touched = sum(o.bytes for o in updates)
            return Work({}, 2 * touched + operands[len(operands) // 2].bytes, touched)
        if i.opcode in SLICES:
            return Work({}, written + sum(o.bytes for o in operands[1:]), written)
        if i.opcode == "sort":
            passes = self._passes(i)
            return Work({}, passes * read, passes * written, passes)
        return Work({}, read, written)

    def products(self, computation: str, i: Instruction) -> Iterator[tuple[str, Instruction]]:
        """(computation, dot) of the matrix products in an instruction, those inside a fusion too."""
        if i.opcode == "dot":
            yield computation, i
        elif is_fusion(i):
            body = i.called["calls"][0]
            for inner in self.module.computations[body].values():
                yield from self.products(body, inner)

    def opcodes(self, i: Instruction) -> set[str]:
        """Of an instruction and all that is fused into it."""
        if not is_fusion(i):
            return {i.opcode}
        body = self.module.computations[i.called["calls"][0]].values()
        return set().union(*(self.opcodes(inner) for inner in body))

    def _passes(self, i: Instruction) -> int:
        """Times that a sort reads and writes its keys: on a GPU a bitonic sort, of which the stages that
        fit into shared memory run at once."""
        if not self.on_gpu:
            return 1
        found = re.search(r"dimensions=\{(\d+)\}", i.attributes)
        length = _first(i).dims[int(found[1]) if found else 0]
        stages = math.ceil(math.log2(max(2, length)))
        inside = min(stages, int(math.log2(SORTED_AT_ONCE)))
        return 1 + sum(stage - inside + 1 for stage in range(inside + 1, stages + 1))

    def _fusion(self, name: str) -> "_Fused":
        if name not in self._fusions:
            self._fusions[name] = self._read_fusion(name)
        return self._fusions[name]

    def _read_fusion(self, name: str) -> "_Fused":
        body = self.module.computations[name]
        needed = _Needed(body)
        written = needed.by_outputs(self.module.roots[name])
        flops: dict[str, float] = defaultdict(float)
        passes, vector = 1, 0.0
        for i in reversed(body.values()):
            vector += 0.0 if self.on_gpu else self._vector(body, i)
            inner: _Fused | None = None
            if i.opcode == "dot":
                operands = [body[o] for o in i.operands if o in body]
                kind, n = kernels.dot(i, _types(operands), self.float32)
                flops[kind] += n
            elif i.opcode == "sort":
                passes = max(passes, self._passes(i))
            elif i.opcode == "fusion":
                inner = self._fusion(i.called["calls"][0])
                for kind, n in inner.flops.items():
                    flops[kind] += n
                passes = max(passes, inner.passes)
                vector += inner.vector
            needed.by(i, inner)
        read = sum(needed.share(i) * i.bytes for i in body.values() if i.opcode == "parameter")
        by_number = {
            int(i.operands[0]): needed.share(i) for i in body.values() if i.opcode == "parameter"
        }
        return _Fused(flops, by_number, read, written, passes, vector)


class _Fused(NamedTuple):
    """What a fused computation does."""

    flops: dict[str, float]
    shares: dict[int, float]  # of each parameter: how much of it is read
    read: float
    written: float
    passes: int
    vector: float


class _Needed:
    """Elements of each instruction of a fused computation that its outputs need, from the end to the start.

    Slices of an array add up; its other readers most likely need the same elements of it.
    """

    def __init__(self, body: dict[str, Instruction]) -> None:
        self.body = body
        self.sizes = {i.name: _first(i).size for i in body.values()}
        self.sliced: dict[str, float] = defaultdict(float)
        self.whole: dict[str, float] = defaultdict(float)

    def of(self, i: Instruction) -> float:
        return min(self.sizes[i.name], self.whole[i.name] + self.sliced[i.name])

    def share(self, i: Instruction) -> float:
        return self.of(i) / (self.sizes[i.name] or 1)

    def by_outputs(self, root: Instruction) -> float:
        """Notes what the outputs need; returns the bytes that they write."""
        written = 0.0
        outputs = [self.body[o] for o in root.operands] if root.opcode == "tuple" else [root]
        for output in outputs:
            update = _in_place(self.body, output)
            if update is None:
                written += output.bytes
                self.whole[output.name] = self.sizes[output.name]
                continue
            new = update.operands[-1 if update.opcode == "scatter" else 1]
            written += self.body[new].bytes
            for operand in update.operands[1:]:
                self.sliced[operand] += self.sizes[operand]
            if update.opcode == "scatter":  # numbers are added to those that are there
                self.sliced[update.operands[0]] += self.sizes[new]
        return written

    def by(self, i: Instruction, inner: _Fused | None) -> None:
        """Notes what an instruction needs of its operands for what is needed of it.

        Args:
          inner: what it does, of a fusion in a fusion.
        """
        n, size = self.of(i), self.sizes[i.name] or 1
        if not n:
            return
        for position, name in enumerate(i.operands):
            if name not in self.body:
                continue
            whole = self.sizes[name]
            if i.opcode in SLICES:
                self.sliced[name] += n if position == 0 else n / size * whole
                continue
            if inner is not None:
                wanted = inner.shares.get(position, 0.0) * whole
            elif i.opcode == "dynamic-update-slice" and position == 0:
                wanted = n * (1 - self.sizes[i.operands[1]] / size)
            elif i.opcode in WHOLE or whole > size:
                wanted = n / size * whole
            else:  # element by element, or spread over more of them
                wanted = min(whole, n)
            self.whole[name] = max(self.whole[name], wanted)


def _in_place(body: dict[str, Instruction], output: Instruction) -> Instruction | None:
    """The update that an output of a fusion writes into its operand's own memory, where it is one:
    a slice or scatter into a parameter, with nothing but views around it."""

    def behind(i: Instruction) -> Instruction:
        while i.opcode in ("bitcast", "reshape") and i.operands[0] in body:
            i = body[i.operands[0]]
        return i

    update = behind(output)
    if update.opcode not in ("dynamic-update-slice", "scatter"):
        return None
    return update if behind(body[update.operands[0]]).opcode == "parameter" else None


def _first(i: Instruction) -> Array:
    """The type of an instruction's result, of a tuple its first."""
    found = arrays(i.shape)
    return found[0] if found else Array("pred", (0,))


def _types(operands: list[Instruction]) -> list[Array]:
    return [_first(o) for o in operands]
