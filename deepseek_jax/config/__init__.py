"""Every option once (options.py), as a ConfigDict that config files and flags change (configdict.py), and
what is wrong with their values (validation.py)."""

from deepseek_jax.config.configdict import base_config, from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError

__all__ = ["Config", "UserError", "base_config", "from_config_dict"]
