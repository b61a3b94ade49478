"""The plans that fit, quickest first.

All are estimated by arithmetic; the best few are compiled and predicted from their programs. How much longer
or shorter each part of those is than its estimate corrects the others, so that the next to be compiled is the
best of what is known by then.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from deepseek_jax.cli.texts import gb
from deepseek_jax.config.options import Config
from deepseek_jax.plan import skew as skews
from deepseek_jax.plan.advise import candidates
from deepseek_jax.plan.advise.candidates import Choice
from deepseek_jax.plan.advise.estimate import PARTS, Estimate, Work
from deepseek_jax.plan.advise.memory import Memory
from deepseek_jax.plan.advise.weights import Divided, Weights
from deepseek_jax.plan.rates import Rates

FACTORS = 0.25, 4.0  # an estimate's part is corrected by no less and no more


class Machine(NamedTuple):
    """What is planned for.

    Attributes:
      devices, gpus_per_host: in all, and of one host.
      room: bytes that a program may take of a device; None: not known.
      rates: of a device.
      on_gpu: whether that is a GPU.
    """

    devices: int
    gpus_per_host: int
    room: int | None
    rates: Rates
    on_gpu: bool = True


class Compiled(NamedTuple):
    """What the program of a plan says.

    Attributes:
      bytes: of a device.
      parts: seconds by PARTS.
      seconds: that compiling took.
      details: what plan says of it, for --json.
    """

    bytes: int
    parts: dict[str, float]
    seconds: float
    details: dict[str, Any]


class Plan(NamedTuple):
    """One plan.

    Attributes:
      bytes: of a device, as estimated.
      state: of them what lies there between steps.
      compiled: None: it was not.
    """

    choice: Choice
    bytes: int
    state: int
    estimate: Estimate
    rounds: int
    compiled: Compiled | None = None


class Found(NamedTuple):
    """Attributes:
    plans: that fit, one for each mesh, strategy, number of micro-batches, dispatch and offload: the quickest
      of what it may keep.
    tried: plans that were estimated.
    smallest: the one that needs the fewest bytes, whether it fits or not.
    """

    plans: list[Plan]
    tried: int
    smallest: Plan


def enumerate_plans(config: Config, weights: Weights, machine: Machine, skew: str) -> Found:
    """Everything that is valid and fits, in no order.

    Raises:
      candidates.Refused: nothing is valid.
    """
    plans: list[Plan] = []
    smallest: Plan | None = None
    tried = 0
    divided: dict[tuple[tuple[int, ...], str], Divided] = {}
    on_meshes = candidates.on_meshes(config, machine.devices, machine.gpus_per_host)
    for choice, configured in on_meshes:
        key = choice.mesh, choice.strategy
        if key not in divided:
            divided.clear()
            divided[key] = weights.divided(configured, choice.shape)
        best, least, n = _with_levers(choice, configured, divided[key], machine, skew)
        tried += n
        plans += best
        if smallest is None or least.bytes < smallest.bytes:
            smallest = least
    assert smallest is not None
    return Found(plans, tried, smallest)


def one_plan(config: Config, choice: Choice, weights: Weights, machine: Machine, skew: str) -> Plan:
    """A plan whatever it takes."""
    divided = weights.divided(config, choice.shape)
    work, memory = (
        _work(config, choice, divided, machine, skew),
        Memory(config, choice.shape, divided),
    )
    return Plan(
        choice,
        memory.total(choice),
        memory.state(choice.offload),
        work.with_levers(choice, machine.rates),
        work.rounds,
    )


def _work(config: Config, choice: Choice, divided: Divided, machine: Machine, skew: str) -> Work:
    rounds = skews.rounds_at(skew, config, choice.shape).rounds
    cluster = machine.gpus_per_host, machine.on_gpu
    return Work(config, choice.shape, divided, rounds, *cluster)


def _with_levers(
    choice: Choice, config: Config, divided: Divided, machine: Machine, skew: str
) -> tuple[list[Plan], Plan, int]:
    """(the quickest that fits of every way to offload, the smallest, how many there are)."""
    memory = Memory(config, choice.shape, divided)
    best: dict[tuple[str, ...], Plan] = {}
    work: Work | None = None
    smallest: Plan | None = None
    tried = 0
    for variant in candidates.levers(config, choice):
        tried += 1
        size = memory.total(variant)
        fits = machine.room is None or size <= machine.room
        is_smallest = smallest is None or size < smallest.bytes
        if not fits and not is_smallest:
            continue
        work = work or _work(config, choice, divided, machine, skew)
        estimate = work.with_levers(variant, machine.rates)
        plan = Plan(variant, size, memory.state(variant.offload), estimate, work.rounds)
        smallest = plan if is_smallest else smallest
        before = best.get(variant.offload)
        if fits and (before is None or estimate.seconds < before.estimate.seconds):
            best[variant.offload] = plan
    assert smallest is not None
    return list(best.values()), smallest, tried


class Corrections:
    """By what the parts of an estimate are multiplied, from plans that were compiled.

    Attributes:
      factors: by PARTS.
      bytes: by which estimated bytes are, beyond what is stored.
    """

    def __init__(self, compiled: Iterable[Plan] = ()) -> None:
        pairs = [(p, p.compiled) for p in compiled if p.compiled is not None]
        self.factors = {part: self._factor(part, pairs) for part in PARTS}
        over = [(c.bytes - p.state) / max(1, p.bytes - p.state) for p, c in pairs]
        self.bytes = statistics.median(over) if over else 1.0

    @staticmethod
    def _factor(part: str, pairs: list[tuple[Plan, Compiled]]) -> float:
        both = [(p.estimate.parts[part], c.parts[part]) for p, c in pairs]
        ratios = [is_ / said for said, is_ in both if said > 0 and is_ > 0]
        least, most = FACTORS
        return min(most, max(least, statistics.median(ratios))) if ratios else 1.0

    def seconds(self, plan: Plan) -> float:
        """Of its step: as predicted from its program, or as estimated and corrected."""
        if plan.compiled is not None:
            return sum(plan.compiled.parts.values())
        return sum(self.factors[part] * s for part, s in plan.estimate.parts.items())

    def size(self, plan: Plan) -> int:
        """Its bytes of a device, likewise."""
        if plan.compiled is not None:
            return plan.compiled.bytes
        return plan.state + round(self.bytes * (plan.bytes - plan.state))


class Ranked(NamedTuple):
    """Attributes:
    plans: the quickest first; those that were compiled and fit are among them.
    corrections: that the others were ranked with.
    refused: plans that turned out not to fit, or not to compile, with the reason.
    """

    plans: list[Plan]
    corrections: Corrections
    refused: list[tuple[Plan, str]]


def rank(
    plans: list[Plan],
    machine: Machine,
    compile_plan: Callable[[Plan], Compiled | str | None],
    most: int,
    seconds: float,
) -> Ranked:
    """Orders plans by the time of their step, compiling the best.

    Args:
      compile_plan: a plan's program, read; or why it has none; None: it takes too long, as others would.
      most: how many to compile that fit.
      seconds: none is begun that would not be done by then, if it took as long as the longest so far.
    """
    started = time.monotonic()
    done: dict[Choice, Plan] = {}
    refused: dict[Choice, tuple[Plan, str]] = {}
    corrections = Corrections()
    longest = 0.0
    order = _in_order(plans, corrections, machine)
    # As many refusals have a reason that further plans would meet as well.
    while sum(choice not in refused for choice in done) < most and len(refused) <= 2 * most:
        following = next((p for p in order if p.compiled is None), None)
        began = time.monotonic()
        if following is None or (longest and began - started + longest > seconds):
            break
        result = compile_plan(following)
        longest = max(longest, time.monotonic() - began)
        if result is None:
            break
        if isinstance(result, str):
            refused[following.choice] = following, result
        else:
            plan = done[following.choice] = following._replace(compiled=result)
            if machine.room is not None and result.bytes > machine.room:
                said = f"takes {gb(result.bytes)} of {gb(machine.room)}, as compiled"
                refused[following.choice] = plan, said
        corrections = Corrections(done.values())
        known = [done.get(p.choice, p) for p in plans if p.choice not in refused]
        order = _in_order(known, corrections, machine)
    fitting = [p for p in order if not _is_too_large(p, corrections, machine)]
    return Ranked(fitting, corrections, list(refused.values()))


def _in_order(plans: list[Plan], corrections: Corrections, machine: Machine) -> list[Plan]:
    """The quickest first, the simplest of equals; at the end those that may not fit, the smallest first."""

    def key(plan: Plan) -> tuple[float, float, int, int, Choice]:
        axes = sum(n > 1 for n in plan.choice.mesh)
        large = corrections.size(plan) if _is_too_large(plan, corrections, machine) else 0
        seconds = float(f"{corrections.seconds(plan):.4g}")
        return large, seconds, len(plan.choice.offload), axes, plan.choice

    return sorted(plans, key=key)


def _is_too_large(plan: Plan, corrections: Corrections, machine: Machine) -> bool:
    return machine.room is not None and corrections.size(plan) > machine.room
