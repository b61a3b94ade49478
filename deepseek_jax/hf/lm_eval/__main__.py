"""The command of lm-evaluation-harness with one model more: `--model deepseek_jax`."""

import sys

from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError


def main() -> int:
    try:
        import deepseek_jax.inference.lm_eval  # noqa: F401  registers the model
    except ImportError as e:
        raise UserError(str(e)) from e
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("lm_eval", main))
