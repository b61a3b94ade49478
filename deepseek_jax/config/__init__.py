"""The options of a run. What enters: a config file's ConfigDict, or the nested dicts of a config.json. What
leaves: a `Config`, checked.

Read options.py first: `Config`, its sections (sections/), and `of(name)`, what is known about an option
(option.py). Then configdict.py, the ConfigDict that config files and flags change, and validation.py with
rules/, what is refused. help.py and words.py write documents from the table; suggestions.py says what an
unknown option was meant to be; paths.py makes paths absolute.
"""

from typing import Any

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError

__all__ = ["Config", "UserError", "base_config", "from_config_dict", "yarn"]


def __getattr__(name: str) -> Any:
    """What needs ml_collections is imported when it is asked for: benchmarks read options without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deepseek_jax.config import configdict

    return getattr(configdict, name)
