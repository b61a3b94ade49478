"""How often a while loop of a compiled program runs, where that can be known before it runs."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek_jax.xla.hlo import Instruction, Module

MOST = 1_000_000  # turns after which a loop counts as of unknown length
ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
COMPARISON = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def trip_count(module: "Module", computation: str, loop: "Instruction") -> int | None:
    """The number of turns of a while loop, None if it depends on data.

    As the compiler noted it. Where a later pass dropped the note (pipelined collectives do), by taking the turns: only of the
    integers that the condition reads, from their first values.
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
        _index(i)
        for i in module.computations[condition].values()
        if i.opcode == "get-tuple-element"
    }
    state = {k: _value(module, computation, before.operands[k], lambda _: None) for k in read}
    for turns in range(MOST):
        carried = lambda i: state.get(_index(i)) if i.opcode == "get-tuple-element" else None
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


def _index(instruction: "Instruction") -> int:
    return int(re.search(r"\bindex=(\d+)", instruction.attributes)[1])


def _value(
    module: "Module", computation: str, name: str, argument: Callable[["Instruction"], int | None]
) -> int | None:
    """An integer scalar of a computation, given what it reads from outside; None if it depends on anything else."""
    i = module.computations[computation].get(name)
    if i is None:
        return None
    of = lambda operand: _value(module, computation, operand, argument)
    if i.opcode == "constant":
        return (
            {"true": 1, "false": 0}.get(i.operands[0])
            if not re.fullmatch(r"-?\d+", i.operands[0])
            else int(i.operands[0])
        )
    if i.opcode == "get-tuple-element":
        source = module.computations[computation].get(i.operands[0])
        if source is not None and source.opcode in ("fusion", "call"):
            return _called(module, computation, source, argument, _index(i))
        return argument(i)
    if i.opcode == "parameter":
        return argument(i)
    if i.opcode in ("copy", "bitcast", "convert"):
        return of(i.operands[0])
    if i.opcode in ("fusion", "call"):
        return _called(module, computation, i, argument, None)
    act = ARITHMETIC.get(i.opcode)
    if i.opcode == "compare":
        act = COMPARISON[re.search(r"direction=(\w+)", i.attributes)[1]]
    values = [of(o) for o in i.operands] if act else [None]
    return None if None in values else int(act(*values))


def _called(
    module: "Module",
    computation: str,
    caller: "Instruction",
    argument: Callable[["Instruction"], int | None],
    element: int | None,
) -> int | None:
    """The result of a fusion or call, or one element of it."""
    inner = (caller.called.get("calls") or caller.called.get("to_apply"))[0]
    root = module.roots.get(inner)
    if root is None or (element is not None and root.opcode != "tuple"):
        return None

    def given(parameter: "Instruction") -> int | None:
        if parameter.opcode != "parameter":
            return None
        return _value(module, computation, caller.operands[int(parameter.operands[0])], argument)

    return _value(module, inner, root.name if element is None else root.operands[element], given)
