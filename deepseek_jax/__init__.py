"""A trainer for DeepSeek-family mixture-of-experts language models in JAX and Flax."""

import os
import re

__version__ = "0.1.0"


def enough_threads(devices: int) -> None:
    """Sizes the thread pool of XLA's CPU client for so many devices of this process. Call it before JAX makes the client.

    A collective blocks a thread until its partners come, and independent ones run at once. With XLA's one thread a device, programs
    with several mesh axes run out of threads, and wait for ever for partners that have none. XLA reads the number from NPROC.
    """
    os.environ.setdefault("NPROC", str(16 * devices))


_asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
_asked += re.findall(r"^\d+$", os.environ.get("JAX_NUM_CPU_DEVICES", ""))
if (_devices := max(map(int, _asked), default=1)) > 1:
    enough_threads(_devices)
