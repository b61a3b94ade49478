"""Flags of the commands that look at a config without training it: their own, then those of train.py."""

import argparse
from collections.abc import Callable

from deepseek_jax.cli import arguments
from deepseek_jax.config.options import Config


class Parser(arguments.Parser):
    """A parser whose --help looks like train.py's.

    Args:
      about: the module's docstring.
      json: whether it has --json.
      further: makes the help that follows the flags.
    """

    def __init__(
        self, about: str | None = None, json: bool = True, further: Callable[[], str] | None = None
    ) -> None:
        super().__init__(description=about)
        self._further = further
        if json:
            self.add_argument(
                "--json", action="store_true", help="Print one JSON object instead of text."
            )

    def format_help(self) -> str:
        flags = [
            f"  {a.option_strings[0]}{_default(a)}\n        {a.help}\n"
            for a in self._actions
            if a.help != argparse.SUPPRESS
        ]
        further = f"{self._further()}\n" if self._further else ""
        return f"{self.description or ''}\nFlags:\n{''.join(flags)}{further}"


def _default(action: argparse.Action) -> str:
    return "" if action.default in (None, False, argparse.SUPPRESS) else f"={action.default}"


def read(
    parser: Parser, argv: list[str], default_config: str | None = None
) -> tuple[argparse.Namespace, Config]:
    """The command's own flags, and the options of the config that the rest names.

    Args:
      argv: without the program's name.
      default_config: a config file to use if none is named.

    Raises:
      UserError: the first mistake.
    """
    # Imports ml_collections, which a benchmark that reads no config does without.
    from deepseek_jax.run import commandline

    own, rest = parser.parse_known_args(argv)
    if default_config and not any(
        a.startswith(("--config=", "-config=")) or a in ("--config", "-config") for a in rest
    ):
        rest = [f"--config={default_config}", *rest]
    return own, commandline.read_config(commandline.parse([parser.prog, *rest]))
