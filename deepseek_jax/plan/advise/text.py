"""Advice for a person: the table, a command line and a sentence for the best, and the guides' rules."""

from collections.abc import Callable

from deepseek_jax.cli.texts import gb, human, plural, table
from deepseek_jax.plan.advise import search
from deepseek_jax.plan.advise.advice import Advice, differences
from deepseek_jax.plan.advise.candidates import Choice

EXPLAINED = 3  # plans that get a command line and a sentence
ASSUMED = (
    "a step's parts follow one another at the derated rates",
    "what is not compiled is estimated by arithmetic, each part corrected by what the compiled ones showed",
    "every MoE layer is loaded as --skew says",
    "data loading, evaluation and checkpoints take no time of the devices",
)


def named(choice: Choice) -> str:
    """'fsdp 4 x expert 2, full_shard, all_to_all, 2 micro-batches, remat full'."""
    expert = choice.shape["expert"] > 1
    offloaded = f", {' and '.join(choice.offload)} offloaded" if choice.offload else ""
    dispatch = f", {choice.dispatch}" if expert else ""
    return (
        f"{mesh(choice)}, {choice.strategy}{dispatch}, {plural(choice.accumulation, 'micro-batch')}, "
        f"remat {choice.remat}{offloaded}"
    )


def mesh(choice: Choice) -> str:
    """'fsdp 4 x expert 2'."""
    return " x ".join(f"{a} {n}" for a, n in choice.shape.items() if n > 1) or "1 device"


def duration(seconds: float) -> str:
    """'1.78 s', '12.3 ms', '2,490 s'."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def sized(plan: search.Plan) -> str:
    """'12.3 GB with fsdp 8, ...'."""
    return f"about {gb(plan.bytes)} of a device with {named(plan.choice)}"


def does_not_fit(devices: int, machine: search.Machine, smallest: search.Plan) -> str:
    """What is said where nothing fits."""
    return (
        f"nothing fits --devices={devices} of {gb(machine.room or 0)}: the smallest plan takes "
        f"{sized(smallest)}."
    )


def text(advice: Advice, command: Callable[[search.Plan], str], top: int) -> str:
    """All of it.

    Args:
      command: makes a plan's command line.
      top: plans in the table.
    """
    return "\n".join(
        [
            *_heading(advice),
            "",
            _table(advice, top),
            "",
            *_explained(advice, command),
            *_guides(advice),
            "",
            "assumed: " + ";\n         ".join(ASSUMED) + ".",
        ]
    )


def _heading(advice: Advice) -> list[str]:
    hardware, room = advice.known.hardware, advice.machine.room
    compiled = sum(p.compiled is not None for p in advice.ranked.plans)
    memory = f", {gb(hardware.memory or 0)} each, {gb(room)} of it for a program" if room else ""
    lines = [
        f"{advice.machine.devices} x {hardware.name}, {advice.machine.gpus_per_host} of a host{memory}",
        f"{advice.tried:,} plans tried, {len(advice.every):,} fit (of each mesh, strategy and way to offload "
        f"what it may keep counted once); {compiled} compiled",
    ]
    if advice.known.stands_in:
        lines.append(
            f"XLA has no description of it here: compiled as for an {advice.known.stands_in.upper()}, the "
            "nearest, and timed at its own rates"
        )
    if advice.missing:
        alone = "" if compiled else "ranked by arithmetic alone. "
        lines.append(f"{alone}{advice.missing}")
    lines += [f"not {named(p.choice)}: {why}" for p, why in advice.ranked.refused]
    return lines


def _table(advice: Advice, top: int) -> str:
    head = [
        "",
        "mesh",
        "strategy",
        "dispatch",
        "micro",
        "kept",
        "offloaded",
        "bytes",
        "step",
        "tokens/s",
    ]
    rows = [[*head, "of peak", "bound by", "by"]]
    plans = [(str(i), p) for i, p in enumerate(advice.ranked.plans[:top], 1)]
    if isinstance(advice.baseline, search.Plan):
        plans.append(("as given", advice.baseline))
    rows += [_row(advice, label, p) for label, p in plans]
    return table(rows, right=False)


def _row(advice: Advice, label: str, plan: search.Plan) -> list[str]:
    c, seconds = plan.choice, advice.seconds(plan)
    room = advice.machine.room
    too_much = "!" if room is not None and advice.size(plan) > room else ""
    largest = max(advice.parts(plan).items(), key=lambda item: item[1])
    return [
        label,
        mesh(c),
        c.strategy,
        c.dispatch if c.shape["expert"] > 1 else "",
        str(c.accumulation),
        c.remat.removeprefix("save:"),
        ", ".join(c.offload),
        gb(advice.size(plan)) + too_much,
        duration(seconds),
        human(advice.tokens / seconds),
        f"{advice.mfu(plan):.1%}",
        f"{largest[0]} {largest[1] / seconds:.0%}",
        "program" if plan.compiled is not None else "arithmetic",
    ]


def _explained(advice: Advice, command: Callable[[search.Plan], str]) -> list[str]:
    lines = []
    for i, plan in enumerate(advice.ranked.plans[:EXPLAINED], 1):
        lines += [f"{i}. {command(plan)}", f"   {_why(advice, plan, i)}"]
    if isinstance(advice.baseline, str):
        lines.append(f"as given, the config does not run here: {advice.baseline}")
    return [*lines, ""]


def _why(advice: Advice, plan: search.Plan, number: int) -> str:
    first = number == 1
    other = advice.baseline if first else advice.best
    if not isinstance(other, search.Plan):
        part, seconds = max(advice.parts(plan).items(), key=lambda item: item[1])
        return f"The quickest that fits: {duration(seconds)} of {duration(advice.seconds(plan))} are {part}."
    name = "the config as given" if first else "plan 1"
    if plan.choice == other.choice:
        return f"It is {name}."
    gap = advice.seconds(plan) - advice.seconds(other)
    if abs(gap) < 1e-3 * advice.seconds(other):
        return f"As quick as {name}."
    found = [
        (p, s)
        for p, s in differences(advice, plan, other)
        if abs(s) >= 0.001 * advice.seconds(other)
    ]
    parts = ", ".join(
        f"{part} {'+' if seconds > 0 else '-'}{duration(abs(seconds))}"
        for part, seconds in found[:3]
    )
    word = "less" if gap < 0 else "more"
    room = advice.machine.room
    size = advice.size(other)
    fits = "" if room is None or size <= room else f" (which needs {gb(size)} and does not fit)"
    said = f"{duration(abs(gap))} {word} per step than {name}{fits}"
    return f"{said}: {parts}." if parts else f"{said}."


def _guides(advice: Advice) -> list[str]:
    rows = [["the guides decide by", "and recommend", "best such plan", "step", "of plan 1's"]]
    for rule, plan in advice.rules():
        if plan is None:
            rows.append([rule.asks, rule.says, "none fits or none is valid", "", ""])
            continue
        seconds = advice.seconds(plan)
        ratio = f"{seconds / advice.seconds(advice.best):.2f} x"
        rows.append([rule.asks, rule.says, named(plan.choice), duration(seconds), ratio])
    return [table(rows, right=False)]
