"""`~` and `~user` in paths that a user names. Shells expand them at the beginning of a word only, so not in
--workdir=~/runs."""

import os

from deepseek_jax.config import PATH_LISTS, PATH_OPTIONS, Config, UserError, replaced


def expanded(path: str, option: str) -> str:
    """A path with the user's folder in place of a leading `~`.

    Raises:
      UserError: there is no such user: what is written would be in a folder named `~user`.
    """
    out = os.path.expanduser(path)
    if out.startswith("~"):
        first = path.split("/")[0]
        user = first[1:] or "(HOME is not set)"
        raise UserError(f"{option}={path}: there is no user {user}. "
                        f"Write ./{path} if a folder here is named {first}.")
    return out


def each_expanded(paths: str, option: str) -> str:
    """The same of a list of paths, separated by commas."""
    return ",".join(expanded(p.strip(), option) if p.strip().startswith("~") else p for p in paths.split(","))


def expand_config(config: Config) -> Config:
    """The options with every path expanded: those of PATH_OPTIONS and PATH_LISTS.

    Raises:
      UserError: as `expanded`.
    """
    for name in (*PATH_OPTIONS, *PATH_LISTS):
        section, _, key = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, key)
        new = (each_expanded if name in PATH_LISTS else expanded)(value, f"config.{name}")
        if new != value:
            config = replaced(config, name, new)
    return config
