"""Every option once (options.py), as a ConfigDict that config files and flags change (configdict.py), and
what is wrong with their values (validation.py)."""

from typing import Any

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError

__all__ = ["Config", "UserError", "base_config", "from_config_dict"]


def __getattr__(name: str) -> Any:
    """What needs ml_collections is imported when it is asked for: benchmarks read options without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deepseek_jax.config import configdict

    return getattr(configdict, name)
