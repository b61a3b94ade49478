"""What each memory lever does to the train step: bytes per device and step time, one row per lever.

  python -m benchmarks levers [--config=configs/tiny.py] [--devices=2] [--hardware=here|h200]
                              [--steps=7] [--only=offload,remat] [--config.KEY=...]

The first row is the config in float32 with train.remat=full; every other row changes what its name
says. Parameters, gradients and optimizer state are what a device stores of them, from the state's
layout; temporaries (gradients are among them), host and total are from the compiled program. XLA's
CPU programs have one memory: there, what is offloaded is counted in the total as well, and the
program compiled for H200s (--hardware=h200, needs the extra gpu-aot and no GPU) shows what it
saves. Times are medians of steps on this machine's devices, all rows in turns, and ratios to the
first row; CPU devices share its cores.

Without --config.mesh options the devices are on mesh.expert, by twos. Rows that compress gradients
have replicas instead, and a row of their own to compare with.
"""

import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.memory.strategies import random_batch
from benchmarks.support.report import Parser, report
from deepseek_jax.cli import texts
from deepseek_jax.config.options import Config
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.plan import options, topology
from deepseek_jax.plan.tune.changes import with_options
from deepseek_jax.runtime.threads import enough_threads
from deepseek_jax.train.state import init_state
from deepseek_jax.xla import program

BASE = {"train.dtype": "float32", "train.remat": "full"}
LEVERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "train.dtype=bfloat16": {"train.dtype": "bfloat16"},
    "train.dtype=float16": {"train.dtype": "float16"},
    "optimizer.moment_dtype=bfloat16": {"optimizer.moment_dtype": "bfloat16"},
    "optimizer.name=adafactor": {"optimizer.name": "adafactor"},
    "optimizer.name=muon": {"optimizer.name": "muon"},
    "optimizer.name=lion": {"optimizer.name": "lion"},
    "optimizer.name=sgd": {"optimizer.name": "sgd"},
    "train.accumulation=4": {"train.accumulation": 4},
    "train.accumulation=4 accumulation_dtype=bfloat16": {
        "train.accumulation": 4,
        "train.accumulation_dtype": "bfloat16",
    },
    "train.remat=none": {"train.remat": "none"},
    "train.remat=dots": {"train.remat": "dots"},
    "train.remat=exchange": {"train.remat": "exchange"},
    "train.remat=save:mla_latent": {"train.remat": "save:mla_latent"},
    "train.remat=save:attention,mlp_gate_up": {"train.remat": "save:attention,mlp_gate_up"},
    "train.remat=save:exchange,experts_hidden": {"train.remat": "save:exchange,experts_hidden"},
    "offload.optimizer_state": {"offload.optimizer_state": True},
    "offload.parameters": {"offload.parameters": True},
    "offload.optimizer_state offload.parameters": {
        "offload.optimizer_state": True,
        "offload.parameters": True,
    },
    "offload.activations=layer_input": {"offload.activations": "layer_input"},
    "offload.activations=layer_input,attention,mlp_gate_up": {
        "offload.activations": "layer_input,attention,mlp_gate_up"
    },
}
REPLICAS = "mesh.data=2 hybrid_shard"
COMPRESSED = {
    f"{REPLICAS} gradient_compression={kind}": {"sharding.gradient_compression": kind}
    for kind in ("bfloat16", "int8")
}
MEMORY = ("parameters", "gradients", "optimizer", "temporaries", "host", "total")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--devices", type=int, default=2, help="Devices of the mesh.")
    parser.add_argument(
        "--hardware",
        default="here",
        choices=["here", "h200"],
        help="Whose program says the memory: here, or h200.",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=7,
        help="Steps to time of every row, after a first one; 0: compile only.",
    )
    parser.add_argument(
        "--only",
        default="",
        help="Rows whose names have one of these words, separated by commas, and the first.",
    )
    own, config = options.read(parser, sys.argv[1:], "configs/tiny.py")
    devices = _devices(own.devices, own.hardware)
    if own.hardware == "h200" and not topology.has_gpu_compiler():
        raise UserError(
            f"--hardware=h200 needs JAX's GPU compiler. Install it ({topology.INSTALL}), or leave "
            "--hardware out."
        )
    variants = rows_of(
        config,
        own.devices,
        own_mesh=any(a.lstrip("-").startswith("config.mesh.") for a in sys.argv[1:]),
    )
    words = [w for w in own.only.split(",") if w]
    chosen = {
        n: c
        for i, (n, c) in enumerate(variants.items())
        if not i or not words or any(w in n for w in words)
    }
    rows, running = [], {}
    for name, variant in chosen.items():
        print(f"{name} ...", file=sys.stderr)
        try:
            validate(variant)
            row, running[name] = measure(variant, devices, own.hardware, bool(own.steps))
        except UserError as e:  # this config or mesh cannot have it, and the table says why
            row = {"refused": str(e)}
        rows.append({"lever": name, **row})
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(own.steps + 1 if own.steps else 0):
        for name, step in running.items():
            taken = step()
            seconds[name] += [taken] if turn else []
    for row in rows:
        row["step_seconds"] = (
            statistics.median(seconds[row["lever"]]) if seconds.get(row["lever"]) else None
        )
    report(own, rows, lambda rows: text(rows, own.hardware))
    return 0


def _devices(count: int, hardware: str) -> list[jax.Device]:
    """Devices to run on: this machine's GPUs, or else CPU devices, as many as asked for."""
    if hardware == "h200":  # of a machine with a GPU and its compiler, only the compiler is wanted
        jax.config.update("jax_platforms", "cpu")
    enough_threads(count)
    jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if len(found) < count:
        raise UserError(
            f"--devices={count} is more than the {len(found)} devices here. Set it to {len(found)} or less."
        )
    return found[:count]


def rows_of(config: Config, devices: int, own_mesh: bool = False) -> dict[str, Config]:
    """Name -> config of every row.

    Args:
      own_mesh: keep the config's mesh. Else the devices are on mesh.expert by twos and on mesh.fsdp.
    """
    expert = 2 if devices % 2 == 0 else 1
    base = with_options(
        config, BASE if own_mesh else BASE | {"mesh.expert": expert, "mesh.fsdp": devices // expert}
    )
    replicas = with_options(
        base,
        {"sharding.strategy": "hybrid_shard", "mesh.data": 2, "mesh.fsdp": -1, "mesh.expert": 1},
    )
    return (
        {name: with_options(base, changes) for name, changes in LEVERS.items()}
        | {REPLICAS: replicas}
        | {name: with_options(replicas, changes) for name, changes in COMPRESSED.items()}
    )


def measure(
    config: Config, devices: list[jax.Device], hardware: str, timed: bool
) -> tuple[dict[str, Any], Any]:
    """(the memory columns of a row, a function that runs one more step and returns its seconds, or None)."""
    mesh, layout = topology.lay_out(config, devices)
    held = layout.bytes_per_device(mesh)
    if config.train.accumulation > 1:  # added up in a buffer of this dtype
        held["gradients"] = (
            held["gradients"] * np.dtype(config.train.accumulation_dtype).itemsize // 4
        )
    here: Any = None
    if hardware == "here" or timed:
        here = topology.compile_step(config, mesh, layout).compiled
    compiled = here
    if hardware != "here":
        elsewhere = topology.gpu_devices(topology.HARDWARE[hardware], len(devices), 8)
        compiled = topology.compile_step(config, *topology.lay_out(config, elsewhere)).compiled
    memory = program.memory(compiled)
    row = {k: held[k] for k in ("parameters", "gradients", "optimizer")} | {
        "temporaries": memory.temporaries,
        "total": memory.total,
    }
    row["host"] = program.host_memory(compiled) or held.get("host", 0)
    if not timed:
        return row, None
    with jax.set_mesh(mesh):
        state, batch = init_state(config, layout), random_batch(config, mesh)

    def step() -> float:
        nonlocal state
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(here(state, batch))
        taken = time.perf_counter() - started
        if not np.isfinite(metrics.loss):
            raise FloatingPointError(f"the loss is {metrics.loss}")
        return taken

    return row, step


def text(rows: list[dict[str, Any]], hardware: str) -> str:
    """The table for a person."""
    first = rows[0]

    def cells(r: dict[str, Any]) -> list[str]:
        if "refused" in r:
            return [r["lever"], *[""] * len(MEMORY), "refused", ""]
        timed = r["step_seconds"] is not None
        return [
            r["lever"],
            *(texts.gb(r[k]) if r[k] else "" for k in MEMORY),
            f"{r['step_seconds'] * 1e3:,.0f} ms" if timed else "",
            f"{r['step_seconds'] / first['step_seconds']:.2f}" if timed else "",
        ]

    table = texts.table([["lever", *MEMORY, "a step", "ratio"], *map(cells, rows)])
    refused = "".join(f"\n{r['lever']}: {r['refused']}" for r in rows if "refused" in r)
    where = "compiled for H200s" if hardware == "h200" else "of this machine's devices"
    return (
        f"{table}\n\nBytes of one device; temporaries, host and total from the program {where}. "
        f"Times: this machine's devices, in turns.{refused}"
    )
