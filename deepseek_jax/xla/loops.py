"""How often each instruction of a compiled program runs, as far as that can be known before it runs."""

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deepseek_jax.xla.hlo import Instruction, Module

MOST = 1_000_000  # turns after which a loop counts as of unknown length
ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "and": operator.and_,
    "or": operator.or_,
}
COMPARISON = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


class Visit(NamedTuple):
    """One way from the entry to a computation."""

    # trip counts of the loops around it, outermost first; None: not known before it runs
    loops: tuple[int | None, ...]
    caller: tuple[str, Instruction] | None  # (computation, instruction) that calls it
    conditional: bool  # below a branch of a conditional, which may not be taken

    @property
    def times(self) -> int:
        """How often a run of the program comes here; loops of unknown length count once."""
        return math.prod(n for n in self.loops if n is not None)


def visits(
    module: Module, wanted: Callable[[Instruction], bool]
) -> Iterator[tuple[str, Instruction, Visit]]:
    """(computation, instruction, visit) for every wanted instruction and every way to it from the entry.

    A branch of a conditional counts as if it always ran.
    """
    holds = _holders(module, wanted)

    def walk(name: str, visit: Visit) -> Iterator[tuple[str, Instruction, Visit]]:
        for instruction in module.computations[name].values():
            if wanted(instruction):
                yield name, instruction, visit
            for callees in instruction.called.values():
                wanted_callees = [c for c in callees if c in holds]
                if not wanted_callees:
                    continue
                loops = (
                    (*visit.loops, trip_count(module, name, instruction))
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

    yield from walk(module.entry, Visit((), None, False))


def _holders(module: Module, wanted: Callable[[Instruction], bool]) -> set[str]:
    """Computations with a wanted instruction in them or below them."""

    @functools.cache
    def holds(name: str) -> bool:
        body = module.computations.get(name, {}).values()
        return any(wanted(i) or any(holds(c) for cs in i.called.values() for c in cs) for i in body)

    return {name for name in module.computations if holds(name)}


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """The number of turns of a while loop; None if it depends on data.

    The compiler has noted it. A later pass may have dropped the note (pipelined collectives do):
    then the turns are taken here, of the integers that the condition reads, from their first
    values.
    """
    if noted := re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}', loop.attributes):
        return int(noted[1])
    condition, body = loop.called["condition"][0], loop.called["body"][0]
    after = module.roots.get(body)
    before = module.computations[computation].get(loop.operands[0])
    ends = module.roots.get(condition)
    if (
        after is None
        or ends is None
        or after.opcode != "tuple"
        or before is None
        or before.opcode != "tuple"
    ):
        return None
    read = {
        i.element
        for i in module.computations[condition].values()
        if i.opcode == "get-tuple-element"
    }
    state = {k: _value(module, computation, before.operands[k], lambda _: None) for k in read}

    def carried(i: Instruction) -> int | None:
        return state.get(i.element) if i.opcode == "get-tuple-element" else None

    for turns in range(MOST):
        goes_on = _value(module, condition, ends.name, carried)
        if goes_on is None:
            return None
        if not goes_on:
            return turns
        following = {k: _value(module, body, after.operands[k], carried) for k in read}
        if following == state:
            return None
        state = following
    return None


def _value(
    module: Module, computation: str, name: str, argument: Callable[[Instruction], int | None]
) -> int | None:
    """An integer scalar of a computation, given what it reads from outside; None if it depends on
    anything else."""
    i = module.computations[computation].get(name)
    if i is None:
        return None

    def of(operand: str) -> int | None:
        return _value(module, computation, operand, argument)

    if i.opcode == "constant":
        written = i.operands[0]
        number = re.fullmatch(r"-?\d+", written)
        return int(written) if number else {"true": 1, "false": 0}.get(written)
    if i.opcode == "get-tuple-element":
        source = module.computations[computation].get(i.operands[0])
        if source is not None and source.opcode in ("fusion", "call"):
            return _called(module, computation, source, argument, i.element)
        return argument(i)
    if i.opcode == "parameter":
        return argument(i)
    if i.opcode in ("copy", "bitcast", "convert"):
        return of(i.operands[0])
    if i.opcode in ("fusion", "call"):
        return _called(module, computation, i, argument, None)
    act = ARITHMETIC.get(i.opcode)
    if i.opcode == "compare":
        direction = re.search(r"direction=(\w+)", i.attributes)
        assert direction is not None  # XLA writes it for every comparison
        act = COMPARISON[direction[1]]
    if act is None:
        return None
    values = [of(o) for o in i.operands]
    return None if None in values else int(act(*values))


def _called(
    module: Module,
    computation: str,
    caller: Instruction,
    argument: Callable[[Instruction], int | None],
    element: int | None,
) -> int | None:
    """The result of a fusion or call, or one element of it."""
    called = caller.called
    inner = (called.get("calls") or called["to_apply"])[0]
    root = module.roots.get(inner)
    if root is None or (element is not None and root.opcode != "tuple"):
        return None

    def given(parameter: Instruction) -> int | None:
        if parameter.opcode != "parameter":
            return None
        return _value(module, computation, caller.operands[int(parameter.operands[0])], argument)

    return _value(module, inner, root.name if element is None else root.operands[element], given)
