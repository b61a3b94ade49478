"""Compile time of the real train step with many layers against few: layers are scanned, so it
should hardly depend on their number.

  python -m benchmarks compile [--layers=61] [--against=8] [--devices=1,8] [--turns=3]
                               [--shape=small] [--json]

Each measurement is a process of its own without a compilation cache, on CPU devices; the two depths
run in turns. Timed apart: tracing and lowering (JAX, Python), and compiling (XLA). Model: a shape
of benchmarks/support/shapes.py with that number of layers, the first dense; 8 devices are fsdp 4 x
expert 2. The bar is on the median over turns of the ratio of the whole; CPU seconds of the process,
which other work on the machine disturbs less, are printed as well.
"""

import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import jax

from benchmarks.speed.step import run_json
from benchmarks.support import shapes
from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli.arguments import numbers
from deepseek_jax.config.options import Config, MeshConfig
from deepseek_jax.errors import UserError
from deepseek_jax.plan import topology

BAR = 1.5


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--layers", type=int, default=61, help="Layers of the deep model.")
    parser.add_argument("--against", type=int, default=8, help="Layers of the other.")
    parser.add_argument(
        "--devices",
        type=numbers,
        default="1,8",
        help="Numbers of CPU devices, separated by commas.",
    )
    parser.add_argument(
        "--turns", type=int, default=3, help="Pairs of processes, for each number of devices."
    )
    parser.add_argument(
        "--shape", choices=shapes.NAMES, default="small", help=f"{', '.join(shapes.NAMES)}."
    )
    parser.add_argument(
        "--once", action="store_true", help="Measure --layers on --devices in this process."
    )
    own = parser.parse_args()
    if min(own.layers, own.against) < 2:
        raise UserError(
            f"--layers={own.layers} and --against={own.against} must both be 2 or more: the first "
            "layer is dense."
        )
    if own.once:
        print(json.dumps(measure(config_of(own.shape, own.layers, own.devices[0]), own.devices[0])))
        return 0
    rows = []
    for devices in own.devices:
        pairs = []
        for turn in range(max(own.turns, 1)):
            print(f"{devices} device(s), turn {turn + 1} of {own.turns} ...", file=sys.stderr)
            pairs.append(
                [
                    run_json(
                        [
                            "-m",
                            "benchmarks",
                            "compile",
                            "--once",
                            f"--layers={n}",
                            f"--devices={devices}",
                            f"--shape={own.shape}",
                        ],
                        JAX_PLATFORMS="cpu",
                    )
                    for n in (own.layers, own.against)
                ]
            )
        rows.append(summary(devices, pairs))
    result = {
        "machine": machine(),
        "shape": own.shape,
        "layers": own.layers,
        "against": own.against,
        "rows": rows,
        "bar": BAR,
        "met": all(r["ratio"] <= BAR for r in rows),
    }
    report(own, result, text)
    return 0


def config_of(shape: str, layers: int, devices: int) -> Config:
    """The config of a shape with this number of layers and devices."""
    config = shapes.config(shape)
    expert = 2 if devices % 2 == 0 else 1
    model = dataclasses.replace(config.model, num_hidden_layers=layers)
    return dataclasses.replace(
        config, model=model, mesh=MeshConfig(fsdp=devices // expert, expert=expert)
    )


def measure(config: Config, devices: int) -> dict[str, float]:
    """Seconds to trace and lower the step and to compile it, and CPU seconds of both."""
    jax.config.update("jax_enable_compilation_cache", False)
    mesh, layout = topology.lay_out(config, topology.cpu_devices(devices))
    cpu = time.process_time()
    step = topology.compile_step(config, mesh, layout)
    return {
        "lower_s": step.lower_seconds,
        "compile_s": step.compile_seconds,
        "cpu_s": time.process_time() - cpu,
    }


def summary(devices: int, pairs: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over pairs (deep, shallow), and medians of their ratios."""

    def whole(r):
        return r["lower_s"] + r["compile_s"]

    row = {
        key: [statistics.median(pair[i][key] for pair in pairs) for i in (0, 1)]
        for key in ("lower_s", "compile_s", "cpu_s")
    }
    return {
        "devices": devices,
        **row,
        "ratio": statistics.median(whole(deep) / whole(shallow) for deep, shallow in pairs),
        "cpu_ratio": statistics.median(deep["cpu_s"] / shallow["cpu_s"] for deep, shallow in pairs),
    }


def text(r: dict[str, Any]) -> str:
    lines = [
        f"{r['shape']}, {r['layers']} layers against {r['against']}, cold, "
        f"{r['machine']['device']}, {r['machine']['cores']} cores"
    ]
    for row in r["rows"]:
        (low, low_few), (xla, xla_few), (cpu, cpu_few) = (
            row["lower_s"],
            row["compile_s"],
            row["cpu_s"],
        )
        lines.append(
            f"  {row['devices']} device(s): trace and lower {low:.1f} s against {low_few:.1f}, "
            f"compile {xla:.1f} s against {xla_few:.1f}: "
            f"{row['ratio']:.2f}x (CPU seconds {cpu:.1f} against {cpu_few:.1f}: {row['cpu_ratio']:.2f}x)"
        )
    return "\n".join(lines) + f"\nbar {r['bar']}: {'met' if r['met'] else 'MISSED'}"
