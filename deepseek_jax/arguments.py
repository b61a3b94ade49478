"""What all commands beside train.py read their command line with."""

import argparse
from typing import Any, NoReturn

from deepseek_jax.config import UserError


class Parser(argparse.ArgumentParser):
    """argparse with one line for every mistake, help as it is written, and without abbreviations, which would hide mistakes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")
