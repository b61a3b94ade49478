"""How a command can end: its exit code, and the errors that one line explains."""

import enum


class ExitCode(enum.IntEnum):
    """What a command leaves with. Launchers and schedulers decide by it whether to start again.

    A run that a signal stopped, after a checkpoint, leaves with `stopped_by(signal)`.
    """

    meaning: str

    def __new__(cls, value: int, meaning: str) -> "ExitCode":
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code

    DONE = 0, "done"
    ERROR = 1, "an error"
    MISTAKE = (
        2,
        "a mistake in options, data or workdir, said before anything is compiled",
    )
    BAD_NUMBERS = 3, "too many non-finite updates in a row"
    LOST = 4, "another process was lost"
    NOT_SAVED = 5, "the last checkpoint could not be written; those before it are whole"
    HUNG = 6, "a step did not end (config.watchdog)"


_BY_SIGNAL = 128


def stopped_by(signal: int) -> int:
    """The exit code of a process that a signal stopped, as shells have it: 143 for SIGTERM, 15."""
    return _BY_SIGNAL + signal


def exit_codes() -> str:
    """The exit codes as text, for --help."""
    lines = [f"  {code.value:<7} {code.meaning}" for code in ExitCode]
    lines.append(
        f"  {_BY_SIGNAL} + N stopped by signal N after a checkpoint: 129 SIGHUP, 130 SIGINT, 138 SIGUSR1,\n"
        "          140 SIGUSR2, 143 SIGTERM; a second SIGINT or SIGTERM ends at once"
    )
    return "\n".join(lines)


class Failure(Exception):
    """An error that one line explains. Commands print it without a traceback and exit with `code`.

    Attributes:
      everywhere: every process of a run raises it after the same step, so process 0 alone prints
      it.
    """

    code = ExitCode.ERROR
    everywhere = False


class UserError(Failure):
    """A mistake of the user's: its text names the option, both values and the repair."""

    code = ExitCode.MISTAKE


class BadNumbers(Failure):
    """Too many updates in a row were skipped for a non-finite loss or gradient.

    Attributes:
      step: the last of them.
    """

    code = ExitCode.BAD_NUMBERS
    everywhere = True

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step


class SaveFailed(Failure):
    """The last checkpoint of a run could not be written. Those before it are whole."""

    code = ExitCode.NOT_SAVED
    everywhere = True


def one_line(error: BaseException) -> str:
    """An error as one line: an OSError in the system's words, others by kind and first words."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
