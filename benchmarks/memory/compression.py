"""Loss curves with gradients summed over replicas in float32, bfloat16 and int8, side by side, and
the bytes that each sum costs.

  python -m benchmarks compression [--config=configs/tiny.py] [--devices=2] [--steps=60] [--json]
                                   [--config.KEY=...]

Trains the config once with every value of sharding.gradient_compression, on the same data from the
same weights, under hybrid_shard on mesh.data=2 if the config has no replicas. Bytes are those that
a device receives along `data` in a step (xla/program.py), read from the compiled programs: the sum
of gradients, and all other collectives that go along `data` too. Times of CPU devices, which share
this machine's cores and have no slow link to spare, say nothing of a cluster.
"""

import contextlib
import dataclasses
import statistics
import sys
import time
from typing import Any

import jax

from benchmarks.support.report import Parser, report
from deepseek_jax import objectives
from deepseek_jax.cli import texts
from deepseek_jax.config.options import GRADIENT_COMPRESSIONS, Config
from deepseek_jax.config.validation import validate
from deepseek_jax.data.open import open_data
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.plan import options, topology
from deepseek_jax.run.batches import LoaderBatches
from deepseek_jax.run.progress import Progress
from deepseek_jax.train.state import init_state
from deepseek_jax.xla import program


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--devices", type=int, default=2, help="CPU devices.")
    parser.add_argument("--steps", type=int, default=60, help="Steps of each run.")
    jax.config.update("jax_platforms", "cpu")
    own, config = options.read(parser, sys.argv[1:], "configs/tiny.py")
    devices = topology.cpu_devices(own.devices)
    results = []
    for method in GRADIENT_COMPRESSIONS:
        print(f"{method} ...", file=sys.stderr)
        results.append(measure(variant(config, method), devices, own.steps))
    report(own, results, text)
    return 0


def variant(config: Config, method: str) -> Config:
    """The config with a method, and with two replicas under hybrid_shard where it has none.

    Raises:
      UserError: its strategy and mesh have no place for compression.
    """
    if config.mesh.data == 1:
        config = dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, data=2),
            sharding=dataclasses.replace(config.sharding, strategy="hybrid_shard"),
        )
    config = dataclasses.replace(
        config, sharding=dataclasses.replace(config.sharding, gradient_compression=method)
    )
    validate(config)
    return config


def measure(config: Config, devices: list[Any], steps: int) -> dict[str, Any]:
    """One run: its losses, bytes and median time of a step."""
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=max(steps, config.train.steps))
    )
    mesh, layout = topology.lay_out(config, devices)
    compiled = topology.compile_step(config, mesh, layout).compiled
    along = [
        c
        for c in program.collectives(compiled.as_text(), mesh.shape)
        if "data" in c.axes and not c.further
    ]
    gradients = [c for c in along if c.phase == "backward" or c.part == "compression"]
    tokenizer = load_tokenizer(config.data.tokenizer, special_tokens=config.data.special_tokens)
    loader = open_data(config, tokenizer, objectives.make(config).fields)
    losses, seconds = [], []
    source = LoaderBatches(config, loader, mesh)
    source.begin(Progress().resumed(0, config, None))
    with jax.set_mesh(mesh), contextlib.closing(source) as batches:
        state = init_state(config, layout)
        started = time.perf_counter()
        for i in range(steps):
            state, metrics = compiled(state, batches.batch(i))
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()

    def total(found: list[program.Collective]) -> float:
        return sum(c.bytes_per_step for c in found)

    return {
        "gradient_compression": config.sharding.gradient_compression,
        "strategy": config.sharding.canonical,
        "mesh": {a: n for a, n in mesh.shape.items() if n > 1},
        "losses": losses,
        "gradient_bytes_over_data": total(gradients),
        "other_bytes_over_data": total(along) - total(gradients),
        **layout.bytes_per_device(mesh),
        "step_seconds": statistics.median(seconds[1:] or seconds),
    }


def apart(losses: list[float], exact: list[float]) -> float:
    """The mean difference of two loss curves."""
    return statistics.mean(abs(a - b) for a, b in zip(losses, exact, strict=True))


def text(results: list[dict[str, Any]]) -> str:
    """The tables for a person: losses at some steps with their differences from the first column,
    then bytes."""
    exact, steps = results[0]["losses"], len(results[0]["losses"])
    shown = sorted({0, *range(4, steps, max(steps // 12, 1)), steps - 1})
    names = [r["gradient_compression"] for r in results]
    curve = [["step", *names, *(f"{n} - none" for n in names[1:])]]
    for i in shown:
        values = [r["losses"][i] for r in results]
        curve.append(
            [
                str(i + 1),
                *(f"{v:.4f}" for v in values),
                *(f"{v - exact[i]:+.4f}" for v in values[1:]),
            ]
        )
    whole = results[0]["gradient_bytes_over_data"]
    costs = [
        [
            "gradient_compression",
            "gradients over data",
            "of none",
            "other over data",
            "residual",
            "a step",
        ]
    ]
    for r in results:
        costs.append(
            [
                r["gradient_compression"],
                texts.gb(r["gradient_bytes_over_data"]),
                f"{r['gradient_bytes_over_data'] / whole:.3f}",
                texts.gb(r["other_bytes_over_data"]),
                texts.gb(r.get("residual", 0)),
                f"{r['step_seconds'] * 1e3:,.0f} ms",
            ]
        )
    mesh = " x ".join(f"{a} {n}" for a, n in results[0]["mesh"].items())
    difference = [
        f"{r['gradient_compression']} {apart(r['losses'], exact):.4f}" for r in results[1:]
    ]
    return (
        f"{results[0]['strategy']} on {mesh}\n\n{texts.table(curve)}\n\nMean difference of the "
        f"losses from none's: {', '.join(difference)}.\n\n"
        f"{texts.table(costs)}\n\nBytes that a device receives along data in a step; residual: "
        "what it stores."
    )
