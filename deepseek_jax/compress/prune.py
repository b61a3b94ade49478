"""To be written."""

import argparse

from deepseek_jax.cli import arguments


def add_options(parser: arguments.Parser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    raise NotImplementedError
