"""Predicted step times beside measured ones, on virtual devices of this CPU.

  python -m benchmarks predicted [--config=configs/tiny.py] [--devices=8] [--steps=8] [--seconds=20]
                                 [--only=fsdp,stage] [--json] [--config.KEY=...]

Compiles the train step of every row of ROWS, measures this machine's rates as `plan calibrate` does,
times the steps in turns, and predicts each from its compiled program and those rates, as `plan
--roofline --rates=FILE` does. Then the pairs: where two measured medians are more than 10% apart the
predicted order should be the measured one. Rounds of the dispatch are those that the steps took, the
mean over layers. Rows that the mesh or the config refuses are said, with the reason.

Tokens are drawn by Zipf's law. Unless options say otherwise a step has 32 sequences of 64 tokens.
Compiled programs are kept (compile.cache_dir), so that a second run of this command is short.
"""

import itertools
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax

from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli import texts
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.plan import host, options, rates, roofline, topology
from deepseek_jax.plan.calibrate import measure
from deepseek_jax.plan.timeline import Program, Timeline
from deepseek_jax.plan.tune.changes import checked, with_options
from deepseek_jax.plan.tune.steps import Step
from deepseek_jax.runtime.compile_cache import use_cache

GIVEN = {"train.batch_size": 32, "train.sequence_length": 64}
APART = 1.1  # of two medians: nearer ones may change places from run to run
EXPERT_8 = {"mesh.expert": 8, "mesh.fsdp": 1}
ROWS: dict[str, dict[str, Any]] = {
    "fsdp 8": {},
    "data 8, no_shard": {"mesh.data": 8, "mesh.fsdp": 1, "sharding.strategy": "no_shard"},
    "data 2 x fsdp 4, hybrid_shard": {"mesh.data": 2, "sharding.strategy": "hybrid_shard"},
    "expert 8": EXPERT_8,
    "expert 8, all_gather": EXPERT_8 | {"moe.dispatch": "all_gather"},
    "expert 8, ring": EXPERT_8 | {"moe.dispatch": "ring"},
    "fsdp 4 x expert 2": {"mesh.expert": 2},
    "tensor 2 x fsdp 4": {"mesh.tensor": 2},
    "stage 2 x fsdp 4, 4 micro-batches": {"mesh.stage": 2, "train.accumulation": 4},
    "fsdp 8, remat full": {"train.remat": "full"},
    "fsdp 8, 4 micro-batches": {"train.accumulation": 4},
    "expert 8, 4 micro-batches": EXPERT_8 | {"train.accumulation": 4},
}


class Row(NamedTuple):
    """A configuration that runs here."""

    step: Step
    text: str  # of the compiled program


class Times(NamedTuple):
    """Of every step that counts; rounds of every layer in each."""

    seconds: list[float]
    cpu_seconds: list[float]
    rounds: list[int]

    @property
    def mean_rounds(self) -> float:
        return statistics.fmean(self.rounds) if self.rounds else 1.0


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--devices", type=int, default=8, help="Virtual devices of this CPU.")
    parser.add_argument("--steps", type=int, default=8, help="Steps of each row that count.")
    parser.add_argument("--seconds", type=float, default=20.0, help="Of measuring rates.")
    parser.add_argument("--only", default="", help="Rows with one of these words, by commas.")
    jax.config.update("jax_platforms", "cpu")
    own, config = options.read(parser, sys.argv[1:], "configs/tiny.py")
    devices = topology.cpu_devices(own.devices)
    use_cache(config.compile.cache_dir, warn=lambda line: print(line, file=sys.stderr))
    roofline.keep_source_lines()
    named = {a.partition("=")[0] for a in sys.argv[1:]}
    changes = {k: v for k, v in GIVEN.items() if f"--config.{k}" not in named}
    config = with_options(config, changes)
    rows, refused = build(config, devices, [w for w in own.only.split(",") if w])
    print("measuring ...", file=sys.stderr, flush=True)
    others = host.Others()
    found = measure.calibrated(devices, own.seconds, show=False)
    times = timed(rows, own.steps)
    cores = others.cores()
    speed = rates.of_measured(None, found.as_json())
    by_name = {
        name: {
            "measured_s": statistics.median(times[name].seconds),
            "fastest_s": min(times[name].seconds),
            "slowest_s": max(times[name].seconds),
            "cpu_s": statistics.median(times[name].cpu_seconds),
            "rounds": times[name].mean_rounds,
            "predicted_s": predicted(row, speed, times[name].mean_rounds),
        }
        for name, row in rows.items()
    }
    result = {
        "machine": machine(),
        "other_cores": cores,
        "calibration": found.as_json(),
        "rows": by_name,
        "refused": refused,
        **pairs(by_name),
    }
    report(own, result, text)
    return 0


def build(
    config: Config, devices: list[jax.Device], words: list[str]
) -> tuple[dict[str, Row], dict[str, str]]:
    """The rows that run here, compiled, and why the others do not."""
    rows: dict[str, Row] = {}
    refused: dict[str, str] = {}
    for name, changes in ROWS.items():
        if words and not any(w in name for w in words):
            continue
        started = time.perf_counter()
        try:
            step = Step(checked(config, changes), devices)
            step.begin()
            rows[name] = Row(step, step.compiled.as_text())
            said = f"{time.perf_counter() - started:.0f} s"
        except UserError as e:
            refused[name] = said = str(e)
        print(f"{name}: {said}", file=sys.stderr, flush=True)
    return rows, refused


def timed(rows: dict[str, Row], steps: int) -> dict[str, Times]:
    """The steps that count, all rows in turns."""
    found = {name: Times([], [], []) for name in rows}
    for turn in range(steps + 1):
        for name, row in rows.items():
            cpu = time.process_time()
            seconds = row.step.run()
            cpu = time.process_time() - cpu
            if turn:
                found[name].seconds.append(seconds)
                found[name].cpu_seconds.append(cpu)
                found[name].rounds.extend(row.step.rounds())
    return found


def predicted(row: Row, speed: rates.Speed, rounds: float) -> float:
    """Seconds of a step, by its program and the rates."""
    shape = dict(row.step.mesh.shape)
    program = Program(row.text, shape, shape, on_gpu=False)
    return Timeline(program, speed.derated, rounds).run().seconds


def pairs(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many pairs of rows that are apart are in the predicted order, and which are not."""
    right, wrong = 0, []
    for (a, x), (b, y) in itertools.combinations(rows.items(), 2):
        fast, slow = sorted((x, y), key=lambda r: r["measured_s"])
        if slow["measured_s"] <= APART * fast["measured_s"]:
            continue
        if fast["predicted_s"] < slow["predicted_s"]:
            right += 1
        else:
            wrong.append([a, b])
    return {"pairs_apart": right + len(wrong), "in_order": right, "out_of_order": wrong}


def lines_of(r: dict[str, Any]) -> list[list[str]]:
    """A heading and a line for each row, fastest first."""
    out = [
        ["configuration", "measured", "fastest to slowest", "predicted", "of measured", "rounds"]
    ]
    for name, row in sorted(r["rows"].items(), key=lambda item: item[1]["measured_s"]):
        measured, guess = row["measured_s"], row["predicted_s"]
        out.append(
            [
                name,
                f"{measured * 1e3:,.0f} ms",
                f"{row['fastest_s'] * 1e3:,.0f} to {row['slowest_s'] * 1e3:,.0f}",
                f"{guess * 1e3:,.0f} ms",
                f"{guess / measured:.2f}",
                f"{row['rounds']:.2g}",
            ]
        )
    return out


def sentence(r: dict[str, Any]) -> str:
    """Of docs/speed.md."""
    found = [row["predicted_s"] / row["measured_s"] for row in r["rows"].values()]
    return (
        f"{len(found)} configurations of `tiny` on {r['machine']['devices']} virtual devices: predicted are "
        f"{min(found):.2f} to {max(found):.2f} of the measured step times; {in_order(r)}"
    )


def in_order(r: dict[str, Any]) -> str:
    """How many pairs are."""
    return (
        f"{r['in_order']} of {r['pairs_apart']} pairs that are more than {APART - 1:.0%} apart are in the "
        "predicted order"
    )


def markdown(r: dict[str, Any], link: str) -> str:
    """The table of docs/planning.md."""
    rows = [f"| {' | '.join(line)} |" for line in lines_of(r)]
    rows.insert(1, "|---" * len(lines_of(r)[0]) + "|")
    wrong = "; ".join(f"{a} and {b}" for a, b in r["out_of_order"])
    said = f"{in_order(r)}{f'. Not so: {wrong}' if wrong else ''} ({link})."
    return "\n".join([*rows, "", said[0].upper() + said[1:]])


def text(r: dict[str, Any]) -> str:
    """The table for a person."""
    said = [
        f"{r['machine']['devices']} devices on {r['machine']['cores']} cores; "
        f"{host.said(r['other_cores'])}",
        "",
        texts.table(lines_of(r)),
        "",
        in_order(r),
    ]
    said += [f"not so: {a}, {b}" for a, b in r["out_of_order"]]
    said += [f"refused: {name}: {why}" for name, why in r["refused"].items()]
    return "\n".join(said)
