"""The command lines of all commands but train.py."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from deepseek_jax.config import paths
from deepseek_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with one line for every mistake and help as it is written.

    Abbreviated options are refused: they would hide mistakes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")


def add_model(parser: argparse.ArgumentParser, what: str, *aliases: str) -> None:
    """The model of a command: its first argument, or --model.

    Args:
      parser: of the command.
      what: it can be, for --help.
      aliases: of --model.
    """
    parser.add_argument("folder", nargs="?", type=path, metavar="MODEL", help=what)
    parser.add_argument("--model", *aliases, type=path, metavar="MODEL", help="the same")


def take_model(args: argparse.Namespace) -> None:
    """Sets `args.model` of a command with `add_model`.

    Raises:
      UserError: the model is missing, or given twice.
    """
    if (args.folder is None) == (args.model is None):
        given = f"{args.folder} and --model={args.model}" if args.folder else "neither is there"
        raise UserError(
            f"the model is the first argument or --model, and one of them: {given}. See --help."
        )
    args.model = args.model or args.folder


def path(text: str) -> str:
    """The type of an argument that names a file or folder."""
    return _expanded(paths.expanded, text)


def path_list(text: str) -> str:
    """The type of an argument that names files or folders, separated by commas."""
    return _expanded(paths.each_expanded, text)


def _expanded(expand: Callable[[str, str], str], text: str) -> str:
    try:
        return expand(text, "path")
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e).rstrip(".")) from None


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number, `least` or more."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return number

    return read


def number(above: float) -> Callable[[str], float]:
    """The type of an option that takes a number above another one."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = above
        if not above < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above {above:g}")
        return value

    return read


def numbers(text: str) -> list[int]:
    """The type of an option that takes whole numbers: "512,1024"."""
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers. Write it as 512,1024"
        ) from None


def some_of(*names: str) -> Callable[[str], list[str]]:
    """The type of an option that takes some of these names, separated by commas."""

    def read(text: str) -> list[str]:
        if unknown := [n for n in text.split(",") if n not in names]:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} is not known. Choose of {', '.join(names)}"
            )
        return text.split(",")

    return read
