"""How every command ends: its exit code, and one line for a mistake."""

import sys
from collections.abc import Callable

from deepseek_jax.cli import terminal
from deepseek_jax.errors import UserError
from deepseek_jax.runtime import environment


def exit_code(name: str, main: Callable[[], int], output: str = "report") -> int:
    """What a command exits with: what `main` returns; or after one line, which begins with the command's
    name, 2 for a UserError and 1 where stdout cannot be written.

    Args:
      output: what stdout is to the command, as `terminal.set_up` has it.
    """
    terminal.set_up(output)
    try:
        with environment.mistakes():
            code = main()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        if not terminal.raised(error):
            raise
        code = 0  # the reader, `head` for instance, has seen enough; or it is said below
    if failed := terminal.finish():
        print(f"{name}: stdout cannot be written ({failed.strerror}).", file=sys.stderr)
        return 1
    return code
