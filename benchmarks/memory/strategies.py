"""Memory, communication and time of a train step under every sharding strategy.

  python -m benchmarks strategies [--config=configs/tiny.py] [--devices=8] [--steps=5] [--no-time]
                                  [--json] [--config.KEY=...]

For each strategy: bytes that a device stores (parameters, optimizer state) and sums (gradients),
bytes of temporaries that the compiled step plans with, bytes that a device receives in a step by
kind of collective, and the median time of real steps on this machine's CPU devices, which share its
cores: times compare strategies here, not with GPUs. hybrid_shard runs on mesh.data=2 if the config
has no replicas, because without them it is full_shard. XLA's CPU partitioner has no reduce-scatter
of its own: where a GPU would reduce-scatter a dense weight's gradient, it all-reduces and slices.
"""

import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.support.report import Parser, report
from deepseek_jax.cli import texts
from deepseek_jax.config.options import Config
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import options, topology
from deepseek_jax.plan.tune import exercises
from deepseek_jax.plan.tune.changes import checked
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import Layout, init_state
from deepseek_jax.xla import program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--devices", type=int, default=8, help="CPU devices.")
    parser.add_argument("--steps", type=int, default=5, help="Steps to time, after a first one.")
    parser.add_argument("--no-time", action="store_true", help="Compile only, run nothing.")
    jax.config.update("jax_platforms", "cpu")
    own, config = options.read(parser, sys.argv[1:], "configs/tiny.py")
    devices = topology.cpu_devices(own.devices)
    rows = []
    for variant in variants(config, devices):
        print(f"{variant.sharding.strategy} ...", file=sys.stderr)
        rows.append(measure(variant, devices, 0 if own.no_time else own.steps))
    report(own, rows, text)
    return 0


def variants(config: Config, devices: list[Any]) -> list[Config]:
    """The config under every strategy; hybrid_shard with two replicas where it has none.

    Raises:
      UserError: the mesh does not fit.
    """
    shape = make_mesh(config, devices).shape
    return [checked(config, row.changes) for row in exercises.strategies(config, shape, "cpu")]


def measure(config: Config, devices: list[Any], steps: int) -> dict[str, Any]:
    """One row of the table; no time if `steps` is 0."""
    mesh, layout = topology.lay_out(config, devices)
    step = topology.compile_step(config, mesh, layout)
    found = [c for c in program.collectives(step.compiled.as_text(), mesh.shape) if not c.further]
    received = program.by(found, lambda c: c.kind)
    return {
        "strategy": config.sharding.strategy,
        "mesh": {a: n for a, n in mesh.shape.items() if n > 1},
        **layout.bytes_per_device(mesh),
        "temporaries": program.memory(step.compiled).temporaries,
        "received": {kind: received.get(kind, 0) for kind in KINDS},
        "step_seconds": _time(config, mesh, layout, step.compiled, steps) if steps else None,
    }


def _time(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, compiled: Any, steps: int
) -> float:
    """Median seconds of a step on random tokens."""
    with jax.set_mesh(mesh):
        state = init_state(config, layout)
        batch = random_batch(config, mesh)
        seconds = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, batch))
            seconds.append(time.perf_counter() - started)
    if not np.isfinite(metrics.loss):
        raise FloatingPointError(
            f"{config.sharding.strategy}: the loss after {steps + 1} steps is {metrics.loss}"
        )
    return statistics.median(seconds[1:])


def random_batch(config: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A step's batch of random tokens, each sequence one document."""
    t = config.train
    tokens = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (t.batch_size, t.sequence_length + 1), np.int32
    )
    positions = np.broadcast_to(
        np.arange(t.sequence_length, dtype=np.int32), (t.batch_size, t.sequence_length)
    )
    rows = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones_like(positions),
        "positions": positions,
    }
    return put_batch(rows, config.micro_batch, mesh)


def text(rows: list[dict[str, Any]]) -> str:
    """The table for a person."""
    kinds = [k for k in KINDS if any(r["received"][k] for r in rows)]
    memory = ("parameters", "gradients", "optimizer", "temporaries")

    def cells(r: dict[str, Any]) -> list[str]:
        received = r["received"]
        mesh = " x ".join(f"{a} {n}" for a, n in r["mesh"].items()) or "1 device"
        return [
            r["strategy"],
            mesh,
            *(texts.gb(r[k]) for k in memory),
            *(texts.gb(received[k]) for k in kinds),
            texts.gb(sum(received.values())),
            "" if r["step_seconds"] is None else f"{r['step_seconds'] * 1e3:,.0f} ms",
        ]

    rows_of_text = [["strategy", "mesh", *memory, *kinds, "received", "a step"], *map(cells, rows)]
    return (
        f"{texts.table(rows_of_text)}\n\nBytes of one device: four columns of memory, then what "
        "it receives in a step "
        f"(first dispatch round). Times: CPU devices that share this machine's cores."
    )
