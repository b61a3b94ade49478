"""NVIDIA GPUs of this host, asked of the driver without JAX, and who may use which."""

import ctypes
import os
import uuid
from collections.abc import MutableMapping
from typing import NamedTuple

from deepseek_jax.errors import UserError

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def memory_fraction(several: bool) -> float:
    """The share of a GPU's memory that a run lets JAX take; JAX's own is 0.75. NCCL needs some beside it."""
    return 0.9 if several else 0.95


def take_memory(several: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets JAX take most of the GPUs' memory, unless there are none or the user has said how much.
    Call it before JAX asks for its devices.

    Args:
      several: other processes train with this one; several GPUs of this one count too.
      environment: where the share is set.
    """
    gpus = visible_gpus()
    if gpus and not {FRACTION, "XLA_CLIENT_MEM_FRACTION"} & environment.keys():
        environment[FRACTION] = str(memory_fraction(several or len(gpus) > 1))


class Claim(NamedTuple):
    """The GPUs that one process sees, in the order in which it counts them."""

    host: str
    # UUIDs, which are the same in every container and whatever CUDA_VISIBLE_DEVICES calls the GPUs
    gpus: list[str]
    # A scheduler started it beside others: it may take its part of what all of them see.
    may_share: bool = False


def visible_gpus() -> list[str]:
    """The UUIDs of the GPUs that JAX would use here; none without a driver, or when JAX_PLATFORMS
    leaves GPUs out."""
    platforms = os.environ.get("JAX_PLATFORMS", "").replace(" ", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, name = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    out = []
    for i in range(count.value):
        if cuda.cuDeviceGet(ctypes.byref(device), i) or cuda.cuDeviceGetUuid_v2(
            ctypes.byref(name), device
        ):
            return []
        out.append(f"GPU-{uuid.UUID(bytes=bytes(name))}")
    return out


def divide(claims: list[Claim]) -> list[list[int] | None]:
    """Which of its GPUs each process may use, by position; None: all that it sees.

    Args:
      claims: of all processes, by process number.

    Raises:
      UserError: two processes would use the same GPU.
    """
    out: list[list[int] | None] = [None] * len(claims)
    owner: dict[str, int] = {}
    for process, claim in enumerate(claims):
        for gpu in claim.gpus:
            owner.setdefault(gpu, process)
    for first in sorted(set(owner.values())):
        beside = [p for p, c in enumerate(claims) if set(c.gpus) & set(claims[first].gpus)]
        if len(beside) == 1:
            continue
        mine, together = claims[first], [claims[p] for p in beside]
        each, rest = divmod(len(mine.gpus), len(beside))
        if rest or any(c.gpus != mine.gpus or not c.may_share for c in together):
            a, b = beside[:2]
            ids = ", ".join(str(i) for i, gpu in enumerate(mine.gpus) if gpu in claims[b].gpus)
            raise UserError(
                f"Processes {a} and {b} on {mine.host} would use the same GPUs ({ids} of the "
                f"{len(mine.gpus)} that process {a} sees). Start one process per host, or use python "
                "-m deepseek_jax.launch, which gives each process its own GPUs."
            )
        for place, p in enumerate(beside):
            out[p] = list(range(place * each, (place + 1) * each))
    return out


def shares(visible: list[str], processes: int, each: int | None = None) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each process of a host, from what is visible there.

    Args:
      each: GPUs per process; None divides all of them.

    Raises:
      UserError: they do not divide evenly, or there are fewer than asked for.
    """
    if each is None:
        each, rest = divmod(len(visible), processes)
        if rest or not each:
            raise UserError(
                f"--nproc_per_node={processes} does not divide the {len(visible)} visible GPUs "
                f"({','.join(visible)}). Set it to a divisor, name other GPUs in "
                "CUDA_VISIBLE_DEVICES, or set JAX_PLATFORMS=cpu to leave GPUs out."
            )
    if processes * each > len(visible):
        raise UserError(
            f"--nproc_per_node={processes} x --devices_per_process={each} is more than the "
            f"{len(visible)} visible GPUs ({','.join(visible)}). Lower one of them."
        )
    return [",".join(visible[i * each : (i + 1) * each]) for i in range(processes)]
