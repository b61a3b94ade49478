"""Where an instruction of a compiled step comes from: which pass over the model, and which part of it.

The pass is in the operation's name, which JAX builds from the transformations (jvp, transpose,
rematted_computation). The part is in that name too, where the model has named it by
jax.named_scope. But a scope holds for all that is called inside it, and custom gradients drop
scopes: what stands inside or around a named part is told by the Python calls that made the
instruction. tests/plan/test_origin.py checks that every name below is one of the package's, and
that each is found in compiled steps.

An instruction that the compiler made itself has neither: it takes those of the nearest instruction
that it reads.
"""

import re
from collections import defaultdict
from typing import NamedTuple

from deepseek_jax.xla import hlo, loops


class Rule(NamedTuple):
    """Instructions made below a function are of a part."""

    file: str  # in the package, or a folder of it
    name: str  # of a function or class; "": any in that file
    part: str

    def holds(self, file: str, function: str) -> bool:
        """Whether it is about a call: its file, and the qualified name of its function."""
        if f"deepseek_jax/{self.file}" not in file:
            return False
        return f".{self.name}." in f".{function}." if self.name else True


# Before the scopes: what is called inside a named part and is another. The innermost call that
# matches decides.
INSIDE = (
    Rule("experts/dispatch.py", "", "dispatch"),  # tokens to experts and back, number of rounds
    Rule("experts/rounds.py", "", "dispatch"),
    Rule("experts/places.py", "", "dispatch"),
    Rule("model/moe_statistics.py", "", "statistics"),
    Rule("model/layers.py", "RMSNorm", "norm"),
)
# Scope -> part.
NAMED = {
    "embed": "embed",
    "attention": "attention",
    "route": "router",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "dispatch",
    "mlp": "mlp",  # dense layers and shared experts
    "loss": "loss",
    "optimizer": "optimizer",
}
# After the scopes: what is around named parts. The innermost call that matches decides.
AROUND = (
    Rule("model/moe.py", "MoE._routed", "dispatch"),  # a custom gradient hides the calls below it
    Rule("model/moe.py", "MoE", "router"),
    Rule("model/decoder.py", "MTPLayer", "mtp"),
    Rule("model/decoder.py", "", "other"),
    Rule("model/transformer.py", "", "other"),  # the model as a whole, not the loss that calls it
    Rule("objectives/", "", "loss"),
    Rule("model/stages.py", "", "pipeline"),
    Rule("parallel/pipeline.py", "", "pipeline"),
    Rule("parallel/compression.py", "", "compression"),  # the sum of gradients over replicas
)
# For the time of parts, where a part is all that it computes: the model's own names, and "norm",
# which has none.
SCOPES = (*NAMED, "norm")
_SCOPE_OF = {"router": "route", "statistics": "route"}
# What a decoder layer is made of; "layer": weights gathered ahead of it, of which the program does
# not say which.
LAYER_PARTS = ("dispatch", "experts", "statistics", "router", "attention", "mlp", "norm", "layer")


class Origin:
    """Finds the origin of a module's instructions."""

    def __init__(self, module: hlo.Module):
        self.module = module

    def shares(
        self, computation: str, instruction: hlo.Instruction, visit: loops.Visit, moves_tokens: bool
    ) -> tuple[tuple[str, str, float], ...]:
        """(phase, part, share of the bytes) of a collective, most first.

        phase is forward, recompute, backward, optimizer or other; part one of PARTS or other. A
        collective with several operands was combined from several; each belongs where its operand
        comes from, but for tokens, which come from the layer before. The first layer's weights,
        gathered ahead of the loop over layers, may be combined with the embedding.

        Args:
          moves_tokens: it may be the dispatch's.
        """
        here = self.module.computations[computation]
        operands = [here[name] for name in instruction.operands if name in here]
        own = self._of(computation, instruction, visit)
        if len(operands) < 2 or (moves_tokens and own[1] == "dispatch"):
            return ((*own, 1.0),)
        total = sum(o.bytes for o in operands) or 1
        shares: dict[tuple[str, str], float] = defaultdict(float)
        for o in operands:
            phase, part = self._of(computation, o, visit)
            if (
                part == "other"
                and own[1] not in LAYER_PARTS
                and self._of_a_stack(computation, o, visit)
            ):
                part = "layer"
            shares[own if part == "other" else (phase, part)] += o.bytes / total
        most_first = sorted(shares.items(), key=lambda item: item[1], reverse=True)
        return tuple((*origin, share) for origin, share in most_first)

    def scope(
        self, computation: str, instruction: hlo.Instruction, visit: loops.Visit
    ) -> tuple[str, str]:
        """(scope, phase) of any instruction: one of SCOPES or another part, by the innermost scope
        in its name, or by its calls."""
        source = self.source(computation, instruction, visit)
        if source is None:
            return "other", "other"
        phase, part = phase_of(source.op_name), scope_of(source.op_name) or self._part(source)
        return _SCOPE_OF.get(part, part), phase

    def source(
        self, computation: str, instruction: hlo.Instruction, visit: loops.Visit
    ) -> hlo.Instruction | None:
        """The instruction that says where this one comes from."""
        source = self._named(computation, instruction)
        return visit.caller[1] if source is None and visit.caller else source

    def _of(
        self, computation: str, instruction: hlo.Instruction, visit: loops.Visit
    ) -> tuple[str, str]:
        source = self.source(computation, instruction, visit)
        if source is None:
            return "other", "other"
        phase = phase_of(source.op_name)
        part = self._part(source)
        return phase, phase if part == "other" and phase == "optimizer" else part

    def _of_a_stack(
        self, computation: str, instruction: hlo.Instruction, visit: loops.Visit
    ) -> bool:
        """Whether it is one layer's slice of stacked weights: the scan over layers makes it, before
        any code of the layer."""
        source = self.source(computation, instruction, visit)
        return source is not None and any(
            file.endswith("model/transformer.py") and re.search(r"\b_scan\b", function)
            for file, function in self.module.frames(source)[:1]
        )

    def _named(
        self, computation: str, instruction: hlo.Instruction, distance: int = 8
    ) -> hlo.Instruction | None:
        """The instruction, or the nearest that it reads, with an operation's name."""
        front = [(computation, instruction)]
        for _ in range(distance):
            for _, i in front:
                if i.op_name:
                    return i
            front = [p for c, i in front for p in self.module.producers(c, i)][:64]
        return None

    def _part(self, instruction: hlo.Instruction) -> str:
        frames = self.module.frames(instruction)
        inside = _innermost(INSIDE, frames)
        named = NAMED.get(scope_of(instruction.op_name), "other")
        # Gradients are compressed inside the optimizer's scope.
        if inside or named not in ("optimizer", "other"):
            return inside or named
        return _innermost(AROUND, frames) or named


def by_name(module: hlo.Module) -> dict[str, tuple[str, str, str]]:
    """Name of an instruction -> (scope, phase, opcode), of all that a program runs: the events of a
    profile have the names alone."""
    sources = Origin(module)
    out = {}
    for computation, instruction, visit in loops.visits(module, lambda _: True):
        if instruction.name not in out:
            out[instruction.name] = (
                *sources.scope(computation, instruction, visit),
                instruction.opcode,
            )
    return out


def _innermost(rules: tuple[Rule, ...], frames: list[tuple[str, str]]) -> str:
    for file, function in frames:
        for rule in rules:
            if rule.holds(file, function):
                return rule.part
    return ""


def scope_of(op_name: str) -> str:
    """The innermost of SCOPES in an operation's name, or "":
    'jit(train_step)/transpose(jvp(attention))/dot_general' is of attention."""
    names = [name for name in re.split(r"[/()]", op_name) if name in SCOPES]
    return names[-1] if names else ""


def phase_of(op_name: str) -> str:
    """The pass over the model that an operation belongs to, from its name."""
    if "/optimizer" in op_name:
        return "optimizer"
    if "rematted_computation" in op_name:
        return "recompute"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "other"
