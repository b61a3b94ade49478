"""train.py and configs/: of the checkout that this package is in, or of the wheel that brought it.

A wheel has them in `deepseek_jax/_entry` (setup.py).
"""

import os
import re
from collections.abc import Iterable

from deepseek_jax.errors import UserError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PLACES = (os.path.join(_PACKAGE, "_entry"), os.path.dirname(_PACKAGE))


def path(name: str) -> str | None:
    """The file of that name, "train.py" or "configs/tiny.py"; None where there is none."""
    there = (os.path.join(place, *name.split("/")) for place in _PLACES)
    return next((file for file in there if os.path.isfile(file)), None)


def train_py() -> str:
    """The path of train.py.

    Raises:
      UserError: the package was copied without it.
    """
    if found := path("train.py"):
        return found
    raise UserError("train.py is not in this installation. Install deepseek_jax with pip.")


def with_config_file(argv: Iterable[str]) -> list[str]:
    """A command line with --config as a file, where it names one that comes with this package.

    That is `tiny` or `configs/tiny.py`, with or without `:ARG`. A file of that name here wins.
    """
    out: list[str] = []
    for argument in argv:
        if out and re.fullmatch("--?config", out[-1]):
            argument = _config_file(argument)
        elif argument.startswith(("--config=", "-config=")):
            flag, _, given = argument.partition("=")
            argument = f"{flag}={_config_file(given)}"
        out.append(argument)
    return out


def _config_file(given: str) -> str:
    name, colon, arg = given.partition(":")
    if os.path.exists(name):
        return given
    plain = name.removeprefix("configs/").removesuffix(".py")
    found = path(f"configs/{plain}.py") if re.fullmatch(r"[\w/]+", plain) else None
    return f"{found}{colon}{arg}" if found else given
