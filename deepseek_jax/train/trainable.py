"""Which weights learn, and how fast: `config.optimizer.lr_multipliers` and `config.esft.experts` for the
parameters of a model.

A parameter with the factor 0 is frozen: it lies where the rule table puts it, as any weight, and the step
reads it; it has no gradient, no optimizer state and no share in the norm that is clipped. The others are what
TrainState.params holds. Experts of which some learn are both: all of them are frozen, and those that learn
are a stack of their own (some_experts.py).

The factor multiplies a weight's learning rate, and with it its weight decay, as torch's parameter groups with
a learning rate of their own do.
"""

import dataclasses
import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from deepseek_jax.cli.texts import human, table
from deepseek_jax.config import multipliers as text
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.model import lora
from deepseek_jax.train import expert_table
from deepseek_jax.train.expert_table import ExpertTable
from deepseek_jax.train.patterns import Path, Weight, matches_nothing, weights_of

NONE = nnx.State({})  # no parameters


class Group(NamedTuple):
    """The weights of one pattern, or what is frozen of them."""

    pattern: str
    factor: float
    paths: tuple[str, ...]  # "layers/mlp/gate/kernel"
    parameters: int


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Factors of the learning rate.

    Attributes:
      factors: of parameters by their paths; 1 for those that are not there.
      groups: the same by pattern, in order; empty without lr_multipliers and esft.
      experts: which experts learn, where that is not all of a layer: expert_table.indices.
    """

    factors: Mapping[Path, float] = dataclasses.field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    experts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def of(self, path: Path) -> float:
        """The factor of a parameter."""
        return self.factors.get(path, 1.0)

    @property
    def digest(self) -> str:
        """The start of a SHA-256 of the experts that learn; "" where none are chosen."""
        found = {stack: index.tolist() for stack, index in sorted(self.experts.items())}
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12] if found else ""

    def stack_of(self, path: Path) -> str:
        """The key in `experts` of a parameter of experts of which some learn; "" for all others."""
        stack = stack_of(path)
        return stack if stack in self.experts and self.of(path) else ""

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(what learns, what is frozen) of parameters, or of anything by parameter: shapes, PartitionSpecs.
        Experts of which some learn are among what is frozen.
        """
        flat = nnx.to_flat_state(params)
        learns = [(p, v) for p, v in flat if self.of(p) and not self.stack_of(p)]
        if len(learns) == len(flat):
            return params, NONE
        rest = [(p, v) for p, v in flat if not self.of(p) or self.stack_of(p)]
        return nnx.from_flat_state(learns), nnx.from_flat_state(rest)

    def hold_bias(self, new: nnx.State, old: nnx.State) -> nnx.State:
        """The selection biases after a step: of a frozen router the old ones."""
        held = [(*path[:-1], "kernel") for path, _ in nnx.to_flat_state(new)]
        if all(map(self.of, held)):
            return new
        pairs = zip(held, nnx.to_flat_state(new), nnx.to_flat_state(old), strict=True)
        return nnx.from_flat_state([n if self.of(kernel) else o for kernel, n, o in pairs])

    def scale(self) -> optax.GradientTransformation | None:
        """The last part of an optimizer: updates times their factors. None where all are 1."""
        if not any(factor not in (0, 1) for factor in self.factors.values()):
            return None

        def update(updates, state, params=None):
            flat = [(p, _times(v, self.of(p))) for p, v in nnx.to_flat_state(updates)]
            return nnx.from_flat_state(flat), state

        return optax.GradientTransformation(lambda _: optax.EmptyState(), update)

    def table(self) -> list[str]:
        """Lines: each pattern with its factor, its weights and their parameters; [] where all learn alike."""
        if not self.groups:
            return []
        rows = [["pattern", "factor", "parameters", "weights"]]
        everything = _places(path for group in self.groups for path in group.paths)
        for group in self.groups:
            factor = f"{group.factor:g}" if group.factor else "frozen"
            others = "(all others)" if any(g.pattern for g in self.groups) else "(all)"
            cells = [group.pattern or others, factor, human(group.parameters)]
            short = [
                name if stacks == everything[name] else f"{name} of {' and '.join(sorted(stacks))}"
                for name, stacks in _places(group.paths).items()
            ]
            for line in textwrap.wrap(", ".join(short), 70, break_on_hyphens=False):
                rows.append([*cells, line])
                cells = [""] * 3
        total = sum(g.parameters for g in self.groups)
        learn = sum(g.parameters for g in self.groups if g.factor)
        said = f"{human(learn)} of {human(total)} parameters learn ({learn / total:.1%})"
        if self.experts:
            counts = np.concatenate(
                [np.sum(np.atleast_2d(i) >= 0, 1) for i in self.experts.values()]
            )
            said += f"; {counts.min()} to {counts.max()} experts of a layer, {counts.mean():.1f} on average"
        return [*table(rows, right=False).splitlines(), said]


def _places(paths: Iterable[str]) -> dict[str, set[str]]:
    """Short names of weights, and the stacks of layers in which they are."""
    out: dict[str, set[str]] = {}
    for path in paths:
        short = path.removesuffix("/kernel").removesuffix("/weight")
        found = re.match(r"(dense_layers|layers|mtp/\d+)/(?:layer/)?(.*)", short)
        stack, name = (found[1], found[2]) if found else ("", short)
        out.setdefault(name, set()).add(stack)
    return out


def stack_of(path: Path) -> str:
    """The key in expert_table.indices of a parameter of routed experts; "" for all others."""
    if "experts" not in path:
        return ""
    return f"mtp_{path[1]}" if path[0] == "mtp" else str(path[0])


def join(params: nnx.State, others: nnx.State) -> nnx.State:
    """The parameters of both; where both have one, that of the others."""
    return nnx.merge_state(params, others) if others else params


def multipliers(config: Config, params: nnx.State) -> Multipliers:
    """The factors of a model's parameters, arrays or shapes.

    Raises:
      UserError: a pattern matches nothing, nothing that patterns before it do not, a part of an array only,
        or only what config.esft.experts freezes; all weights are frozen; or the table of config.esft.experts
        is wrong.
    """
    rules = text.parse(config.optimizer.lr_multipliers)
    default, file = config.optimizer.default_lr_multiplier, config.esft.experts
    if not rules and default == 1 and not file and not config.lora.r:
        return Multipliers()
    weights = weights_of(config, params)
    base: dict[Path, Weight] = {}
    if config.lora.r:  # patterns are for what learns beside the base
        base = {p: w for p, w in weights.items() if not lora.learns(p, config.lora)}
        weights = {p: w for p, w in weights.items() if p not in base}
    weights = _by_pattern(weights, rules, default)
    experts: Mapping[str, np.ndarray] = {}
    if file:
        table = expert_table.read(file, config.model)
        experts = expert_table.indices(table, config.model)
        weights = {path: _of_table(w, path, table, experts) for path, w in weights.items()}
    for pattern, factor in rules:
        if factor and not any(w.factor for w in weights.values() if w.group == pattern):
            raise UserError(
                f"{text.OPTION}: {pattern!r} matches only weights that {expert_table.OPTION}={file} "
                f"freezes. Leave it out, or let the table train them."
            )
    if not any(w.factor for w in weights.values()):
        of_table = f" that {expert_table.OPTION}={file} trains" if file else ""
        raise UserError(
            f"{text.OPTION}={config.optimizer.lr_multipliers!r} and "
            f"config.optimizer.default_lr_multiplier={default:g} freeze every weight of this model{of_table}."
            f" Give one a factor above 0."
        )
    patterns = [pattern for pattern, _ in rules]
    if config.lora.r:
        weights = _of_lora(weights, base, config)
        patterns = [*dict.fromkeys([*patterns, *(w.group for w in weights.values())])]
    factors = {path: w.factor for path, w in weights.items()}
    stacks = {stack_of(path) for path, factor in factors.items() if factor}
    return Multipliers(
        factors,
        _groups(weights.values(), patterns),
        {stack: index for stack, index in experts.items() if stack in stacks},
    )


def _by_pattern(
    weights: dict[Path, Weight], rules: Sequence[tuple[str, float]], default: float
) -> dict[Path, Weight]:
    """The weights with the pattern and the factor that each gets."""
    out: dict[Path, Weight] = {}
    left = weights
    for pattern, factor in rules:
        chosen = {path: w for path, w in left.items() if w.matches(pattern)}
        if not chosen:
            raise matches_nothing(pattern, weights.values())
        left = {path: w for path, w in left.items() if path not in chosen}
        out |= {p: w._replace(group=pattern, factor=factor) for p, w in chosen.items()}
    out |= {path: w._replace(factor=default) for path, w in left.items()}
    return {path: out[path] for path in weights}


def _of_lora(
    weights: dict[Path, Weight], base: dict[Path, Weight], config: Config
) -> dict[Path, Weight]:
    """What learns and the base, under the names that the table has for them."""
    out = {}
    for path, w in weights.items():
        kind = f"(LoRA, r={config.lora.r})" if lora.is_factor(path) else "(modules_to_save)"
        out[path] = w._replace(group=w.group or kind, path=lora.adapted(w.path))
    held = f"(base, {config.lora.base_dtype})"
    return out | {
        path: w._replace(group=held, factor=0.0, path="all others") for path, w in base.items()
    }


def _of_table(
    w: Weight, path: Path, table: ExpertTable, experts: Mapping[str, np.ndarray]
) -> Weight:
    """A weight as far as the table of config.esft.experts lets it learn."""
    if stack := stack_of(path):
        if stack not in experts:
            return w._replace(factor=0.0)
        index = experts[stack]
        one = w.size // math.prod(w.shape[: index.ndim])
        return w._replace(learning=int(np.sum(index >= 0)) * one)
    learns = table.shared_experts if "shared_experts" in path else table.non_expert_modules
    return w if learns else w._replace(factor=0.0)


def _groups(weights: Iterable[Weight], patterns: Sequence[str]) -> tuple[Group, ...]:
    """Weights of the same pattern and factor together, in the order of the patterns."""
    found: dict[tuple[str, float], Group] = {}
    for w in weights:
        learning = w.size if w.learning is None or not w.factor else w.learning
        for factor, count in ((w.factor, learning), (0.0, w.size - learning)):
            if count:
                key = w.group, factor
                group = found.get(key, Group(w.group, factor, (), 0))
                paths = tuple(dict.fromkeys([*group.paths, w.path]))
                found[key] = group._replace(paths=paths, parameters=group.parameters + count)
    order = [*patterns, ""]
    return tuple(sorted(found.values(), key=lambda g: (order.index(g.pattern), -g.factor)))


def _times(variable: Any, factor: float) -> Any:
    return variable if factor == 1 else jax.tree.map(lambda u: u * factor, variable)
