"""Which weights learn, and how fast: `config.optimizer.lr_multipliers` for the parameters of a model.

A parameter with the factor 0 is frozen: it lies where the rule table puts it, as any weight, and the step
reads it; it has no gradient, no optimizer state and no share in the norm that is clipped. The others are what
TrainState.params holds.

The factor multiplies a weight's learning rate, and with it its weight decay, as torch's parameter groups with
a learning rate of their own do.
"""

import dataclasses
import difflib
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from deepseek_jax.cli.texts import human, table
from deepseek_jax.config import multipliers as text
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.hf import names
from deepseek_jax.hf.configuration import find_family
from deepseek_jax.hf.names import Leaf
from deepseek_jax.model import lora

Path = tuple[Any, ...]  # of a variable in a state: ("layers", "mlp", "gate", "kernel")

NONE = nnx.State({})  # no parameters


class Group(NamedTuple):
    """The weights of one pattern."""

    pattern: str  # "" for those that no pattern matches
    factor: float
    paths: tuple[str, ...]  # "layers/mlp/gate/kernel"
    parameters: int


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Factors of the learning rate.

    Attributes:
      factors: of parameters by their paths; 1 for those that are not there.
      groups: the same by pattern, in order; empty without lr_multipliers.
    """

    factors: Mapping[Path, float] = dataclasses.field(default_factory=dict)
    groups: tuple[Group, ...] = ()

    def of(self, path: Path) -> float:
        """The factor of a parameter."""
        return self.factors.get(path, 1.0)

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(what learns, what is frozen) of parameters, or of anything by parameter: shapes, PartitionSpecs."""
        if not any(factor == 0 for factor in self.factors.values()):
            return params, NONE
        flat = nnx.to_flat_state(params)
        learns, frozen = (
            [(p, v) for p, v in flat if bool(self.of(p)) == yes] for yes in (True, False)
        )
        return nnx.from_flat_state(learns), nnx.from_flat_state(frozen)

    def scale(self) -> optax.GradientTransformation | None:
        """The last part of an optimizer: updates times their factors. None where all are 1."""
        if not any(factor not in (0, 1) for factor in self.factors.values()):
            return None

        def update(updates, state, params=None):
            flat = [(p, _times(v, self.of(p))) for p, v in nnx.to_flat_state(updates)]
            return nnx.from_flat_state(flat), state

        return optax.GradientTransformation(lambda _: optax.EmptyState(), update)

    def table(self) -> list[str]:
        """Lines: each pattern with its factor, its weights and their parameters; [] without multipliers."""
        if not self.groups:
            return []
        rows = [["pattern", "factor", "parameters", "weights"]]
        for group in self.groups:
            cells = [
                group.pattern or "(all others)",
                f"{group.factor:g}" if group.factor else "frozen",
                human(group.parameters),
            ]
            lines = textwrap.wrap(", ".join(map(_short, group.paths)), 60, break_on_hyphens=False)
            for line in lines or ["none"]:
                rows.append([*cells, line])
                cells = [""] * 3
        total = sum(g.parameters for g in self.groups)
        learn = sum(g.parameters for g in self.groups if g.factor)
        said = f"{human(learn)} of {human(total)} parameters learn ({learn / total:.1%})"
        return [*table(rows, right=False).splitlines(), said]


def join(params: nnx.State, frozen: nnx.State) -> nnx.State:
    """The inverse of `Multipliers.split`."""
    return nnx.merge_state(params, frozen) if frozen else params


def multipliers(config: Config, params: nnx.State) -> Multipliers:
    """The factors of a model's parameters, arrays or shapes.

    Raises:
      UserError: a pattern matches nothing, nothing that patterns before it do not, or a part of an array
        only; or all weights are frozen.
    """
    rules = text.parse(config.optimizer.lr_multipliers)
    default = config.optimizer.default_lr_multiplier
    if not rules and default == 1 and not config.lora.r:
        return Multipliers()
    weights = _weights(config, params)
    base: dict[Path, _Weight] = {}
    if config.lora.r:  # patterns are for what learns besides the base
        base = {p: w for p, w in weights.items() if not lora.learns(p, config.lora)}
        weights = {p: w for p, w in weights.items() if p not in base}
    left, groups = dict(weights), []
    for pattern, factor in rules:
        chosen = {path: w for path, w in left.items() if w.matches(pattern)}
        if not chosen:
            raise _matches_nothing(pattern, weights.values())
        groups.append(_group(pattern, factor, chosen.values()))
        left = {path: w for path, w in left.items() if path not in chosen}
        weights |= {path: w._replace(factor=factor) for path, w in chosen.items()}
    weights |= {path: w._replace(factor=default) for path, w in left.items()}
    for name, chosen in _rest(left, config):
        group = _group(name, default, chosen.values())
        groups.append(group._replace(paths=tuple(dict.fromkeys(map(lora.adapted, group.paths)))))
    if not any(w.factor for w in weights.values()):
        raise UserError(
            f"{text.OPTION}={config.optimizer.lr_multipliers!r} and "
            f"config.optimizer.default_lr_multiplier={default:g} freeze every weight of this model. Give one "
            f"a factor above 0."
        )
    if base:
        group = _group(f"(base, {config.lora.base_dtype})", 0.0, base.values())
        groups.append(group._replace(paths=("all others",)))
        weights |= {path: w._replace(factor=0.0) for path, w in base.items()}
    return Multipliers({path: w.factor for path, w in weights.items()}, tuple(groups))


class _Weight(NamedTuple):
    """A parameter as patterns see it."""

    path: str  # here
    names: tuple[tuple[str, ...], ...]  # of its tensors: alternatives
    parameters: int
    factor: float = 1.0

    def matches(self, pattern: str) -> bool:
        """Whether a pattern is found in the path, or in the names of all its tensors.

        Raises:
          UserError: it is found in the names of some of them.
        """
        if re.search(pattern, self.path):
            return True
        some: list[str] = []
        for tensors in self.names:
            missed = [name for name in tensors if not re.search(pattern, name)]
            if not missed:
                return True
            some = some or (missed if len(missed) < len(tensors) else [])
        if some:
            raise UserError(
                f"{text.OPTION}: {pattern!r} matches a part of the tensors that lie in the array {self.path}, "
                f"and not {some[0]}. An array has one learning rate: write a pattern that matches all of it, "
                f"as {self.path} does, or none."
            )
        return False


def _rest(left: dict[Path, _Weight], config: Config) -> Iterator[tuple[str, dict[Path, _Weight]]]:
    """What no pattern matches, by its name in the table."""
    factors = {path: w for path, w in left.items() if lora.is_factor(path)}
    others = {path: w for path, w in left.items() if path not in factors}
    if factors:
        yield f"(LoRA, r={config.lora.r})", factors
    if others:
        yield "(modules_to_save)" if config.lora.r else "", others


def _weights(config: Config, params: nnx.State) -> dict[Path, _Weight]:
    try:
        family = find_family(config.model)
    except UserError:  # a model of our own: it has no names there
        family = ""
    out = {}
    for path, variable in nnx.to_flat_state(params):
        name, shape = "/".join(map(str, path)), tuple(variable.get_value().shape)
        out[path] = _Weight(name, _names(config, name, shape, family), math.prod(shape))
    return out


def _names(
    config: Config, path: str, shape: tuple[int, ...], family: str
) -> tuple[tuple[str, ...], ...]:
    """The Hugging Face names of the tensors of a parameter, by alternative; none where it has none."""
    try:
        leaf = names.leaf_of(path, shape, family, config.model)
    except KeyError:
        return ()
    return tuple(_names_of(leaf._replace(names=(parts,)), config) for parts in leaf.names)


def _names_of(leaf: Leaf, config: Config) -> tuple[str, ...]:
    experts = range(config.model.n_routed_experts or 1)
    found = [n for prefix in leaf.prefixes for n in names.names_of(leaf, prefix)]
    return tuple(dict.fromkeys(n.format(e=e) for n in found for e in experts))


def _group(pattern: str, factor: float, weights: Any) -> Group:
    weights = tuple(weights)
    paths = tuple(w.path for w in weights)
    return Group(pattern, factor, paths, sum(w.parameters for w in weights))


def _matches_nothing(pattern: str, weights: Any) -> UserError:
    """The error about a pattern that has no weight left."""
    taken = [w.path for w in weights if w.matches(pattern)]
    if taken:
        return UserError(
            f"{text.OPTION}: all that {pattern!r} matches ({_some(taken)}) has an earlier pattern already, and "
            f"the first that matches wins. Put it before them, or leave it out."
        )
    word = re.sub(r"\W+", " ", pattern.replace("\\", " ")).strip()

    def likeness(path: str) -> float:
        parts = [path, *path.split("/")]
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)

    near = sorted((w.path for w in weights), key=likeness, reverse=True)
    return UserError(
        f"{text.OPTION}: {pattern!r} matches no weight of this model. Near it are {_some(near)}: set a "
        f"pattern that matches one, or leave it out."
    )


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")


def _short(path: str) -> str:
    return path.removesuffix("/kernel").removesuffix("/weight")


def _times(variable: Any, factor: float) -> Any:
    return variable if factor == 1 else jax.tree.map(lambda u: u * factor, variable)
