"""Compiling for machines that are not here: their devices, to lay a mesh over, and their compiler.

JAX's CUDA plugin compiles for a GPU from its description alone (h200.txtpb, h100.txtpb): no GPU is
needed, and nothing is executed.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import resource
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from deepseek_jax import objectives
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.model.count import Count, count
from deepseek_jax.objectives.base import Objective
from deepseek_jax.parallel import xla_options
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.xla_options import with_known_options
from deepseek_jax.runtime import jax_private
from deepseek_jax.runtime.threads import enough_threads
from deepseek_jax.train import kept
from deepseek_jax.train.batch import abstract_batch
from deepseek_jax.train.state import Layout, make_layout
from deepseek_jax.train.step import make_train_step


class Hardware(NamedTuple):
    """A kind of device."""

    name: str
    memory: int | None  # bytes that a program may plan with; None: not known
    description: str  # file of this package: what XLA's GPU compiler wants to know


# An H200 reports 150.8e9 bytes, an H100 84.9e9. What is above the 141 and 80 GB of their data sheets is left
# to CUDA, NCCL's buffers and fragmentation.
HARDWARE = {
    "h200": Hardware("NVIDIA H200", 141_000_000_000, "h200.txtpb"),
    "h100": Hardware("NVIDIA H100", 80_000_000_000, "h100.txtpb"),
}

# in a virtual environment of its own: JAX looks for a GPU wherever the plugin is
INSTALL = "pip install -e '.[gpu-aot]'"


class PlannedStep(NamedTuple):
    """A compiled train step."""

    compiled: Any  # jax.stages.Compiled
    lower_seconds: float  # tracing and lowering
    compile_seconds: float
    peak_bytes: int  # most memory this process has used so far


def has_gpu_compiler() -> bool:
    """Whether a CUDA plugin of JAX is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def hosts_of(devices: int, gpus_per_host: int) -> int:
    """Number of hosts; fewer devices than a host has are one host.

    Raises:
      UserError: they do not fill whole hosts.
    """
    for name, value in (("--devices", devices), ("--gpus_per_host", gpus_per_host)):
        if value < 1:
            raise UserError(f"{name}={value} is not a number of devices. Set it to 1 or more.")
    if devices > gpus_per_host and devices % gpus_per_host:
        below = devices // gpus_per_host * gpus_per_host
        raise UserError(
            f"--devices={devices} is not a multiple of --gpus_per_host={gpus_per_host}. "
            f"Set --devices to {below} or {below + gpus_per_host}."
        )
    return max(1, devices // gpus_per_host)


def check_cluster(devices: int | None, gpus_per_host: int) -> None:
    """Raises UserError: --devices is missing, or as `hosts_of`."""
    if devices is None:
        raise UserError(
            "--devices is missing. Say for how many devices to plan, for instance --devices=8."
        )
    hosts_of(devices, gpus_per_host)


def gpu_devices(hardware: Hardware, devices: int, gpus_per_host: int) -> list[Any]:
    """Devices to compile for, host by host. Needs a CUDA plugin (`has_gpu_compiler`).

    Raises:
      UserError: as `hosts_of`.
    """
    hosts = hosts_of(devices, gpus_per_host)
    # XLA's warnings here are of GPUs that are missing, and of kernels that it can only choose where
    # there is one.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    text = pathlib.Path(__file__).with_name(hardware.description).read_text()
    shape = f"1x{hosts}x{devices // hosts}"  # slices, hosts of one, GPUs of one
    return list(
        topologies.get_topology_desc(platform="cuda", target_config=text, topology=shape).devices
    )


def cpu_devices(devices: int) -> list[jax.Device]:
    """CPU devices of this process, as many as asked for: to lay out a mesh, or to compile for.

    Raises:
      UserError: JAX has started with fewer.
    """
    enough_threads(devices)
    # Never fewer than JAX_NUM_CPU_DEVICES says: who runs this in a process of theirs counts on them.
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", max(devices, jax.config.jax_num_cpu_devices))
    found = jax.devices("cpu")
    if len(found) < devices:
        raise UserError(
            f"--devices={devices} is more than the {len(found)} CPU devices of this process. "
            f"Set JAX_NUM_CPU_DEVICES={devices}."
        )
    return found[:devices]


def lay_out(config: Config, devices: list[Any]) -> tuple[jax.sharding.Mesh, Layout]:
    """The mesh over given devices, which may be elsewhere, and the layout of the state on it.

    Raises:
      UserError: the mesh does not fit.
    """
    try:
        mesh = make_mesh(config, devices)
    except UserError as e:
        raise UserError(
            re.sub(r"run with JAX_NUM_CPU_DEVICES=(\d+)", r"set --devices=\1", str(e))
        ) from e
    # A sharding over devices that are not here loses its memory kind; over a mesh without devices
    # it keeps it.
    place = mesh.abstract_mesh if _offloads(config) and _is_elsewhere(mesh) else mesh
    objective = _objective(config)
    return mesh, make_layout(config, place, objective.frozen(place))


class Settled(NamedTuple):
    """A run laid out with what train.remat=auto stands for."""

    config: Config
    mesh: jax.sharding.Mesh
    layout: Layout
    said: str  # a line on that choice; "" where there was none


def settle(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, room: int | None, beside: int = 0
) -> Settled:
    """What backward keeps, by the bytes of a device that a program may use.

    Args:
      mesh, layout: as `lay_out` has them.
      room, beside: as kept.chosen has them.
    """
    config, said = kept.chosen(config, mesh, layout, room, beside)
    if said:
        mesh, layout = lay_out(config, sorted(mesh.devices.flat, key=lambda d: d.id))
    return Settled(config, mesh, layout, said)


def _offloads(config: Config) -> bool:
    return (
        config.offload.optimizer_state
        or config.offload.parameters
        or bool(config.offload.activations)
    )


def _is_elsewhere(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform != jax.default_backend()


def compile_step(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, options: dict[str, Any] | None = None
) -> PlannedStep:
    """Compiles the train step for the devices of a mesh.

    Args:
      options: of XLA's compiler; None: those of train.py for this config and these devices.

    Raises:
      UserError: XLA refuses the program.
    """
    if options is None:
        layer_bytes = xla_options.bytes_of_a_layer(config, layout.model.abstract.params, mesh)
        options = xla_options.xla_options(config, mesh.devices.flat[0].platform, layer_bytes)
    started = time.perf_counter()
    try:
        objective = _objective(config)
        train_step = jax.jit(make_train_step(config, layout, objective), donate_argnums=0)
        frozen = () if layout.frozen is None else (layout.abstract_frozen(),)
        batch_of = functools.partial(
            abstract_batch, objective.fields, config, step=config.train.batch_ramp_steps
        )
        if _offloads(config) and _is_elsewhere(mesh):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                traced = train_step.trace(
                    layout.abstract_sharded(),
                    batch_of(mesh=mesh.abstract_mesh),
                    *frozen,
                )
                lowered = traced.lower(lowering_platforms=("cuda",))
            lowered_at = time.perf_counter()
            compiled = with_known_options(
                lambda known: CompiledElsewhere(lowered, mesh, dict(known or {})), options, _say
            )
        else:
            with jax.set_mesh(mesh):
                lowered = train_step.lower(layout.abstract_sharded(), batch_of(mesh=mesh), *frozen)
                lowered_at = time.perf_counter()
                compiled = with_known_options(
                    lambda known: lowered.compile(compiler_options=known), options, _say
                )
    except jax.errors.JaxRuntimeError as e:
        raise UserError(
            f"XLA cannot compile this config for {mesh.size} devices: {str(e).splitlines()[0]}"
        ) from e
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return PlannedStep(compiled, lowered_at - started, time.perf_counter() - lowered_at, peak)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # stdout may be JSON


class CompiledElsewhere:
    """As much of jax.stages.Compiled as the readers of a program need, of one that was lowered over
    a mesh without devices."""

    def __init__(self, lowered: Any, mesh: jax.sharding.Mesh, options: dict[str, Any]):
        self._executable = jax_private.compile_for(lowered, mesh.devices.reshape(-1), options)

    def memory_analysis(self) -> Any:
        return self._executable.get_compiled_memory_stats()

    def as_text(self) -> str:
        return self._executable.hlo_modules()[0].to_string()


def devices_per_host(mesh: jax.sharding.Mesh, gpus_per_host: int) -> dict[str, int]:
    """Of every axis longer than 1: how many consecutive devices along it share a host. All of them:
    it stays inside."""
    ids: np.ndarray = np.vectorize(lambda d: d.id)(mesh.devices)
    host = np.searchsorted(np.sort(ids, axis=None), ids) // gpus_per_host
    out = {}
    for i, (axis, size) in enumerate(mesh.shape.items()):
        if size > 1:
            line = np.moveaxis(host, i, 0).reshape(size, -1)[:, 0]
            out[axis] = int(np.sum(line == line[0]))
    return out


def count_of(config: Config, layout: Layout) -> Count:
    """Parameters and FLOPs of what is trained, with the FLOPs of a teacher beside it."""
    own = count(config.model, layout.model.abstract.params, config.train.sequence_length)
    if layout.frozen is None or config.objective != "distill":
        return own
    from deepseek_jax.run import teacher

    found = teacher.planned(config)
    return own.beside(found.count) if found else own


def _objective(config: Config) -> Objective:
    """What is learnt, with the teacher as far as its config.json says what it is."""
    if config.objective != "distill":
        return objectives.make(config)
    # here: what reads checkpoints wants packages that a benchmark of a step does without
    from deepseek_jax.run import teacher

    return objectives.make(config, teacher.planned(config))
