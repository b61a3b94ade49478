"""How fast a compiled step could be, before a device has run it: `python -m deepseek_jax.plan --roofline`.

In: a step that XLA has compiled, and the rates of the hardware. Out: a dict of plain values for --json:
the time of every part of the model and pass over it, ideal and derated, exposed and hidden
communication, share of the peak, the largest costs with their source lines, at one round of the
dispatch and at as many as a stated skew takes. roofline_text.py says it to a person; timeline.py has
the method, xla/work.py what an instruction does.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.plan import skew as skews
from deepseek_jax.plan import topology
from deepseek_jax.plan.rates import Speed
from deepseek_jax.plan.timeline import Cost, Program, Spent, Timeline, described
from deepseek_jax.train.state import Layout

LARGEST = 10
FRAMES = 10  # of Python, that JAX keeps of an instruction by default
ASSUMED = (
    "a kernel takes the longest of its FLOPs at their rate and its bytes at the memory's, and a launch",
    "every operand is read once: nothing is left in a cache by the kernel before, nothing is read twice",
    "kernels and tiles are those that XLA takes without a GPU: autotuning, its own sort and CUDA graphs "
    "are not seen",
    "collectives follow one another and slow no kernel down; a wait is what is left at the end that the "
    "schedule gives them",
    "bytes of collectives are the fewest that each kind needs",
    "operations outside matrix products cost their bytes",
    "data loading, evaluation and checkpoints take no time of the device",
)

ON_CPU = (
    "a kernel takes the sum of its FLOPs, of what it computes outside products (VECTOR of xla/work.py) and "
    "of its bytes, each at its rate, and a launch",
    "rates are of so many devices at once, which share the cores: who waits leaves them to the others",
    "loops over the blocks of an expert are counted as one turn of each length, and experts in a pipeline's "
    "ticks without work as in the others, though nothing is routed to them",
    *ASSUMED[4:5],
    *ASSUMED[6:],
)


class Planned(NamedTuple):
    """What a program was compiled for."""

    config: Config
    mesh: jax.sharding.Mesh
    layout: Layout
    gpus_per_host: int = 8


def keep_source_lines() -> None:
    """Has JAX write into programs which Python lines made an instruction. Loops of further rounds are known
    by them, and a variable of the environment may have turned them off.
    """
    limit = "jax_traceback_in_locations_limit"
    if 0 <= getattr(jax.config, limit) < FRAMES:  # below 0: all frames
        jax.config.update(limit, FRAMES)


def predict(text: str, planned: Planned, speed: Speed, skew: str = "zipf") -> dict[str, Any]:
    """The prediction for one compiled step.

    Args:
      text: of the program, `compiled.as_text()`.
      speed: of the hardware.
      skew: "zipf" or a max_violation, see skew.py.

    Raises:
      UserError: the skew is none.
    """
    config, mesh, layout, gpus_per_host = planned
    rounds = skews.rounds_at(skew, config, dict(mesh.shape))
    share = topology.devices_per_host(mesh, gpus_per_host)
    t = config.train
    of_a_device = config.micro_batch * t.sequence_length / mesh.size
    assignments = of_a_device * config.model.num_experts_per_tok
    compiled = Program(text, mesh.shape, share, is_gpu(mesh), assignments)
    tokens = t.batch_size * t.sequence_length / mesh.size
    flops = topology.count_of(config, layout).flops_per_token * tokens
    several = compiled.further_rounds
    numbers = sorted({1, rounds.rounds}) if several else [1]

    def one(kind: str, number: int) -> dict[str, Any]:
        rates = getattr(speed, kind)
        spent = Timeline(compiled, rates, number).run()
        return _summary(compiled, spent, tokens, flops, speed.ideal.bf16) | {"rounds": number}

    by_rounds = [{kind: one(kind, n) for kind in ("ideal", "derated")} for n in numbers]
    main = by_rounds[-1]
    spent = Timeline(compiled, speed.derated, numbers[-1]).run()
    cheapest = Timeline(compiled, speed.derated, numbers[-1], cheapest=True).run().seconds
    return {
        "jax": jax.__version__,
        "rates": {kind: getattr(speed, kind)._asdict() for kind in ("ideal", "derated")},
        "sources": {"ideal": speed.sources, "derated": speed.reasons},
        "rounds": rounds._asdict() | {"in_the_program": several},
        "tokens_per_device": tokens,
        "model_flops_per_device": flops,
        **main,
        "at_one_round": by_rounds[0] if len(by_rounds) > 1 else None,
        "largest": largest(compiled, spent),
        "flops": _flops(spent, lambda c, kind: kind),
        "flops_of_parts": _flops(spent, lambda c, kind: c.of.part),
        "memory_bytes_moved": sum(c.times * c.work.bytes for c in spent.costs),
        "with_the_cheapest_branches": cheapest,
        "not_known": {
            "kernels": {name: len(found) for name, found in sorted(compiled.unknown.items())},
            "loops_counted_once": sorted(compiled.uncounted),
        },
        "assumed": list(ASSUMED if is_gpu(mesh) else ON_CPU),
    }


def is_gpu(mesh: jax.sharding.Mesh) -> bool:
    """Whether a mesh is of GPUs."""
    return mesh.devices.flat[0].platform != "cpu"


def _summary(
    compiled: Program, spent: Spent, tokens: float, flops: float, peak: float
) -> dict[str, Any]:
    """Seconds of a step by part and phase, and what follows."""
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    bound: dict[str, float] = defaultdict(float)
    for c in spent.costs:
        parts[c.of.part][c.of.phase] += c.seconds
        bound[c.bound] += c.seconds
    communication: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, wait in spent.waits.items():
        found = compiled.collectives.get(name)
        kind = found.kind if found else "copy to or from the host"
        for phase, part, share in found.shares if found else (("other", "other", 1.0),):
            key = phase, part, kind
            communication[key][0] += share * wait.busy
            communication[key][1] += share * wait.exposed
            if wait.exposed:
                parts["collectives"][phase] += share * wait.exposed
    busy = sum(wait.busy for wait in spent.waits.values())
    exposed = sum(wait.exposed for wait in spent.waits.values())
    return {
        "step_s": spent.seconds,
        "mfu": flops / spent.seconds / peak,
        "tokens_per_s_per_device": tokens / spent.seconds,
        "kernels": sum(c.times * c.work.launches for c in spent.costs),
        "bound_by": dict(bound),
        "communication": {"busy_s": busy, "exposed_s": exposed, "hidden_s": busy - exposed},
        "parts": {part: dict(phases) for part, phases in parts.items()},
        "collectives": [
            {"phase": phase, "part": part, "kind": kind, "busy_s": b, "exposed_s": e}
            for (phase, part, kind), (b, e) in sorted(
                communication.items(), key=lambda item: -item[1][0]
            )
        ],
    }


def largest(compiled: Program, spent: Spent, most: int = LARGEST) -> list[dict[str, Any]]:
    """The largest costs: kernels of one kind, for one line of the source and one pass, together."""
    groups: dict[tuple[str, ...], list[Cost]] = defaultdict(list)
    for c in spent.costs:
        what = described(compiled.reader, c.of.instruction)
        groups[c.of.part, c.of.phase, c.of.source, c.of.operation, what].append(c)
    total = spent.seconds or 1.0
    rows: list[dict[str, Any]] = []
    for (part, phase, source, operation, kind), costs in groups.items():
        first = max(costs, key=lambda c: c.seconds)
        seconds = sum(c.seconds for c in costs)
        rows.append(
            {
                "seconds": seconds,
                "share": seconds / total,
                "part": part,
                "phase": phase,
                "what": kind,
                "source": source,
                "operation": operation,
                "shape": first.of.instruction.shape.partition("{")[0].lstrip("("),
                "instruction": first.of.instruction.name,
                "times": sum(c.times for c in costs),
                "bound_by": first.bound,
                "flops": sum(c.times * sum(c.work.flops.values()) for c in costs),
                "bytes": sum(c.times * c.work.bytes for c in costs),
            }
        )
    return sorted(rows, key=lambda row: row["seconds"], reverse=True)[:most]


def _flops(spent: Spent, key: Callable[[Cost, str], str]) -> dict[str, float]:
    """FLOPs of a step by a key of instructions and kinds."""
    total: dict[str, float] = defaultdict(float)
    for c in spent.costs:
        for kind, n in c.work.flops.items():
            total[key(c, kind)] += c.times * n
    return dict(total)
