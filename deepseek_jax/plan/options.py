"""Flags of the commands that look at a config without training it: their own, then those of train.py."""

import argparse
import sys
from typing import NoReturn

from deepseek_jax import commandline
from deepseek_jax.config import Config, UserError


class Parser(argparse.ArgumentParser):
    """argparse with one line for every mistake, and without abbreviations, which would hide mistakes."""

    def __init__(self, json: bool = True) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--help", "-h", action="store_true", help="Show this help and exit.")
        if json:
            self.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}. See --help.")

    def describe(self) -> str:
        """The flags, as train.py shows its own."""
        default = lambda a: "" if a.default in (None, False) else f"={a.default}"
        return "\n".join(f"  {a.option_strings[0]}{default(a)}\n        {a.help}" for a in self._actions)


def read(parser: Parser, argv: list[str], default_config: str | None = None) -> tuple[argparse.Namespace, Config]:
    """The command's own flags, and the options of the config that the rest names.

    Args:
      argv: without the program's name. default_config: a config file to use if none is named.

    Raises:
      UserError: the first mistake.
    """
    own, rest = parser.parse_known_args(argv)
    if default_config and not any(a.startswith(("--config=", "-config=")) or a in ("--config", "-config") for a in rest):
        rest = [f"--config={default_config}", *rest]
    # ml_collections looks for overrides of a config in sys.argv, and so these must be all that is there.
    before, sys.argv = sys.argv, [sys.argv[0], *rest]
    try:
        return own, commandline.read_config(commandline.parse(sys.argv), sys.argv)
    finally:
        sys.argv = before
