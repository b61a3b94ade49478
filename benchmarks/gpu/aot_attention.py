"""What gpu_aot checks of fused attention: V2-Lite's layers, compiled for one H200."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.gpu import train
from benchmarks.memory import arrays
from deepseek_jax.cli import texts
from deepseek_jax.plan import topology
from deepseek_jax.xla import hlo, loops, origin, program

LAYERS = 8
# How often each kernel runs in a layer whose attention is kept for backward.
WANTED = {
    ("attention_forward", "forward"): 1,
    ("attention_queries_gradient", "backward"): 1,
    ("attention_keys_gradient", "backward"): 1,
}


def check_attention(check: Callable[[str, bool, str], None], devices: list[Any]) -> None:
    """Compiles a step of packed documents with the kernels that a Hopper GPU takes, and with the others.

    Args:
      check: takes a name, whether it holds, and what was found.
      devices: to compile for, of which the first is used.
    """
    for method in ("mosaic", "triton"):
        config = train.training_config(False, LAYERS, method, "save:attention")
        mesh, layout = topology.lay_out(config, devices[:1])
        step = topology.compile_step(config, mesh, layout)
        total = program.memory(step.compiled).total
        print(f"\nV2-Lite, {LAYERS} layers, attention={method}: {texts.gb(total)}", flush=True)
        text = step.compiled.as_text()
        module = hlo.Module(text)
        found = calls(module)
        said = ", ".join(f"{n} {name} in {phase}" for (name, phase), n in sorted(found.items()))
        kinds = set(WANTED) == set(found) and len(set(found.values())) == 1
        check(f"attention={method}: one kernel forward, two backward, in every layer", kinds, said)
        choices = [
            i.op_name
            for _, i, _ in loops.visits(module, lambda i: i.opcode == "conditional")
            if "attention" in i.op_name
        ]
        check(f"attention={method}: nothing is chosen while it runs", not choices, str(choices))
        large = arrays.too_large(text, config, mesh.shape)["whole_scores"]
        check(f"attention={method}: no scores in memory", not large, str(large))


def calls(module: hlo.Module) -> Counter[tuple[str, str]]:
    """(kernel, phase) -> in how many places of the program it is called: the stack of dense layers and the
    stack of MoE layers."""
    found: Counter[tuple[str, str]] = Counter()
    for _, instruction, _ in loops.visits(module, lambda i: i.opcode == "custom-call"):
        if kernel := re.search(
            r"\battention_(forward|(queries|keys)_gradient)\b", instruction.op_name
        ):
            found[kernel[0], origin.phase_of(instruction.op_name)] += 1
    return found
