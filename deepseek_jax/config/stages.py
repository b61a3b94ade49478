"""`distill.stages` as text: the stages of a run, one after the other, each with weights that learn in it.

Which steps they come to is in run/stages.py, and what their patterns mean for weights in train/trainable.py.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from deepseek_jax.config import multipliers
from deepseek_jax.config.options import Config, replaced
from deepseek_jax.errors import UserError

OPTION = "config.distill.stages"
MOST_BYTES = 2**20  # of a file: a list of stages is short
_EXAMPLE = (
    'Write a list: [{"name": "experts", "epochs": 2, "lr_multipliers": "experts=1,.=0"}, '
    '{"name": "all", "steps": 500, "lr_multipliers": ".=1"}].'
)
# What MoE_Factorize_Compress calls the keys of a stage.
_THEIRS = {
    "stage_name": "name",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "parameter_lr_multipliers": "lr_multipliers",
}


class StageOptions(NamedTuple):
    """One stage, as it was written."""

    name: str
    epochs: float = 0.0  # passes over the training data; 0: `steps` says how long it is
    steps: int = 0
    lr_multipliers: str = ""  # as optimizer.lr_multipliers; "": all weights learn alike
    learning_rate: float = 0.0  # peak; 0: optimizer.learning_rate

    def to_json(self) -> dict[str, Any]:
        """The keys that were given."""
        defaults = self._field_defaults
        return {k: v for k, v in self._asdict().items() if k == "name" or v != defaults[k]}

    @property
    def length(self) -> str:
        """ "2 epochs", "500 steps"."""
        value, unit = (self.steps, "step") if self.steps else (self.epochs, "epoch")
        return f"{value:g} {unit}{'s' * (value != 1)}"


def parse(text: str) -> tuple[StageOptions, ...]:
    """The stages of JSON text; () of empty text.

    Raises:
      UserError: it is no list of stages, or a stage is not one.
    """
    if not text.strip():
        return ()
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{OPTION} is neither a file nor JSON ({e}). {_EXAMPLE}") from e
    if not isinstance(found, list) or not found or not all(isinstance(s, dict) for s in found):
        raise UserError(f"{OPTION}={_short(found)} is no list of stages. {_EXAMPLE}")
    stages = tuple(_stage(number, one) for number, one in enumerate(found, 1))
    names = [s.name for s in stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{OPTION}: {names.count(name)} stages are named {name!r}. Give each a name of its own."
            )
    return stages


def of_config(config: Config) -> tuple[StageOptions, ...]:
    """The stages of a run's options; () of a run without."""
    return parse(config.distill.stages)


def read(config: Config) -> Config:
    """The options with what the file of distill.stages holds in place of its path.

    Raises:
      UserError: it cannot be read, or as `parse`.
    """
    given: Any = config.distill.stages
    if isinstance(given, (list, tuple)):  # of a caller from Python
        given = json.dumps(given)
    text = given.strip()
    if text and not text.startswith(("[", "{")) and "\n" not in text:
        text = _read(text)
    stages = parse(text)
    return replaced(
        config, "distill.stages", json.dumps([s.to_json() for s in stages]) if stages else ""
    )


def _read(path: str) -> str:
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as f:
            text = f.read(MOST_BYTES + 1)
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no text"
        raise UserError(
            f"{OPTION}={path!r} is no JSON, and as a file it cannot be read ({why}). {_EXAMPLE}"
        ) from e
    if len(text) > MOST_BYTES:
        raise UserError(f"{OPTION}={path!r} is a file of more than {MOST_BYTES} bytes. {_EXAMPLE}")
    if not text.strip():
        raise UserError(f"{OPTION}={path!r} is an empty file. {_EXAMPLE}")
    return text


def _stage(number: int, given: Mapping[str, Any]) -> StageOptions:
    """One stage of the list.

    Raises:
      UserError: a key is not known, missing or of the wrong type.
    """
    name = given.get("name")
    where = f"{OPTION}, stage {number}" + (f" ({name})" if isinstance(name, str) and name else "")
    for key in given:
        if key not in StageOptions._fields:
            here = f"{key} is {_THEIRS[key]} here. " if key in _THEIRS else ""
            raise UserError(
                f"{where}: {key!r} is not known. {here}A stage has {', '.join(StageOptions._fields)}."
                f"{_as_text(given[key])}"
            )
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise UserError(f'{where} has no name. Give it one: "name": "experts".')
    if ("epochs" in given) == ("steps" in given):
        has = "both epochs and steps" if "epochs" in given else "neither epochs nor steps"
        raise UserError(f'{where} has {has}. Give it one of them, for instance "epochs": 1.')
    for key, kinds in (("epochs", (int, float)), ("steps", (int,))):
        value = given.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            unit = "a whole number of steps" if key == "steps" else "a number of passes"
            raise UserError(
                f"{where}: {key}={value!r} is not {unit} above 0. Set it, or leave the stage out."
            )
    rules = given.get("lr_multipliers", "")
    if not isinstance(rules, str):
        raise UserError(
            f"{where}: lr_multipliers={_short(rules)} is no text of PATTERN=FACTOR.{_as_text(rules)}"
        )
    with naming(where):
        multipliers.parse(rules)
    rate = given.get("learning_rate", 1.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise UserError(
            f"{where}: learning_rate={_short(rate)} is no number above 0. Set it, or leave it out for "
            "config.optimizer.learning_rate."
        )
    return StageOptions(
        name=name,
        epochs=float(given.get("epochs", 0.0)),
        steps=given.get("steps", 0),
        lr_multipliers=rules.strip(),
        learning_rate=float(given.get("learning_rate", 0.0)),
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in a stage")
    return out


def title(number: int, stage: StageOptions) -> str:
    """How messages name a stage."""
    return f"{OPTION}, stage {number} ({stage.name})"


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """A mistake inside that names optimizer.lr_multipliers is one of a stage's own, and says so."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace(multipliers.OPTION, f"{where}: lr_multipliers")) from e


def _as_text(rules: Any) -> str:
    """A sentence with what a list of pattern and lr_multiplier is here; "" for anything else."""
    if not isinstance(rules, list) or not all(
        isinstance(r, dict) and {"pattern", "lr_multiplier"} <= r.keys() for r in rules
    ):
        return ""
    text = ",".join(f"{r['pattern']}={r['lr_multiplier']}" for r in rules)
    return f' Write "lr_multipliers": {json.dumps(text)}.'


def _short(value: Any) -> str:
    """A value for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
