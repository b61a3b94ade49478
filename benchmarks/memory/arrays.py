"""Arrays that a compiled step must not have: every expert's work on every token, and attention
scores of whole sequences."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_jax.config.options import Config
from deepseek_jax.parallel.mesh import TOKEN_AXES
from deepseek_jax.xla import hlo


def stored(module: hlo.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(instruction, dtype, dimensions without ones) of all arrays that are written to memory and of all
    matmuls. Arrays inside a fusion are not written; matmuls are work wherever they are."""
    callers = ("fusion", "reduce", "reduce-window", "scatter", "sort", "map")
    inside = {
        c
        for body in module.computations.values()
        for i in body.values()
        if i.opcode in callers
        for names in i.called.values()
        for c in names
    }
    for name, body in module.computations.items():
        for i in body.values():
            if name in inside and i.opcode != "dot":
                continue
            for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", i.shape):
                yield i.name, dtype, tuple(int(d) for d in dims.split(",") if d and d != "1")


def too_large(text: str, config: Config, mesh_shape: Mapping[str, int]) -> dict[str, list[str]]:
    """Arrays of a device's program that are too large, as "f32[...] name". Both lists should be empty.

    every_expert_on_every_token: G x T rows or more, of the width of a token or of an expert, for
      this device's G experts and T tokens, but for weights. The capacity of a round is a fraction
      of that: capacity_factor * K / E.
    whole_scores: heads x S x S numbers or more with a side that is S and another that is a multiple of it.
    """
    m, t = config.model, config.train
    experts = m.n_routed_experts // mesh_shape["expert"]
    tokens = config.micro_batch * t.sequence_length // math.prod(mesh_shape[a] for a in TOKEN_AXES)
    width = m.moe_intermediate_size // mesh_shape["tensor"]
    heads, length = m.num_attention_heads // mesh_shape["tensor"], t.sequence_length
    # A dimension may hold all experts' widths side by side, as one product of a token with all
    # experts has it.
    widths = {n * w: w for n in (experts, 1) for w in (m.hidden_size, width, 2 * width)}
    weight = experts * m.hidden_size * width // (mesh_shape["fsdp"] * mesh_shape["data"])
    found: dict[str, list[str]] = {"every_expert_on_every_token": [], "whole_scores": []}
    for name, dtype, dims in stored(hlo.Module(text)):
        size = math.prod(dims)
        said = f"{dtype}[{','.join(map(str, dims))}] {name}"
        of_width = [widths[d] for d in dims if d in widths]
        # A weight has both widths; a gathered or reduced one, as flat as collectives like it, a
        # whole number of its parts.
        if (
            len(of_width) == 1
            and size // of_width[0] >= experts * tokens
            and size % weight
            and m.vocab_size not in dims
        ):
            found["every_expert_on_every_token"].append(said)
        if (
            length in dims
            and sum(d % length == 0 for d in dims) >= 2
            and size >= heads * length * length
        ):
            found["whole_scores"].append(said)
    return found


def said(found: dict[str, Any], what: str) -> str:
    """How many there are and the first of them, or none."""
    return f"{len(found[what])}, for instance {found[what][0]}" if found[what] else "none"
