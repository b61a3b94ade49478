"""What a compiled step communicates: every collective with its bytes, its mesh axes, how often it
runs and where it comes from.

Bytes are those that one device receives from others (it sends as many), by the fewest that each
kind needs in a group of n:

    all-gather        (n-1) x operand           the others' shards
    reduce-scatter    (n-1)/n x operand         the others' summands of its own shard
    all-reduce        2(n-1)/n x operand        a reduce-scatter and an all-gather
    all-to-all        (n-1)/n x operand         a device keeps its own part
    collective-permute  operand

where the operand is what one device puts in. A latency-optimal algorithm may send more.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from deepseek_jax.xla import hlo, loops, origin, replica_groups

# kind -> bytes received, from bytes put in and the size of the group.
RECEIVED: dict[str, Callable[[int, int], float]] = {
    "all-gather": lambda operand, n: operand * (n - 1),
    "reduce-scatter": lambda operand, n: operand * (n - 1) / n,
    "all-reduce": lambda operand, n: 2 * operand * (n - 1) / n,
    "all-to-all": lambda operand, n: operand * (n - 1) / n,
    "collective-permute": lambda operand, n: operand if n > 1 else 0,
    "ragged-all-to-all": lambda operand, n: operand * (n - 1) / n,
    "collective-broadcast": lambda operand, n: operand if n > 1 else 0,
}
# Between a start and its end these are work; the rest are names, views and other collectives.
WORK = (
    "fusion",
    "custom-call",
    "dot",
    "convolution",
    "while",
    "conditional",
    "call",
    "sort",
    "scatter",
    "gather",
    "reduce",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the program, as one device runs it."""

    kind: str  # a key of RECEIVED
    name: str  # the instruction
    bytes: int  # received each time, see the top of this file
    operand_bytes: int  # put in each time
    group: int  # devices that take part with this one, itself included
    axes: tuple[str, ...]  # mesh axes along which they lie; "?" in it: not whole axes
    loops: tuple[int | None, ...]  # trip counts around it, outermost first; None: unknown
    times: int  # per step, if every branch is taken; a loop of unknown length counts as one round
    conditional: bool  # in a branch, which may not be taken
    # (phase, part, share of the bytes), most first: the compiler combines collectives
    shares: tuple[tuple[str, str, float], ...]
    asynchronous: bool  # has a start and an end of its own
    overlapped: int  # operations of WORK that the schedule puts between them

    @property
    def phase(self) -> str:
        """forward | recompute | backward | optimizer | other: of most of its bytes."""
        return self.shares[0][0]

    @property
    def part(self) -> str:
        """Of the model, a part of origin.py or other: of most of its bytes."""
        return self.shares[0][1]

    @property
    def further(self) -> bool:
        """Whether it runs in a loop of unknown length: in every further round of the dispatch."""
        return None in self.loops

    @property
    def bytes_per_step(self) -> int:
        """Bytes received per step, or in one further round of every layer."""
        return self.bytes * self.times


class Memory(NamedTuple):
    """Bytes on one device, as the compiler planned them."""

    arguments: int  # state and batch
    results: int  # those of them that do not reuse an argument's memory
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return sum(self)


def memory(compiled: Any) -> Memory:
    """The memory plan of a compiled JAX function."""
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return Memory(
        m.argument_size_in_bytes, results, m.temp_size_in_bytes, m.generated_code_size_in_bytes
    )


def host_memory(compiled: Any) -> int:
    """Bytes of the host's memory that the program holds for one device: what is offloaded. XLA's
    CPU compiler counts it as the device's."""
    m = compiled.memory_analysis()
    return (
        m.host_argument_size_in_bytes
        + m.host_output_size_in_bytes
        - m.host_alias_size_in_bytes
        + m.host_temp_size_in_bytes
    )


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """All collectives of a compiled program, except those of a device with itself.

    Args:
      text: `compiled.as_text()`.
      mesh_shape: `mesh.shape` of the mesh it was compiled for, outermost axis first.
    """
    module = hlo.Module(text)
    sources = origin.Origin(module)
    found = [
        _collective(module, sources, mesh_shape, *place)
        for place in loops.visits(module, lambda i: kind_of(i) is not None)
    ]
    return [c for c in found if c.group > 1]


def by(found: Iterable[Collective], key: Callable[[Collective], Any]) -> dict[Any, int]:
    """Bytes per step, summed by a key, most first."""
    total: Counter = Counter()
    for c in found:
        total[key(c)] += c.bytes_per_step
    return dict(total.most_common())


def by_origin(found: Iterable[Collective]) -> dict[tuple[str, str], int]:
    """Bytes per step by (phase, part), most first; a combined collective is divided among those
    that it serves."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    for c in found:
        for phase, part, share in c.shares:
            total[phase, part] += share * c.bytes_per_step
    most_first = sorted(total.items(), key=lambda item: item[1], reverse=True)
    return {k: round(n) for k, n in most_first}


def most_in_flight(text: str) -> int:
    """The most collectives that the schedule of a compiled program has between start and end at
    once, in any of its computations."""
    module, most = hlo.Module(text), 0
    for body in module.computations.values():
        in_flight: set[str] = set()
        for i in body.values():
            called = (
                [c for names in i.called.values() for c in names]
                if i.opcode == "async-start"
                else []
            )
            if (kind_of(i) and i.opcode.endswith("-start")) or any(
                kind_of(j) for c in called for j in module.computations.get(c, {}).values()
            ):
                in_flight.add(i.name)
                most = max(most, len(in_flight))
            elif i.opcode.endswith("-done"):
                in_flight -= set(i.operands)
    return most


def kind_of(instruction: hlo.Instruction) -> str | None:
    """The kind of collective that an instruction is or starts; None if it is none."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in RECEIVED else None


def _collective(
    module: hlo.Module,
    sources: origin.Origin,
    mesh_shape: Mapping[str, int],
    computation: str,
    instruction: hlo.Instruction,
    visit: loops.Visit,
) -> Collective:
    kind = kind_of(instruction)
    assert kind is not None  # the caller visits collectives only
    here = module.computations[computation]
    operand = sum(here[name].bytes for name in instruction.operands if name in here)
    if kind == "ragged-all-to-all" and instruction.operands:
        # The other operands are its output buffer, offsets and sizes.
        operand = here[instruction.operands[0]].bytes
    group, axes = (
        replica_groups.pairs(instruction, mesh_shape)
        if kind == "collective-permute"
        else replica_groups.groups(instruction, mesh_shape)
    )
    start = (computation, instruction)
    if visit.caller and visit.caller[1].opcode == "async-start":
        start = visit.caller
    asynchronous = start[1].opcode.endswith("-start")
    overlapped = (
        _work_before_end(module.computations[start[0]], start[1])
        if asynchronous and module.scheduled
        else 0
    )
    # Tokens travel along other axes than these: what is gathered or summed along them in the MoE
    # layer is the experts' weights.
    of_weights = set(axes) <= {"data", "fsdp"}
    shares = sources.shares(computation, instruction, visit, moves_tokens=not of_weights)
    if of_weights:
        shares = tuple(
            (phase, "experts" if part in ("dispatch", "router") else part, n)
            for phase, part, n in shares
        )
    elif kind in (
        "all-to-all",
        "collective-permute",
    ):  # a pipeline hides more of the calls: no weight of the router moves so
        shares = tuple(
            (phase, "dispatch" if part == "router" else part, n) for phase, part, n in shares
        )
    received = round(RECEIVED[kind](operand, group))
    return Collective(
        kind,
        instruction.name,
        received,
        operand,
        group,
        axes,
        visit.loops,
        visit.times,
        visit.conditional,
        shares,
        asynchronous,
        overlapped,
    )


def _work_before_end(computation: dict[str, hlo.Instruction], start: hlo.Instruction) -> int:
    """Operations of WORK between a start and its end, in a scheduled computation."""
    names = list(computation)
    begin, work = names.index(start.name), 0
    held = {start.name}
    for name in names[begin + 1 :]:
        instruction = computation[name]
        if held & set(instruction.operands) and instruction.opcode.endswith(("-done", "-update")):
            if instruction.opcode.endswith("-done"):
                return work
            held.add(name)
        work += instruction.opcode in WORK
    return work
