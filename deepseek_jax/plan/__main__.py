"""What a run will need and communicate, before it is launched. No GPU is used.

  python -m deepseek_jax.plan --config=configs/v3.py --devices=1024
  python -m deepseek_jax.plan --config=configs/deepseek_7b.py --devices=8 --config.mesh.fsdp=4 --json

Prints the model's size, the mesh and which of its axes stay inside a host, the bytes of a device
beside its memory, and the bytes that each collective moves in a step: from the train step, compiled
for that many GPUs with the XLA options of train.py; of a run with stages (config.distill.stages) from
that of the stage that needs most. That takes half a minute to some minutes and needs JAX's CUDA
plugin: `make plan CONFIG=... DEVICES=...` installs it apart, or pip install -e '.[gpu-aot]'. Without
it: what the layout alone says. --hardware=cpu compiles for as many CPU devices instead, as the tests
run it: the collectives of another compiler, no plugin.

--roofline says how fast that step could be: time by part and pass, ideal and derated, communication
that is exposed, share of peak, the largest costs with their lines, and what all that assumes.
--skew states how unevenly experts are loaded: zipf, or a max_violation as metrics.jsonl has it.
--rates replaces the derated rates, by those that `calibrate` has measured, --rates=rates.json, or by
numbers, --rates=bf16=750e12,memory=4.3e12; for --hardware=cpu it is needed.

  python -m deepseek_jax.plan advise --config=... --devices=N    which mesh, strategy and levers to take
  python -m deepseek_jax.plan calibrate --out=rates.json         how fast the devices of this machine are
  python -m deepseek_jax.plan tune batch --config=...            what fits and what is fastest, run here

Any option of train.py can follow. Exit codes: 0, also if it does not fit ("fits" in --json says
so); 2 a mistake in the options.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console

from deepseek_jax.cli.command import exit_code
from deepseek_jax.cluster.gpus import memory_fraction
from deepseek_jax.errors import UserError
from deepseek_jax.plan import (
    asked,
    options,
    rates,
    report,
    roofline,
    roofline_text,
    skew,
    staged,
    topology,
)
from deepseek_jax.run import commandline

CPU = topology.Hardware("CPU device", None, "")
# Commands of their own, which run something on this machine or search: the module of each.
SUBCOMMANDS = {
    "advise": "deepseek_jax.plan.advise.command",
    "calibrate": "deepseek_jax.plan.calibrate.command",
    "tune": "deepseek_jax.plan.tune.command",
}


def main(argv: list[str]) -> int:
    if argv and argv[0] in SUBCOMMANDS:
        return int(importlib.import_module(SUBCOMMANDS[argv[0]]).main(argv[1:]))
    parser = options.Parser(
        __doc__, further=lambda: commandline.help_text(commandline.define_flags())
    )
    parser.add_argument("--devices", type=int, help="GPUs in all.")
    parser.add_argument("--gpus_per_host", type=int, default=8, help="GPUs of one host.")
    parser.add_argument(
        "--hardware",
        default="h200",
        choices=[*topology.HARDWARE, "cpu"],
        help=f"What to plan for: {', '.join(topology.HARDWARE)}, or cpu.",
    )
    parser.add_argument("--roofline", action="store_true", help="Predict the time of the step.")
    parser.add_argument("--skew", help="With --roofline: zipf (the default), or a max_violation.")
    parser.add_argument(
        "--rates", help="With --roofline: derated rates, FILE.json or NAME=NUMBER,..."
    )
    # On the CPU: a planner must not take the memory of a GPU that is at work.
    jax.config.update("jax_platforms", "cpu")
    own, config = options.read(parser, argv)
    topology.check_cluster(own.devices, own.gpus_per_host)
    for flag in ("skew", "rates"):
        if getattr(own, flag) is not None and not own.roofline:
            raise UserError(f"--{flag}={getattr(own, flag)} is of the prediction. Add --roofline.")
    speed = rates.speed_of(own.hardware, own.rates or "", own.devices) if own.roofline else None
    hardware = CPU if own.hardware == "cpu" else topology.HARDWARE[own.hardware]
    on_gpus = own.hardware != "cpu" and topology.has_gpu_compiler()
    devices = (
        topology.gpu_devices(hardware, own.devices, own.gpus_per_host)
        if on_gpus
        else topology.cpu_devices(own.devices)
    )
    if own.roofline and not on_gpus and own.hardware != "cpu":
        raise UserError(
            "--roofline reads the compiled step, and JAX's GPU compiler is missing. Install it: "
            f"{topology.INSTALL}, or make plan ARGS=--roofline."
        )
    config, mesh, layout, stages = staged.lay_out(config, devices)
    teacher = asked.find(config, mesh)
    room = hardware.memory and int(hardware.memory * memory_fraction(mesh.size > 1))
    beside = teacher.bytes if teacher else 0
    config, mesh, layout, remat = topology.settle(config, mesh, layout, room, beside)
    expected = own.skew or "zipf"
    skew.rounds_at(
        expected, config, dict(mesh.shape)
    )  # a mistake is said before anything is compiled
    result = report.of_layout(config, mesh, layout, hardware, own.gpus_per_host)
    result["stages"] = stages
    result["remat_choice"] = remat
    if teacher is not None:
        result["layout_bytes"]["frozen"] = teacher.bytes
    if own.hardware != "cpu" and not on_gpus:
        result["missing"] = (
            "for temporaries and collectives, install JAX's GPU compiler: make plan CONFIG=... "
            f"DEVICES=..., or {topology.INSTALL}"
        )
    else:
        with _waiting(
            f"compiling the train step for {own.devices} x {hardware.name}", quiet=own.json
        ):
            if speed:
                roofline.keep_source_lines()
            step = topology.compile_step(config, mesh, layout)
        result["program"] = report.of_program(step, mesh, hardware, teacher)
        if speed:
            result["roofline"] = roofline.predict(
                step.compiled.as_text(),
                roofline.Planned(config, mesh, layout, own.gpus_per_host),
                speed,
                expected,
            )
    if own.json:
        print(json.dumps(result, indent=2))
        return 0
    print(report.text(result))
    if speed:
        print("\n" + roofline_text.text(result["roofline"], hardware.name))
    return 0


@contextlib.contextmanager
def _waiting(text: str, quiet: bool) -> Iterator[Any]:
    """A spinner on a terminal, one line elsewhere, on stderr."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield
    elif console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(f"{text} ...", markup=False, soft_wrap=True)
        yield


if __name__ == "__main__":
    sys.exit(exit_code("deepseek_jax.plan", lambda: main(sys.argv[1:])))
