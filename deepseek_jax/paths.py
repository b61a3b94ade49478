"""Users' files: paths of options made absolute, and outputs that would overwrite what is theirs refused
before any work."""

import os
import secrets
from collections.abc import Callable, Iterable

from deepseek_jax.config import UserError


def absolute(path: str) -> str:
    """A path that means the same from any folder: ~ is the home folder, relative paths start in the current
    one; gs://... stays."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def temporary(path: str) -> str:
    """A name beside `path` that no file has: what is written there is renamed when it is whole."""
    return f"{path}.tmp{os.getpid()}-{secrets.token_hex(4)}"


def scratch(folder: str) -> str:
    """Where a folder is made before it gets its name: the same in every process and after a kill, and nobody
    else's."""
    here, name = os.path.split(os.path.abspath(folder))
    return os.path.join(here, f".{name}.deepseek_jax.tmp")


def check_output(option: str, path: str, inputs: Iterable[str] = (),
                 beside: dict[str, Callable[[str], bool]] | None = None) -> None:
    """Checks, before hours of work, that an output has a place and overwrites nothing but an older one of its
    kind.

    A file that the user named is replaced, unless the command reads it. A file that the user did not name is
    replaced only if
    it is ours.

    Args:
      option, path: what the user gave, for messages; ~ is expanded.
      inputs: files that the command reads; looked at only where the output is there already.
      beside: files that are written beside it, unnamed, and whether such a file is one that this program
        wrote for `path`.

    Raises:
      UserError: the folder is not there, the path is a folder or an input, or a file beside it is somebody's.
    """
    given, path = path, os.path.expanduser(path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"{option}={given!r} is in a folder that does not exist. Create it with mkdir -p "
                        f"{folder}, or choose another name.")
    if os.path.isdir(path):
        raise UserError(f"{option}={given!r} is a folder. Give the name of a file in it.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option}={given!r} cannot be written: {folder} is read-only for you. Choose "
                        f"another name.")
    there = [target for target in (path, *(beside or {})) if os.path.exists(target)]
    for clash in inputs if there else ():
        if os.path.exists(clash) and any(os.path.samefile(target, clash) for target in there):
            raise UserError(f"{option}={given!r} would overwrite {clash}, which this command reads. Choose "
                            f"another name.")
    for target, is_ours in (beside or {}).items():
        if os.path.lexists(target) and not is_ours(target):
            raise UserError(f"{option}={given!r} needs {target} beside it, and there is a file of that name "
                            f"which it does not belong to. "
                            f"Choose another name, or move that file.")

