"""The weights of a model as the patterns of `config.optimizer.lr_multipliers` see them: by their paths here
and by the names of their tensors in Hugging Face checkpoints.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from flax import nnx

from deepseek_jax.config import multipliers
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.hf import names
from deepseek_jax.hf.configuration import find_family

Path = tuple[Any, ...]  # of a variable in a state: ("layers", "mlp", "gate", "kernel")


class Weight(NamedTuple):
    """A parameter and what is said of it."""

    path: str  # here: "layers/mlp/gate/kernel"
    names: tuple[tuple[str, ...], ...]  # of its tensors: alternatives
    shape: tuple[int, ...]
    factor: float = 1.0  # of its learning rate
    group: str = ""  # the pattern that has it
    learning: int | None = None  # of its numbers; None: all, or none with the factor 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def matches(self, pattern: str) -> bool:
        """Whether a pattern is found in the path, or in the names of all its tensors.

        Raises:
          UserError: it is found in the names of some of them.
        """
        if re.search(pattern, self.path):
            return True
        some = ""
        for tensors in self.names:
            missed = [name for name in tensors if not re.search(pattern, name)]
            if not missed:
                return True
            some = some or (missed[0] if len(missed) < len(tensors) else "")
        if some:
            raise UserError(
                f"{multipliers.OPTION}: {pattern!r} matches a part of the tensors that lie in the array "
                f"{self.path}, and not {some}. An array has one learning rate: write a pattern that matches "
                f"all of it, as {self.path} does, or none."
            )
        return False


def weights_of(config: Config, params: nnx.State) -> dict[Path, Weight]:
    """All parameters of a model, arrays or shapes."""
    try:
        family = find_family(config.model)
    except UserError:  # a model of our own: it has no names there
        family = ""
    out = {}
    for path, variable in nnx.to_flat_state(params):
        name, shape = "/".join(map(str, path)), tuple(variable.get_value().shape)
        out[path] = Weight(name, _names(config, name, shape, family), shape)
    return out


def _names(
    config: Config, path: str, shape: tuple[int, ...], family: str
) -> tuple[tuple[str, ...], ...]:
    """The Hugging Face names of the tensors of a parameter, by alternative; none where it has none."""
    try:
        leaf = names.leaf_of(path, shape, family, config.model)
    except KeyError:
        return ()
    experts = range(config.model.n_routed_experts or 1)

    def of(parts: tuple[str, ...]) -> tuple[str, ...]:
        one = leaf._replace(names=(parts,))
        found = [n for prefix in leaf.prefixes for n in names.names_of(one, prefix)]
        return tuple(dict.fromkeys(n.format(e=e) for n in found for e in experts))

    return tuple(map(of, leaf.names))


def matches_nothing(pattern: str, weights: Iterable[Weight]) -> UserError:
    """The error about a pattern that has no weight left."""
    weights = list(weights)
    if taken := [w.path for w in weights if w.matches(pattern)]:
        return UserError(
            f"{multipliers.OPTION}: all that {pattern!r} matches ({_some(taken)}) has an earlier pattern "
            f"already, and the first that matches wins. Put it before them, or leave it out."
        )
    word = re.sub(r"\W+", " ", pattern.replace("\\", " ")).strip()

    def likeness(path: str) -> float:
        parts = [path, *path.split("/")]
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)

    near = sorted((w.path for w in weights), key=likeness, reverse=True)
    return UserError(
        f"{multipliers.OPTION}: {pattern!r} matches no weight of this model. Near it are {_some(near)}: set "
        f"a pattern that matches one, or leave it out."
    )


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
