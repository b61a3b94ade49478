"""Users' paths: `~` expanded, options made absolute, and outputs that would overwrite a user's files refused
before any work.
"""

import os
import secrets
from collections.abc import Callable, Iterable

from deepseek_jax.config.option import Option
from deepseek_jax.config.options import OPTIONS, Config, replaced, value_of
from deepseek_jax.errors import UserError

MODELS = ("init_from", "distill.teacher")


def expanded(path: str, option: str) -> str:
    """A path with the user's folder in place of a leading `~`. Shells expand it at the beginning of a word
    only, so not in --workdir=~/runs.

    Args:
      path: as the user gave it.
      option: what it was given as, for the message: "--workdir".

    Raises:
      UserError: there is no such user: what is written would be in a folder named `~user`.
    """
    out = os.path.expanduser(path)
    if out.startswith("~"):
        first = path.split("/")[0]
        user = first[1:] or "(HOME is not set)"
        raise UserError(
            f"{option}={path}: there is no user {user}. "
            f"Write ./{path} if a folder here is named {first}."
        )
    return out


def each_expanded(paths: str, option: str) -> str:
    """The same of a list of paths, separated by commas."""
    return ",".join(
        expanded(p.strip(), option) if p.strip().startswith("~") else p for p in paths.split(",")
    )


def absolute_config(config: Config) -> Config:
    """The options with every path absolute, as WORKDIR/config.json keeps them for later commands. Words that
    stand for no path and gs://... stay, and so does a model's folder that is not found: messages quote it.

    Raises:
      UserError: as `expanded`.
    """
    for name, option in OPTIONS.items():
        if not option.path:
            continue
        value = value_of(config, name)
        given = [path.strip() for path in value.split(",")] if option.several else [value]
        new = ",".join(_absolute(path, option) for path in given)
        if new != value and (name not in MODELS or os.path.exists(new)):
            config = replaced(config, name, new)
    return config


def _absolute(path: str, option: Option) -> str:
    if not path or path in option.choices or option.is_text(path) or "://" in path:
        return path
    out = os.path.abspath(expanded(path, option.full_name))
    return path if option.or_text and not os.path.exists(out) else out  # the name of a template


def temporary(path: str) -> str:
    """A name beside `path` that no file has: what is written there is renamed when it is whole."""
    return f"{path}.tmp{os.getpid()}-{secrets.token_hex(4)}"


def scratch(folder: str) -> str:
    """Where a folder is made before it gets its name: the same in every process and after a kill, and nobody
    else's."""
    here, name = os.path.split(os.path.abspath(folder))
    return os.path.join(here, f".{name}.deepseek_jax.tmp")


def check_output(
    option: str,
    path: str,
    inputs: Iterable[str] = (),
    beside: dict[str, Callable[[str], bool]] | None = None,
) -> None:
    """Checks, before hours of work, that an output has a place and overwrites nothing but an older one of its
    kind.

    A file that the user named is replaced, unless the command reads it. A file that the user did not name is
    replaced only if it is ours.

    Args:
      option: as what the path was given, for messages: "--out".
      path: as the user gave it; ~ is expanded.
      inputs: files that the command reads; looked at only where the output is there already.
      beside: files that are written beside it, unnamed, and whether such a file is one that this program
        wrote for `path`.

    Raises:
      UserError: the folder is not there, the path is a folder or an input, or a file beside it is somebody's.
    """
    given, path = path, os.path.expanduser(path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(
            f"{option}={given!r} is in a folder that does not exist. Create it with mkdir -p "
            f"{folder}, or choose another name."
        )
    if os.path.isdir(path):
        raise UserError(f"{option}={given!r} is a folder. Give the name of a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        return  # a pipe, /dev/stdout: written to, and nothing is lost
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{option}={given!r} cannot be written: {folder} is read-only for you. "
            f"Choose another name."
        )
    there = [target for target in (path, *(beside or {})) if os.path.exists(target)]
    for clash in inputs if there else ():
        if os.path.exists(clash) and any(os.path.samefile(target, clash) for target in there):
            raise UserError(
                f"{option}={given!r} would overwrite {clash}, which this command reads. Choose "
                f"another name."
            )
    for target, is_ours in (beside or {}).items():
        if os.path.lexists(target) and not is_ours(target):
            raise UserError(
                f"{option}={given!r} needs {target} beside it, and there is a file of that name "
                f"which it does not belong to. Choose another name, or move that file."
            )
