"""How every command ends: its exit code, and one line for a mistake."""

import sys
from collections.abc import Callable

from deepseek_jax.cli import terminal
from deepseek_jax.errors import ExitCode, Failure, one_line
from deepseek_jax.runtime import environment


def exit_code(name: str, main: Callable[[], int], output: terminal.Output = "report") -> int:
    """Runs a command and returns what it exits with (errors.ExitCode).

    That is what `main` returns; the code of the `Failure` that it raised, after one line on stderr;
    or ERROR where stdout cannot be written. Other exceptions pass.

    Args:
      name: of the command, the beginning of every line on stderr.
      output: what stdout is to the command, as `terminal.set_up` has it. Of a "log" any OSError is
      one line.
    """
    terminal.set_up(output)
    try:
        with environment.mistakes():
            code = main()
    except Failure as error:
        if not error.everywhere or _process_index() == 0:
            print(f"{name}: {error}", file=sys.stderr)
        code = error.code
    except OSError as error:
        if output == "log":
            print(f"{name}: {one_line(error)}", file=sys.stderr)
            code = ExitCode.ERROR
        elif terminal.raised(error):
            code = ExitCode.DONE  # the reader, `head` for instance, has seen enough; or see below
        else:
            raise
    if failed := terminal.finish():
        print(f"{name}: stdout cannot be written ({failed.strerror}).", file=sys.stderr)
        return ExitCode.ERROR
    return code


def _process_index() -> int:
    """0 where JAX was never imported, as this module does not."""
    jax = sys.modules.get("jax")
    return jax.process_index() if jax else 0
