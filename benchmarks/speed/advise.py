"""How good the advisor's first choice is: measured beside other plans that it enumerates, on virtual devices
of this CPU.

  python -m benchmarks advise [--config=configs/tiny.py] [--devices=8] [--best=10] [--sample=6] [--steps=6]
                              [--seconds=20] [--json] [--config.KEY=...]

Measures this machine's rates as `plan calibrate` does, ranks every plan as `plan advise --hardware=cpu` does,
compiling the best three, and then runs the first --best of the ranking and --sample of the others, drawn at
random but for the same reason always: all are too many to compile. Steps are timed in turns. Says how far the
first choice is from the quickest of all that were measured. Tokens are drawn by Zipf's law.
"""

import statistics
import sys
from typing import Any

import jax
import numpy as np

from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli import texts
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.plan import host, options, rates, topology
from deepseek_jax.plan.advise import candidates, command, hardware, programs, search
from deepseek_jax.plan.advise.text import named
from deepseek_jax.plan.advise.weights import Weights
from deepseek_jax.plan.calibrate import measure
from deepseek_jax.plan.tune.steps import Step
from deepseek_jax.runtime.compile_cache import use_cache

COMPILED = 3
SKEW = "zipf"
WITHIN = 1.1  # of the quickest: what the first choice should be


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--devices", type=int, default=8, help="Virtual devices of this CPU.")
    parser.add_argument("--best", type=int, default=10, help="Of the ranking, to be measured.")
    parser.add_argument("--sample", type=int, default=6, help="Others to be measured.")
    parser.add_argument("--steps", type=int, default=6, help="Steps of each that count.")
    parser.add_argument("--seconds", type=float, default=20.0, help="Of measuring rates.")
    jax.config.update("jax_platforms", "cpu")
    own, config = options.read(parser, sys.argv[1:], "configs/tiny.py")
    _, given = parser.parse_known_args(sys.argv[1:])
    if not any(flag.startswith("--config=") for flag in given):
        given = ["--config=configs/tiny.py", *given]
    devices = topology.cpu_devices(own.devices)
    use_cache(config.compile.cache_dir, warn=lambda line: print(line, file=sys.stderr))
    others = host.Others()
    found = measure.calibrated(devices, own.seconds, show=False)
    known = hardware.Known("cpu", command.CPU, rates.of_measured(None, found.as_json()), "")
    cluster = search.Machine(own.devices, own.devices, None, known.speed.derated, on_gpu=False)
    ranked, tried = _ranked(config, known, cluster, given)
    plans = _chosen(ranked.plans, own.best, own.sample)
    times, refused = _timed(config, plans, devices, own.steps)
    rows: list[dict[str, Any]] = [
        {
            "rank": rank,
            "plan": named(plan.choice),
            "predicted_s": ranked.corrections.seconds(plan),
            "measured_s": statistics.median(times[rank]),
            "fastest_s": min(times[rank]),
            "slowest_s": max(times[rank]),
        }
        for rank, plan in plans.items()
        if rank in times
    ]
    quickest = min(rows, key=lambda row: row["measured_s"])
    first = rows[0]
    result = {
        "machine": machine(),
        "other_cores": others.cores(),
        "calibration": found.as_json(),
        "tried": tried,
        "rows": rows,
        "refused": refused,
        "first_of_quickest": first["measured_s"] / quickest["measured_s"],
    }
    report(own, result, text)
    return 0


def _ranked(
    config: Config, known: hardware.Known, cluster: search.Machine, given: list[str]
) -> tuple[search.Ranked, int]:
    """The ranking, and how many plans were estimated."""
    one = command.alone(config)
    _, layout = topology.lay_out(one, topology.cpu_devices(1))
    found = search.enumerate_plans(config, Weights(one, layout), cluster, SKEW)

    def flags_of(plan: search.Plan) -> list[str]:
        return candidates.flags(config, given, plan.choice)

    compiler = programs.Compiler(known, cluster, SKEW, flags_of, 1800.0)

    def compiled(plan: search.Plan) -> search.Compiled | str | None:
        print(f"compiling {named(plan.choice)} ...", file=sys.stderr)
        return compiler(plan)

    return search.rank(found.plans, cluster, compiled, COMPILED, 1800.0), found.tried


def _chosen(plans: list[search.Plan], best: int, sample: int) -> dict[int, search.Plan]:
    """Plans by their place in the ranking. Offloading does nothing on a CPU, whose memory is the host's."""
    here = [p for p in plans if not p.choice.offload]
    rest = np.random.default_rng(0).permutation(np.arange(best, len(here)))[:sample]
    return {int(i) + 1: here[i] for i in (*range(min(best, len(here))), *sorted(rest))}


def _timed(
    config: Config, plans: dict[int, search.Plan], devices: list[jax.Device], steps: int
) -> tuple[dict[int, list[float]], dict[int, str]]:
    """Seconds of the steps that count, all plans in turns, and why some did not run."""
    ready: dict[int, Step] = {}
    refused = {}
    for rank, plan in plans.items():
        try:
            ready[rank] = Step(candidates.configured(config, plan.choice), devices)
            print(f"{rank}: {named(plan.choice)}", file=sys.stderr, flush=True)
        except UserError as e:
            refused[rank] = str(e)
    times: dict[int, list[float]] = {rank: [] for rank in ready}
    for turn in range(steps + 1):
        for rank, step in ready.items():
            seconds = step.run()
            if turn:
                times[rank].append(seconds)
    return times, refused


def sentence(r: dict[str, Any]) -> str:
    """Of docs/speed.md."""
    plans = f"of {r['tried']:,} plans for `tiny` on {r['machine']['devices']} virtual devices"
    return (
        f"{plans} the advisor's first choice takes {r['first_of_quickest']:.2f} of the quickest of the "
        f"{len(r['rows'])} that were run"
    )


def text(r: dict[str, Any]) -> str:
    """For a person."""
    rows = [["rank", "plan", "predicted", "measured", "fastest to slowest"]]
    for row in sorted(r["rows"], key=lambda row: row["measured_s"]):
        span = f"{row['fastest_s'] * 1e3:,.0f} to {row['slowest_s'] * 1e3:,.0f}"
        seconds = (f"{row[k] * 1e3:,.0f} ms" for k in ("predicted_s", "measured_s"))
        rows.append([str(row["rank"]), row["plan"], *seconds, span])
    lines = [texts.table(rows, right=False)]
    lines += [f"{rank} does not run: {why}" for rank, why in r["refused"].items()]
    ratio = r["first_of_quickest"]
    verdict = "within" if ratio <= WITHIN else "not within"
    lines.append(
        f"{r['tried']:,} plans; the first choice takes {ratio:.2f} of the quickest measured: {verdict} "
        f"{WITHIN - 1:.0%}; other programs used {r['other_cores']:.2f} cores meanwhile"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
