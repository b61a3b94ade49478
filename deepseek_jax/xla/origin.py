"""Where an instruction of a compiled step comes from: which pass over the model, and which part of it.

The pass is in the operation's name, which JAX builds from the transformations (jvp, transpose, rematted_computation); the part
is in the Python calls that made it, innermost first. An instruction that the compiler made itself has neither: it takes those
of the nearest instruction that it reads.
"""

import re
from collections import Counter

from deepseek_jax.xla import hlo

# (place in the package, pattern of the function) -> part. The innermost call that matches decides.
PARTS = (
    (
        "experts/dispatch.py",
        r"",
        "dispatch",
    ),  # tokens on their way to experts and back, and the number of rounds
    ("experts/rounds.py", r"", "dispatch"),
    ("parallel/pipeline.py", r"", "pipeline"),
    ("parallel/compression.py", r"", "compression"),  # the sum of gradients over replicas
    ("model/stages.py", r"", "pipeline"),
    ("model/moe.py", r"\b_gather\b", "experts"),  # weights of the routed experts
    ("model/moe.py", r"\b_statistics\b|\bload_of\b", "statistics"),
    ("model/moe.py", r"\bMoE\._routed\b", "dispatch"),  # a custom gradient hides the calls below it
    ("model/moe.py", r"\bMoE\b", "router"),
    ("model/router.py", r"", "router"),
    ("model/attention/interface.py", r"", "attention"),
    ("model/layers.py", r"\bMLP\b", "mlp"),  # dense layers and shared experts
    ("model/layers.py", r"\bRMSNorm\b", "norm"),
    ("model/layers.py", r"\bEmbedding\b", "embed"),
    ("model/transformer.py", r"\blogits\b", "head"),
    ("model/transformer.py", r"\bMTPLayer\b", "mtp"),
    ("model/transformer.py", r"", "other"),  # the model as a whole: never the loss that called it
    ("model/head.py", r"", "loss"),
    ("model/logit_functions.py", r"", "loss"),
    ("objectives/pretrain.py", r"", "loss"),
    ("objectives/routing.py", r"", "loss"),
    ("train/optimizer.py", r"", "optimizer"),
    ("train/muon_adafactor.py", r"", "optimizer"),
    ("train/loss_scale.py", r"", "optimizer"),
    ("train/balance.py", r"", "optimizer"),
)
# The names that the model gives its parts with jax.named_scope, and those of PARTS that have another name there: for the time of parts,
# where a part is all that it computes. Bytes go by PARTS alone, which know a gather of weights from the layer that asked for it.
SCOPES = (
    "embed",
    "attention",
    "route",
    "dispatch",
    "experts",
    "combine",
    "mlp",
    "norm",
    "loss",
    "optimizer",
)
_SCOPE_OF = {"router": "route", "statistics": "route", "head": "loss"}
# What a decoder layer is made of; "layer": weights gathered ahead of it, of which the program does not say which.
LAYER_PARTS = ("dispatch", "experts", "statistics", "router", "attention", "mlp", "norm", "layer")


class Origin:
    """Finds the origin of a module's instructions."""

    def __init__(self, module: hlo.Module):
        self.module = module

    def shares(
        self, computation: str, instruction: hlo.Instruction, visit: hlo.Visit, moves_tokens: bool
    ) -> tuple[tuple[str, str, float], ...]:
        """(phase, part, share of the bytes) of a collective, most first.

        phase is forward, recompute, backward, optimizer or other; part one of PARTS or other. A collective with several operands
        was combined from several; each belongs where its operand comes from, but for tokens, which come from the layer before. The
        first layer's weights, gathered ahead of the loop over layers, may be combined with the embedding.

        Args:
          moves_tokens: it may be the dispatch's.
        """
        here = self.module.computations[computation]
        operands = [here[name] for name in instruction.operands if name in here]
        own = self._of(computation, instruction, visit)
        if len(operands) < 2 or (moves_tokens and own[1] == "dispatch"):
            return ((*own, 1.0),)
        total = sum(o.bytes for o in operands) or 1
        shares: Counter = Counter()
        for o in operands:
            phase, part = self._of(computation, o, visit)
            if (
                part == "other"
                and own[1] not in LAYER_PARTS
                and self._of_a_stack(computation, o, visit)
            ):
                part = "layer"
            shares[own if part == "other" else (phase, part)] += o.bytes / total
        return tuple((*origin, share) for origin, share in shares.most_common())

    def scope(
        self, computation: str, instruction: hlo.Instruction, visit: hlo.Visit
    ) -> tuple[str, str]:
        """(scope, phase) of any instruction: one of SCOPES or another part, by the innermost scope in its name, or by its calls."""
        source = self._source(computation, instruction, visit)
        if source is None:
            return "other", "other"
        phase, part = phase_of(source.op_name), scope_of(source.op_name) or self._part(source)
        return _SCOPE_OF.get(part, part), phase

    def _source(
        self, computation: str, instruction: hlo.Instruction, visit: hlo.Visit
    ) -> hlo.Instruction | None:
        """The instruction that says where this one comes from."""
        source = self._named(computation, instruction)
        return visit.caller[1] if source is None and visit.caller else source

    def _of(
        self, computation: str, instruction: hlo.Instruction, visit: hlo.Visit
    ) -> tuple[str, str]:
        source = self._source(computation, instruction, visit)
        if source is None:
            return "other", "other"
        phase = phase_of(source.op_name)
        part = self._part(source)
        return phase, phase if part == "other" and phase == "optimizer" else part

    def _of_a_stack(self, computation: str, instruction: hlo.Instruction, visit: hlo.Visit) -> bool:
        """Whether it is one layer's slice of stacked weights: the scan over layers makes it, before any code of the layer."""
        source = self._source(computation, instruction, visit)
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
        for file, function in self.module.frames(instruction):
            for place, pattern, part in PARTS:
                if f"deepseek_jax/{place}" in file and re.search(pattern, function):
                    return part
        return "other"


def scope_of(op_name: str) -> str:
    """The innermost of SCOPES in an operation's name, or "": 'jit(train_step)/transpose(jvp(attention))/dot_general' is of attention."""
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
