"""Mistakes of the user's, and errors said in one line."""


class UserError(Exception):
    """A mistake of the user's that one line can explain: the option, both values and the repair.

    The commands print it without a traceback and exit with code 2.
    """


def one_line(error: BaseException) -> str:
    """An error of the file system or the network, which its own words explain; of others their kind and how they begin."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
