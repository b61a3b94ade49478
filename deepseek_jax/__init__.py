"""A trainer for DeepSeek-family mixture-of-experts language models in JAX and Flax."""

import importlib
import os
import sys
import types

from deepseek_jax.runtime import environment

__version__ = "0.1.0"


def enough_threads(devices: int) -> None:
    """Sizes the thread pool of XLA's CPU client for so many devices of this process. Call it before JAX makes the client.

    A collective blocks a thread until its partners come, and independent ones run at once. With XLA's one thread a device, programs
    with several mesh axes run out of threads, and wait for ever for partners that have none. XLA reads the number from NPROC.
    """
    os.environ.setdefault("NPROC", str(16 * devices))


if (_devices := environment.take_devices()) > 1:
    enough_threads(_devices)

# Users' config files import `base_config` from here; its place is deepseek_jax.config now.
_configdict = types.ModuleType("deepseek_jax.configdict", "Moved to deepseek_jax.config.")
_configdict.__getattr__ = lambda name: getattr(importlib.import_module("deepseek_jax.config"), name)
sys.modules[_configdict.__name__] = _configdict
