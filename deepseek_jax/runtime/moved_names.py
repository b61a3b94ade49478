"""Names that users' config files import from where they once were."""

import importlib
import sys
import types
from typing import Any


def install() -> None:
    """`from deepseek_jax.configdict import base_config` works; its place is deepseek_jax.config
    now, which is imported then."""
    module = types.ModuleType("deepseek_jax.configdict", "Moved to deepseek_jax.config.")

    def moved(name: str) -> Any:
        return getattr(importlib.import_module("deepseek_jax.config"), name)

    vars(module)["__getattr__"] = moved  # PEP 562: called for names that the module does not have
    sys.modules[module.__name__] = module
