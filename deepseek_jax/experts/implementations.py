"""Which implementation computes the experts: `config.moe.experts_implementation`, and what works here.

Kernels for GPUs are experimental parts of JAX, and a GPU may be of a kind that nobody has tried. So before
`auto` takes any, a tiny product of each kind is compiled, run and compared with NumPy; where that fails, the
next kernels are tried, and then the rounds run, after one printed line. Where a program is compiled for GPUs
that are not here, nothing can be tried: the kernels that their kind should have are taken.

The same is decided of FP8 (`config.train.fp8`, fp8.py): products that take it where the devices multiply it,
else the same numbers in the compute dtype.
"""

import functools
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.experts import grouped_matmul
from deepseek_jax.experts.block_rows import BLOCK, BlockRows, Blocks
from deepseek_jax.experts.fp8 import FORWARD, GRADIENT, Fp8
from deepseek_jax.experts.grouped_matmul import GroupedMatmul
from deepseek_jax.parallel.mesh import on_cpu
from deepseek_jax.runtime import kernel_trial

OPTION = "config.moe.experts_implementation"
HOPPER = 9  # major compute capability
HOPPER_NAME = re.compile(r"\bG?H\d{2,3}\b")  # NVIDIA H100 80GB HBM3, H200, H20, GH200 480GB
AMPERE = 8
MIXED_FP8 = (0, 11)  # the first jax whose kernels multiply e4m3 by e5m2
FIRST_WITH_FP8 = (8, 9)  # compute capability of Ada; Hopper follows
TOLERANCE = 0.02  # of the largest number: bfloat16 has 2^-8, and TF32 2^-11


class Chosen(NamedTuple):
    """What computes the experts."""

    kernels: GroupedMatmul | None  # None: batched products, or those of CPUs
    fp8: Fp8 | None  # None: products in the compute dtype


def choose(asked: str, dtype: Any, fp8: str = "none") -> Chosen:
    """What computes experts on the devices of the current mesh.

    Args:
      asked: as of `kernels`.
      dtype: the compute dtype.
      fp8: `config.train.fp8`.

    Raises:
      UserError: the kernels that were asked for do not run here.
    """
    if fp8 == "none":
        return Chosen(kernels(asked, dtype), None)
    native = has_fp8()
    return Chosen(kernels(asked, FORWARD if native else dtype), Fp8(native))


def fp8_notes(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    """What a run says of FP8 before it starts: which numbers are, and whether that can save time."""
    t = config.train
    if t.fp8 == "none":
        return []
    said = f"products of routed experts ({t.fp8}: e4m3, gradients e5m2)"
    if config.moe.fp8_dispatch and mesh.shape["expert"] > 1:
        said += ", and tokens on their way to them"
    if has_fp8():
        return [said]
    return [
        said,
        f"{mesh.devices.flat[0].device_kind} devices do not multiply FP8: the same numbers are multiplied in "
        f"{t.dtype}, slower than with config.train.fp8=none",
    ]


def has_fp8() -> bool:
    """Whether the devices of the current mesh multiply numbers in FP8."""
    return not on_cpu() and _capability() >= FIRST_WITH_FP8


def kernels(asked: str, dtype: Any) -> GroupedMatmul | None:
    """The kernels that multiply; None: batched products, or those of CPUs.

    Args:
      asked: auto, rounds, or the name of kernels (grouped_matmul.NAMES). On CPUs these are interpreted, which
        serves tests: `check` refuses them to users.
      dtype: of the products.

    Raises:
      UserError: the kernels that were asked for do not run here.
    """
    if asked == "rounds" or (asked == "auto" and on_cpu()):
        return None
    if on_cpu() or asked == "reference":
        return GroupedMatmul(asked, interpret=on_cpu())
    kind = np.dtype(dtype).name
    if asked != "auto":
        if reason := missing(asked, kind, _capability()[0]):
            raise UserError(
                f"{OPTION}={asked}: {reason}. Set {OPTION}=auto, which takes what works, or rounds."
            )
        return GroupedMatmul(asked)
    return _best(kind, _capability()[0])


@functools.cache
def _best(dtype: str, major: int) -> GroupedMatmul | None:
    """The first kernels that work; if none does, says why in one line, once."""
    reasons = []
    for name in candidates(major):
        reason = missing(name, dtype, major)
        if reason is None:
            return GroupedMatmul(name)
        reasons.append(f"{name}: {reason}")
    if jax.process_index() == 0:
        print(
            f"{OPTION}=auto: {'; '.join(reasons)}. Experts are computed in rounds instead.",
            file=sys.stderr,
        )
    return None


def candidates(major: int) -> Sequence[str]:
    """Names of kernels, the fastest first, for GPUs of a compute capability."""
    return ("mosaic", "triton") if major == HOPPER else ("triton",)


@functools.cache
def missing(name: str, dtype: str, major: int) -> str | None:
    """Why kernels cannot compute experts here, or None.

    Args:
      name: mosaic or triton.
      dtype: of the products.
      major: compute capability of the GPUs, before the dot.
    """
    if name == "mosaic" and major != HOPPER:
        return f"it multiplies by wgmma, which GPUs of compute capability 9 have, and these have {major}"
    size = np.dtype(dtype).itemsize
    if name != "mosaic" and size == 1:
        return "it does not multiply in FP8 (config.train.fp8)"
    if name == "mosaic" and size == 1 and jax.__version_info__ < MIXED_FP8:
        wanted = ".".join(map(str, MIXED_FP8))
        return f"e4m3 by e5m2 needs jax {wanted}, and this is {jax.__version__}"
    if name == "mosaic" and size > 2:
        return f"it multiplies numbers of 16 bits, and config.train.dtype={dtype}"
    if major < AMPERE:
        return f"it needs a GPU of compute capability {AMPERE} or newer, and these have {major}"
    module = grouped_matmul.MODULES[name]
    return kernel_trial.trouble(module, lambda: try_kernels(GroupedMatmul(name), dtype))


def try_kernels(method: GroupedMatmul, dtype: str) -> str | None:
    """Runs each kernel once, on this process's first device; None, or which gives wrong numbers.

    Four blocks: two experts with one and two, between them one without rows, and a block of nobody.
    """
    expert_N, first_G1 = [0, 2, 2, 3], [0, 1, 1, 3]
    inner, outer, experts = 128, 256, 3
    rng = np.random.default_rng(0)
    in_fp8 = np.dtype(dtype) == np.dtype(FORWARD)
    out = {"dtype": jnp.bfloat16} if in_fp8 else {}
    given = [
        jnp.asarray(rng.standard_normal(size), kind)
        for size, kind in (
            ((4 * BLOCK, inner), dtype),
            ((4 * BLOCK, outer), GRADIENT if in_fp8 else dtype),
            ((experts, inner, outer), dtype),
        )
    ]
    rows_JI, rows_JO, weight_GIO = (np.asarray(a.astype(jnp.float32)) for a in given)
    nowhere = jnp.zeros(0, jnp.int32)
    blocks = Blocks(jnp.asarray(expert_N, jnp.int32), jnp.asarray(first_G1, jnp.int32))
    products = method.products(BlockRows(nowhere, nowhere, blocks))

    @jax.jit
    def run(rows_JI, rows_JO, weight_GIO):
        forward = products.multiply(rows_JI, weight_GIO, **out)
        transposed = products.multiply(rows_JO, weight_GIO, transpose=True, **out)
        return forward, transposed, products.outer(rows_JI, rows_JO)

    found = [np.asarray(a.astype(jnp.float32)) for a in run(*given)]
    of_J = np.repeat(expert_N[:3], BLOCK)
    used = len(of_J)
    wanted = (
        np.einsum("ji,jio->jo", rows_JI[:used], weight_GIO[of_J]),
        np.einsum("jo,jio->ji", rows_JO[:used], weight_GIO[of_J]),
        np.stack([rows_JI[:used][of_J == g].T @ rows_JO[:used][of_J == g] for g in range(experts)]),
    )
    names = ("product", "transposed product", "weight gradient")
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        ours = ours[:used] if ours.ndim == 2 else ours
        error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
        if not error < TOLERANCE:
            return f"its {name} is wrong by {error:.2g} of the largest number"
    return None


def _capability() -> tuple[int, int]:
    """Compute capability of the GPUs of the current mesh, which need not be here."""
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.local_devices()[0], "compute_capability", "0.0"))
        major, minor = capability.split(".")[:2]
        return int(major), int(minor)
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (HOPPER if device and HOPPER_NAME.search(device.device_kind) else AMPERE), 0
