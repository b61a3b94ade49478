"""Environment variables that JAX reads: what is wrong in them is said in one line. Imports nothing heavy."""

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping

from deepseek_jax.errors import UserError
from deepseek_jax.runtime import jax_private
from deepseek_jax.runtime.threads import enough_threads

DEVICES = "JAX_NUM_CPU_DEVICES"
MOST_DEVICES = 1 << 16
malformed: list[str] = []  # a line for each variable that `take_devices` took away


def prepare() -> None:
    """What must be done before JAX is imported."""
    if (devices := take_devices()) > 1:
        enough_threads(devices)


def take_devices(environment: MutableMapping[str, str] = os.environ) -> int:
    """The number of CPU devices that the environment asks for, 1 if it does not. Called once,
    before JAX is imported.

    JAX ends with a traceback while it is imported if it cannot read JAX_NUM_CPU_DEVICES: a
    malformed one is taken away, and `check` says so. An empty one counts as not set.
    """
    asked = re.findall(
        r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", "")
    )
    text = environment.get(DEVICES)
    if text is not None:
        number = text.strip()
        if number.isascii() and number.isdecimal() and 1 <= int(number) <= MOST_DEVICES:
            asked.append(number)
        else:
            del environment[DEVICES]
            if number:
                malformed.append(
                    f"{DEVICES}={text} is not a number of devices. "
                    f"Set it to 1 or more, or unset it."
                )
    return max(map(int, asked), default=1)


def check() -> None:
    """Raises UserError if a variable was malformed and taken away. Every command begins with it,
    and every mesh."""
    if malformed:
        raise UserError(malformed[0])


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Raises UserError, in one line, where JAX finds no device of the platform that JAX_PLATFORMS names."""
    check()
    try:
        yield
    except (RuntimeError, AssertionError) as e:
        if not jax_private.raised_while_devices_started(e):
            raise
        reason = next(iter(str(e).splitlines()), "")
        reason = reason.partition(" (set JAX_PLATFORMS")[0].partition(" (you may need")[0]
        asked = os.environ.get("JAX_PLATFORMS", "")
        if not asked:
            raise UserError(
                f"JAX cannot use the devices of this machine ({reason}). "
                f"Repair that, or set JAX_PLATFORMS=cpu."
            ) from e
        reason = reason or "this JAX has no plugin for it, or no such device is here"
        raise UserError(
            f"JAX_PLATFORMS={asked}: {reason.rstrip('.')}. "
            f"Install what it needs, set JAX_PLATFORMS=cpu, or unset it."
        ) from e
