"""When each instruction of a scheduled program would run, by the work it has and the rates of a device.

Three streams run beside each other: kernels in the order of the schedule, collectives one after
another, copies to and from the host. A kernel takes the longest of its operations at their rate and
its bytes at the memory's, and a launch besides. A collective that starts and ends apart is waited for
at its end, for as long as it still takes then: that wait is exposed, the rest of it hidden. Loops
multiply; of a conditional the dearest branch runs.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from deepseek_jax.plan.rates import Rates
from deepseek_jax.xla import hlo, loops, origin, program, work
from deepseek_jax.xla.loops import Visit

# Parts in which a loop of unknown length is that of the dispatch's further rounds.
OF_ROUNDS = ("dispatch", "experts", "combine")
BLOCKS = "experts/cpu_grouped_matmul.py"  # whose loops depend on the routing and are no rounds
# Devices of one host share the work of these with those of another, so that each fetches a part of the bytes.
SHARED = ("all-gather", "reduce-scatter", "all-reduce")


class Known(NamedTuple):
    """What is known of an instruction."""

    computation: str
    instruction: hlo.Instruction
    part: str  # of the model, as xla/origin.py names it
    phase: str  # pass over the model
    source: str  # line of this package, "experts/rounds.py:184"; "" if the text does not say
    operation: str  # the end of the JAX operation's name: custom gradients hide lines


class Cost(NamedTuple):
    """What an instruction takes in a step, all its runs together."""

    of: Known
    seconds: float
    times: float
    bound: str  # FLOPs | memory | launch | host: what takes most of it
    work: work.Work


class Wait(NamedTuple):
    """What a collective, or a copy to or from the host, takes in a step."""

    busy: float  # seconds that it runs
    exposed: float  # of them seconds in which no kernel runs


@dataclasses.dataclass
class Spent:
    """One run of a computation."""

    seconds: float = 0.0
    costs: list[Cost] = dataclasses.field(default_factory=list)
    waits: dict[str, Wait] = dataclasses.field(default_factory=dict)  # by instruction
    busy: float = 0.0  # of the collectives' stream

    def add(self, other: "Spent", times: float = 1) -> None:
        """Appends so many runs of another computation."""
        self.seconds += times * other.seconds
        self.busy += times * other.busy
        self.costs += [
            c._replace(seconds=times * c.seconds, times=times * c.times) for c in other.costs
        ]
        for name, wait in other.waits.items():
            self.wait(name, times * wait.busy, times * wait.exposed)

    def wait(self, name: str, busy: float, exposed: float) -> None:
        before = self.waits.get(name, Wait(0.0, 0.0))
        self.waits[name] = Wait(before.busy + busy, before.exposed + exposed)


class Program:
    """A compiled program, read once for any number of timelines.

    Args:
      text: `compiled.as_text()`.
      mesh_shape: `mesh.shape` of the mesh it was compiled for.
      share_a_host: of every axis longer than 1, how many devices along it share a host.
      on_gpu, assignments: as work.Reader has them.

    Attributes:
      unknown: custom calls of which only the bytes are known: target -> instructions.
      uncounted: loops of unknown length that are no rounds, counted as one turn, by source line.
    """

    def __init__(
        self,
        text: str,
        mesh_shape: Mapping[str, int],
        share_a_host: Mapping[str, int],
        on_gpu: bool = True,
        assignments: float | None = None,
    ) -> None:
        self.module = hlo.Module(text)
        self.reader = work.Reader(self.module, on_gpu, assignments)
        self.origin = origin.Origin(self.module)
        self.collectives = {c.name: c for c in program.collectives(text, mesh_shape)}
        self.share_a_host = share_a_host
        self.unknown: dict[str, set[str]] = defaultdict(set)
        self.uncounted: set[str] = set()
        self._known: dict[tuple[str, str], Known] = {}
        self._work: dict[tuple[str, str], work.Work] = {}

    def known(self, computation: str, i: hlo.Instruction, visit: Visit) -> Known:
        """Where an instruction comes from: a fusion with a matrix product from where the product does,
        what the compiler made itself from where the nearest does that it reads."""
        key = computation, i.name
        if key not in self._known:
            part, phase = self.origin.scope(computation, i, visit)
            _, named = next(self.reader.products(computation, i), (computation, i))
            if not self.module.calls(named):
                named = self.origin.source(computation, i, visit) or named
            operation = "/".join(named.op_name.split("/")[-2:])
            self._known[key] = Known(computation, i, part, phase, self._line(named), operation)
        return self._known[key]

    def work(self, computation: str, i: hlo.Instruction) -> work.Work:
        """What an instruction has to do."""
        key = computation, i.name
        if key not in self._work:
            self._work[key] = done = self.reader.of(computation, i)
            if done.unknown:
                self.unknown[done.unknown].add(i.name)
        return self._work[key]

    def _line(self, i: hlo.Instruction) -> str:
        for file, _, line in self.module.calls(i):
            _, found, path = file.rpartition("deepseek_jax/")
            if found:
                return f"{path}:{line}" if line else path
        return ""

    @functools.cached_property
    def further_rounds(self) -> bool:
        """Whether it has loops for further rounds of the dispatch."""
        places = loops.visits(self.module, lambda i: i.opcode == "while")
        return any(
            loops.trip_count(self.module, computation, i) is None
            and self.is_of_rounds(computation, i, visit)
            for computation, i, visit in places
        )

    def is_of_rounds(self, computation: str, loop: hlo.Instruction, visit: Visit) -> bool:
        """Whether a loop of unknown length is that of the dispatch's further rounds."""
        files = [file for file, _ in self.module.frames(loop)]
        if any(BLOCKS in file for file in files):
            return False
        return self.origin.scope(computation, loop, visit)[0] in OF_ROUNDS


def seconds_of_collective(kind: str, received: float, n: int, inside: int, rates: Rates) -> float:
    """Of one collective. Between hosts the network's part may take longer than the links'.

    Args:
      received: bytes that a device receives.
      n: devices that take part. inside: how many of them share a host.
    """
    seconds = received / rates.link
    if inside < n:
        outside = received * (n - inside) / (n - 1)
        outside /= inside if kind in SHARED else 1
        seconds = max(seconds, outside / rates.network)
    return seconds + rates.collective


class Timeline:
    """The time of a program on one device.

    Args:
      rounds: of the dispatch, in every MoE layer, or their mean.
      cheapest: of a conditional the cheapest branch runs, not the dearest.
    """

    def __init__(
        self, compiled: Program, rates: Rates, rounds: float = 1, cheapest: bool = False
    ) -> None:
        self.program = compiled
        self.module = compiled.module
        self.rates = rates
        self.rounds = rounds
        self.choose = min if cheapest else max

    def run(self) -> Spent:
        """One step."""
        return self._run(self.module.entry, Visit((), None, False))

    def seconds_of(self, c: program.Collective) -> float:
        """Of one collective, alone."""
        inside = 1
        for axis in c.axes:
            inside *= self.program.share_a_host.get(axis, 1)
        if "?" in c.axes or inside > c.group:
            inside = c.group
        return seconds_of_collective(c.kind, c.bytes, c.group, inside, self.rates)

    def _run(self, name: str, visit: Visit) -> Spent:
        spent = Spent()
        # When the two other streams are done with what they have been given.
        collectives = copies = 0.0
        under_way: dict[str, tuple[str, float, float]] = {}  # start -> (name, end, seconds)
        for i in self.module.computations[name].values():
            if i.opcode.endswith(("-done", "-update")):
                for start in filter(under_way.get, i.operands[:1]):
                    if i.opcode.endswith("-update"):
                        under_way[i.name] = under_way[start]
                        continue
                    label, end, seconds = under_way[start]
                    exposed = max(0.0, end - spent.seconds)
                    spent.wait(label, seconds, exposed)
                    spent.seconds += exposed
            elif (c := self._collective(i)) is not None:
                seconds = self.seconds_of(c)
                spent.busy += seconds
                begin = max(spent.seconds, collectives)
                collectives = begin + seconds
                if i.opcode.endswith("-start"):
                    under_way[i.name] = c.name, collectives, seconds
                else:
                    spent.wait(c.name, seconds, collectives - spent.seconds)
                    spent.seconds = collectives
            elif i.opcode == "copy-start" and "S(5)" in i.shape:
                seconds = hlo.arrays(i.shape)[0].bytes / self.rates.host_link
                copies = max(spent.seconds, copies) + seconds
                under_way[i.name] = i.name, copies, seconds
            elif i.opcode == "while":
                before = spent.busy
                waiting = collectives > spent.seconds
                self._loop(spent, name, i, visit)
                # What is under way shares the links with the loop's own collectives.
                collectives += waiting * (spent.busy - before)
            elif i.opcode in ("conditional", "call", "async-start"):
                inner = Visit(
                    visit.loops, (name, i), visit.conditional or i.opcode == "conditional"
                )
                runs = [self._run(c, inner) for names in i.called.values() for c in names]
                if i.opcode == "conditional":
                    self._host_reads(spent, name, i, visit, 1)
                    runs = [self.choose(runs, key=lambda run: run.seconds)]
                for run in runs:
                    spent.add(run)
            elif i.opcode not in work.FREE and program.kind_of(i) is None:
                self._kernel(spent, name, i, visit)
        return spent

    def _collective(self, i: hlo.Instruction) -> program.Collective | None:
        """The collective that an instruction is or, as XLA wraps some, starts."""
        inside = [i]
        if i.opcode == "async-start":
            called = [c for names in i.called.values() for c in names]
            inside = [j for c in called for j in self.module.computations[c].values()]
        found = (self.program.collectives.get(j.name) for j in inside)
        return next((c for c in found if c is not None), None)

    def _kernel(self, spent: Spent, name: str, i: hlo.Instruction, visit: Visit) -> None:
        done = self.program.work(name, i)
        multiply = sum(n / getattr(self.rates, kind) for kind, n in done.flops.items())
        if self.rates.vector:
            multiply += done.vector / self.rates.vector
        move = done.bytes / self.rates.memory
        launch = done.launches * self.rates.launch
        # A core of a CPU does one after the other.
        busy = max(multiply, move) if self.program.reader.on_gpu else multiply + move
        seconds = busy + launch
        bound = "FLOPs" if multiply > move else "memory"
        if launch > max(multiply, move):
            bound = "launch"
        spent.costs.append(Cost(self.program.known(name, i, visit), seconds, 1, bound, done))
        spent.seconds += seconds

    def _loop(self, spent: Spent, name: str, i: hlo.Instruction, visit: Visit) -> None:
        known = loops.trip_count(self.module, name, i)
        turns: float = self.rounds - 1 if known is None else known
        if known is None:
            if not self.program.is_of_rounds(name, i, visit):
                turns = 1
                self.program.uncounted.add(self.program.known(name, i, visit).source or i.name)
            self._host_reads(spent, name, i, visit, turns + 1)
        if turns:
            body = Visit((*visit.loops, known), (name, i), visit.conditional)
            spent.add(self._run(i.called["body"][0], body), turns)

    def _host_reads(
        self, spent: Spent, name: str, i: hlo.Instruction, visit: Visit, times: float
    ) -> None:
        """A GPU idles until the host has read what it decides by. A CPU is its host."""
        seconds = times * self.rates.host if self.program.reader.on_gpu else 0.0
        if seconds:
            known, nothing = self.program.known(name, i, visit), work.Work({}, 0.0, 0.0, 0)
            spent.costs.append(Cost(known, seconds, times, "host", nothing))
            spent.seconds += seconds


def described(reader: work.Reader, i: hlo.Instruction) -> str:
    """What kind of kernel an instruction is, in a few words."""
    if i.opcode == "custom-call":
        found = re.search(r'custom_call_target="([^"]*)"', i.attributes)
        return found[1] if found else i.opcode
    opcodes = reader.opcodes(i)
    if "dot" in opcodes:
        return "matrix product"
    telling = (
        "sort scatter gather reduce transpose dynamic-update-slice concatenate exponential copy convert"
    ).split()
    found_in = [opcode for opcode in telling if opcode in opcodes][:3]
    return " + ".join(found_in) or (i.opcode if i.opcode not in work.FUSIONS else "elementwise")
