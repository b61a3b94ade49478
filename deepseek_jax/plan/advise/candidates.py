"""The plans that are valid for a config on so many devices: mesh, strategy, dispatch, micro-batches, what is
kept for backward and what is offloaded.

The mathematics stays the config's: its batch, its model, its optimizer. Only what changes nothing but
rounding is tried.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepseek_jax.config.options import Config, value_of
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import AXES, check_model
from deepseek_jax.parallel.sharding import DIVIDED_BY
from deepseek_jax.plan.tune.changes import checked, with_options
from deepseek_jax.train.kept import ORDER

DISPATCH = ("all_to_all", "all_gather", "ring")
# In backward a stage makes the exchange again: remat=exchange is refused there, and each tick keeps its own.
REMAT = ("none", "full", *(f"save:{','.join(ORDER[:n])}" for n in range(1, len(ORDER) + 1)))
OFFLOAD = ((), ("optimizer_state",), ("optimizer_state", "parameters"))
MOST_STAGES = 16


class Choice(NamedTuple):
    """One plan.

    Attributes:
      mesh: devices by axis, in the order of AXES.
      strategy, dispatch, accumulation, remat: values of the options.
      offload: options of config.offload that are True.
    """

    mesh: tuple[int, ...]
    strategy: str
    accumulation: int
    dispatch: str
    remat: str = "full"
    offload: tuple[str, ...] = ()

    @property
    def shape(self) -> dict[str, int]:
        """Devices by axis."""
        return dict(zip(AXES, self.mesh, strict=True))

    def options(self) -> dict[str, object]:
        """By name, as a command line gives them; mesh axes of 1 as well, since a config may have others."""
        out: dict[str, object] = {f"mesh.{axis}": n for axis, n in self.shape.items()}
        return out | {
            "sharding.strategy": self.strategy,
            "train.accumulation": self.accumulation,
            "moe.dispatch": self.dispatch,
            "train.remat": self.remat,
            "offload.optimizer_state": "optimizer_state" in self.offload,
            "offload.parameters": "parameters" in self.offload,
        }


def kept_names(remat: str) -> tuple[str, ...]:
    """What a value of train.remat keeps for backward, of the names that have a size (train/kept.py)."""
    if remat in ("none", "dots"):  # dots: all products
        return ORDER
    names = remat.removeprefix("save:").split(",")
    return tuple(name for name in ORDER if name in names)


def configured(config: Config, choice: Choice) -> Config:
    """The config with a plan."""
    return with_options(config, choice.options())


class Refused(Exception):
    """No plan is valid; the text says why, for a person."""


def on_meshes(config: Config, devices: int, gpus_per_host: int) -> Iterator[tuple[Choice, Config]]:
    """Every valid (mesh, strategy, micro-batches, dispatch), with remat=full and nothing offloaded.

    Raises:
      Refused: there is none.
    """
    refusals: dict[str, str] = {}
    accumulations = _accumulations(config)
    found = False
    for mesh in meshes(config, devices, gpus_per_host):
        for strategy in strategies(config, mesh):
            for accumulation in accumulations:
                for dispatch in _dispatches(config, mesh):
                    choice = Choice(mesh, strategy, accumulation, dispatch)
                    tried = configured(config, choice)
                    try:
                        check_model(tried, choice.shape)
                    except UserError as e:
                        refusals.setdefault(str(e).split("=")[0], str(e))
                        break
                    found = True
                    yield choice, tried
    if not found:
        reasons = " ".join(dict.fromkeys(refusals.values())) or "no mesh has so many devices."
        raise Refused(reasons)


def meshes(config: Config, devices: int, gpus_per_host: int) -> Iterator[tuple[int, ...]]:
    """Devices along each axis. `tensor` stays inside a host: it sums in every layer, and waits for it."""
    experts = config.model.n_routed_experts if config.model.has_experts else 1
    for tensor, expert in itertools.product(
        divisors(min(devices, gpus_per_host)), divisors(experts)
    ):
        if devices % (tensor * expert):
            continue
        rest = devices // tensor // expert
        for stage in divisors(rest):
            if stage > min(MOST_STAGES, config.pipelined_blocks):
                break
            for data in divisors(rest // stage):
                by_axis = {"data": data, "stage": stage, "expert": expert, "tensor": tensor}
                by_axis["fsdp"] = rest // stage // data
                yield tuple(by_axis.get(axis, 1) for axis in AXES)


def strategies(config: Config, mesh: tuple[int, ...]) -> list[str]:
    """Those that differ on a mesh: but for hybrid_shard, `data` is as `fsdp` is."""
    shape = dict(zip(AXES, mesh, strict=True))
    whole = shape["fsdp"] * shape["expert"] * shape["stage"] == 1
    if config.sharding.gradient_compression != "none":  # between replicas along data
        return ["hybrid_shard", "zero1", "no_shard"] if shape["data"] > 1 else []
    if shape["data"] > 1:
        return [] if whole else ["hybrid_shard"]
    if whole:
        return ["no_shard"]
    return [name for name in DIVIDED_BY if name != "hybrid_shard"]


def levers(config: Config, choice: Choice) -> Iterator[Choice]:
    """The same with everything that may be kept and offloaded."""
    staged = choice.shape["stage"] > 1
    whole = choice.strategy in ("shard_grad_op", "zero1")
    for remat, offload in itertools.product(("full",) if staged else REMAT, OFFLOAD):
        if "parameters" in offload and (remat == "none" or staged or whole):
            continue
        yield choice._replace(remat=remat, offload=offload)


def divisors(n: int) -> list[int]:
    """In order."""
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def _accumulations(config: Config) -> list[int]:
    """Numbers of micro-batches that the config's rules allow, whatever the mesh."""
    found = []
    for accumulation in divisors(config.train.batch_size):
        changes = {"mesh.stage": 1, "train.accumulation": accumulation, "train.remat": "full"}
        with contextlib.suppress(UserError):
            checked(config, changes)
            found.append(accumulation)
    return found


def _dispatches(config: Config, mesh: tuple[int, ...]) -> tuple[str, ...]:
    if mesh[AXES.index("expert")] == 1:
        return (config.moe.dispatch,)
    return DISPATCH


def flags(config: Config, given: Sequence[str], choice: Choice) -> list[str]:
    """The flags of train.py that make a plan of a config.

    Args:
      config: as `given` make it.
      given: the flags of train.py that the advisor was given.
    """
    options = choice.options()
    changed = {n: v for n, v in options.items() if value_of(config, n) != v}
    names = {f"config.{name}" for name in changed}
    kept = [flag for flag in given if flag.partition("=")[0].lstrip("-") not in names]
    return [*kept, *(f"--config.{name}={value}" for name, value in changed.items())]
