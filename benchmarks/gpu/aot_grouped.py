"""What gpu_aot checks of experts as grouped products, and of those in FP8: V2-Lite's layers, compiled for one
H200.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.gpu import train
from benchmarks.memory import arrays
from deepseek_jax.cli import texts
from deepseek_jax.config.options import Config
from deepseek_jax.experts import implementations
from deepseek_jax.plan import topology
from deepseek_jax.xla import hlo, loops, origin, program

LAYERS = 8
# How often each kernel runs in a MoE layer, where backward computes the hidden rows again: gate and up, down;
# gate and up; the gradients of rows, through down and through gate and up; those of both weights.
WANTED = {
    ("grouped_matmul", "forward"): 2,
    ("grouped_matmul", "recompute"): 1,
    ("grouped_matmul", "backward"): 2,
    ("grouped_outer_product", "backward"): 2,
}
# Rows by weights; gradients of rows, gradients of weights. Backward multiplies rows by weights, too, in
# further rounds.
FP8_WANTED = {
    ("forward", "f8e4m3fn by f8e4m3fn"),
    ("recompute", "f8e4m3fn by f8e4m3fn"),
    ("backward", "f8e4m3fn by f8e5m2"),
}


def check_grouped(check: Callable[[str, bool, str], None], devices: list[Any]) -> None:
    """Compiles a step with the kernels that a Hopper GPU takes, and with the others.

    Args:
      check: takes a name, whether it holds, and what was found.
      devices: to compile for, of which the first is used.
    """
    for kernels in ("mosaic", "triton"):
        config, mesh, text = compiled(devices, kernels)
        module = hlo.Module(text)
        found = calls(module)
        said = ", ".join(f"{n} {name} in {phase}" for (name, phase), n in sorted(found.items()))
        check(f"{kernels}: one kernel for all experts per product", found == WANTED, said)
        open_ended = rounds(module)
        said = f"{len(open_ended)}, for instance {open_ended[0]}" if open_ended else "none"
        check(
            f"{kernels}: no rounds, no loop whose length the routing decides", not open_ended, said
        )
        what = "every_expert_on_every_token"
        large = arrays.too_large(text, config, mesh.shape)
        name = f"{kernels}: no array of every expert's work on every token"
        check(name, not large[what], arrays.said(large, what))


def check_fp8(check: Callable[[str, bool, str], None], devices: list[Any]) -> None:
    """Compiles a step with experts in FP8, by kernels where this JAX has them and in rounds.

    Args:
      check, devices: as of `check_grouped`.
    """
    has_kernels = jax.__version_info__ >= implementations.MIXED_FP8
    for kernels in ("mosaic", "rounds") if has_kernels else ("rounds",):
        _, _, text = compiled(devices, kernels, "row")
        found = fp8_products(hlo.Module(text))
        said = ", ".join(
            f"{n} of {kinds} in {phase}" for (phase, kinds), n in sorted(found.items())
        )
        check(f"{kernels}: products in FP8", set(found) >= FP8_WANTED, said or "none")


def fp8_products(module: hlo.Module) -> Counter[tuple[str, str]]:
    """(phase, types of the operands) -> how many such products the program has: XLA's, by itself or by
    cuBLAS, and kernels.
    """
    found: Counter[tuple[str, str]] = Counter()
    for name, i, _ in loops.visits(module, lambda i: i.opcode in ("dot", "custom-call")):
        shapes = [module.computations[name][o].shape for o in i.operands]
        kinds = sorted(shape.split("[")[0] for shape in shapes if shape.startswith("f8"))
        if len(kinds) == 2:
            found[origin.phase_of(i.op_name), " by ".join(kinds)] += 1
    return found


def compiled(
    devices: list[Any], kernels: str, fp8: str = "none"
) -> tuple[Config, jax.sharding.Mesh, str]:
    """The step with experts so computed, for the first device."""
    config = train.training_config(False, LAYERS, "cudnn", "save:attention")
    config = dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, experts_implementation=kernels),
        train=dataclasses.replace(config.train, fp8=fp8),
    )
    mesh, layout = topology.lay_out(config, devices[:1])
    step = topology.compile_step(config, mesh, layout)
    total = texts.gb(program.memory(step.compiled).total)
    how = kernels if fp8 == "none" else f"{kernels}, in FP8"
    print(f"\nV2-Lite, {LAYERS} layers, experts by {how}: {total}", flush=True)
    return config, mesh, step.compiled.as_text()


def calls(module: hlo.Module) -> Counter[tuple[str, str]]:
    """(kernel, phase) -> how often a MoE layer runs it."""
    found: Counter[tuple[str, str]] = Counter()
    for _, instruction, _ in loops.visits(module, lambda i: i.opcode == "custom-call"):
        if kernel := re.search(r"\bgrouped_(matmul|outer_product)\b", instruction.op_name):
            found[kernel[0], origin.phase_of(instruction.op_name)] += 1
    return found


def rounds(module: hlo.Module) -> list[str]:
    """Where loops come from whose length is not known before they run."""
    return [
        instruction.op_name
        for name, instruction, _ in loops.visits(module, lambda i: i.opcode == "while")
        if loops.trip_count(module, name, instruction) is None
    ]
