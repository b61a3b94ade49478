"""The only place where a Mesh is made and checked, and where code goes from arrays over the mesh to one
device's part of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from deepseek_jax.config.lora_targets import EXPERTS, targets
from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.quantized import BLOCK
from deepseek_jax.parallel.sharding import DIVIDED_BY, divided_axes
from deepseek_jax.runtime import environment

# Outermost first: devices of one host are neighbours, so `tensor`, `expert` and `fsdp` stay inside a host
# where they fit, while `data` and `stage`, which send least, cross hosts.
AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # sequences are divided over these
# The axes that tokens vary over: what a sum over all tokens is over. Where sequences are divided too, their
# axis joins here.
TOKEN_AXES = BATCH_AXES
TOKENS = jax.P(BATCH_AXES)  # the spec of an array [B, S, ...], or [T, ...] of its tokens


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The device mesh of `config.mesh`, with Explicit axes: a wrong sharding is an error, not a silent copy.

    Args:
      config: the run's options; an axis of -1 takes the devices that are left.
      devices: the devices to use, all of this job's by default.

    Raises:
      UserError: the mesh does not fit the devices, or does not divide the batch, the experts or the weights.
    """
    with environment.mistakes():
        devices = jax.devices() if devices is None else devices
    for option, value, on_gpus in (
        ("train.attention", config.train.attention, ("cudnn", "mosaic", "triton")),
        ("moe.experts_implementation", config.moe.experts_implementation, ("mosaic", "triton")),
    ):
        if value in on_gpus and devices[0].platform not in ("gpu", "cuda"):
            raise UserError(
                f"config.{option}={value} needs NVIDIA GPUs, and these are {devices[0].platform} devices. "
                f"Set config.{option}=auto."
            )
    shape = shape_of(config, len(devices))
    check_model(config, shape)
    by_host = sorted(
        devices, key=lambda d: (getattr(d, "slice_index", None) or 0, d.process_index, d.id)
    )
    array = np.array(by_host, dtype=object).reshape([shape[a] for a in AXES])
    return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def axes_across_hosts(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The axes along which neighbours belong to different processes."""
    host = np.vectorize(lambda d: d.process_index)(mesh.devices)
    return tuple(a for i, a in enumerate(mesh.axis_names) if np.any(np.diff(host, axis=i)))


def per_device(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """shard_map of f over all axes of the current mesh, replication checked: f sees one device's part of
    every argument, an array.

    Inside a pipeline stage, where `stage` is mapped already, it maps the others. There the backward pass
    starts from the arguments and runs f again: jax 0.10.2 cannot carry residuals that vary over the outer
    axis out of an inner shard_map.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {
        a
        for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    mapped = functools.partial(jax.shard_map, axis_names=axes, check_vma=True)
    call = mapped(f, in_specs=in_specs, out_specs=out_specs)
    if len(axes) == len(mesh.axis_names):
        return call

    def is_float(a) -> bool:
        return jax.numpy.issubdtype(a.dtype, jax.numpy.floating)

    def is_spec(s) -> bool:
        return isinstance(s, jax.P)

    def backward(args, cotangents):
        differentiated = [is_float(a) for a in args]

        def pick(values) -> tuple:
            return tuple(v for v, yes in zip(values, differentiated, strict=True) if yes)

        cotangent_specs = jax.tree.leaves(
            jax.tree.broadcast(out_specs, cotangents, is_leaf=is_spec), is_leaf=is_spec
        )
        both = zip(jax.tree.leaves(cotangents), cotangent_specs, strict=True)
        pairs = [(c, s) for c, s in both if is_float(c)]

        def transposed(args, float_cotangents):
            def float_results(*floats):
                given = iter(floats)
                out = f(
                    *(
                        next(given) if yes else a
                        for a, yes in zip(args, differentiated, strict=True)
                    )
                )
                return [leaf for leaf in jax.tree.leaves(out) if is_float(leaf)]

            return jax.vjp(float_results, *pick(args))[1](list(float_cotangents))

        specs = (tuple(in_specs), tuple(s for _, s in pairs))
        gradients = iter(
            mapped(transposed, in_specs=specs, out_specs=pick(in_specs))(
                args, tuple(c for c, _ in pairs)
            )
        )
        return tuple(next(gradients) if yes else None for yes in differentiated)

    # jax.checkpoint stops an enclosing scan from hoisting loop-invariant parts out of the call.
    call = jax.checkpoint(call)
    again = jax.custom_vjp(lambda *args: call(*args))
    again.defvjp(lambda *args: (call(*args), args), backward)
    return again


def shape_of(config: Config, device_count: int) -> dict[str, int]:
    """Devices along each axis: `config.mesh`, its -1 resolved.

    Raises:
      UserError: it is no mesh of so many devices.
    """
    shape = {a: getattr(config.mesh, a) for a in AXES}
    text = " x ".join(f"{a} {n}" for a, n in shape.items() if n != 1) or "1"
    free = [a for a, n in shape.items() if n == -1]
    for axis, n in shape.items():
        if n < 1 and n != -1:
            raise UserError(
                f"config.mesh.{axis}={n} is not a number of devices. Set it to 1 or more, or to -1 for the "
                "devices that are left."
            )
    if len(free) > 1:
        raise UserError(
            f"config.mesh.{free[0]}=-1 and config.mesh.{free[1]}=-1: only one axis may take the devices "
            "that are left. "
            f"Set one of them to a number."
        )
    asked = math.prod(n for n in shape.values() if n != -1)
    if free:
        if device_count % asked:
            raise UserError(
                f"config.mesh ({text}) asks for a multiple of {asked} devices, but there are {device_count}. "
                f"Make the product of the axes a divisor of {device_count}{_more_on_cpu(asked)}."
            )
        shape[free[0]] = device_count // asked
    elif asked != device_count:
        raise UserError(
            f"config.mesh ({text}) has {asked} devices, but there are {device_count}. "
            "Set one axis, for instance config.mesh.fsdp, to -1, or make the product "
            f"{device_count}{_more_on_cpu(asked)}."
        )
    return shape


def on_cpu() -> bool:
    """Whether the mesh of `jax.set_mesh` is of CPU devices; they need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


def _more_on_cpu(wanted: int) -> str:
    return f", or run with JAX_NUM_CPU_DEVICES={wanted}" if jax.default_backend() == "cpu" else ""


def check_model(config: Config, shape: dict[str, int]) -> None:
    """Whether a model and a batch fit a mesh of this shape.

    Raises:
      UserError: the mesh does not divide the experts, the batch or the weights.
    """
    m = config.model
    if m.has_experts and m.n_routed_experts % shape["expert"]:
        raise UserError(
            f"n_routed_experts={m.n_routed_experts} is not divisible by the expert mesh axis "
            f"({shape['expert']} devices). "
            f"Set config.mesh.expert to a divisor of {m.n_routed_experts}."
        )
    ways = math.prod(shape[a] for a in BATCH_AXES)
    if config.micro_batch % ways:
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} / accumulation {config.train.accumulation} "
            f"= {config.micro_batch} "
            f"sequences is not divisible by the {ways} devices of data x fsdp x expert. "
            f"Set config.train.batch_size to a multiple of {ways * config.train.accumulation}."
        )
    for name, width in _tensor_widths(m):
        if width % shape["tensor"]:
            raise UserError(
                f"config.model.{name}={width} is not divisible by the tensor mesh axis ({shape['tensor']} "
                "devices). "
                f"Set config.mesh.tensor to a divisor of {width}."
            )
    _check_stages(config, shape["stage"])
    _check_compression(config, shape)
    _check_divided_widths(config, shape)
    if m.shared_core_rank:
        _check_factors(config, shape, "wrappers", "")
    if config.lora.r:
        _check_lora(config, shape)


def _check_stages(config: Config, stages: int) -> None:
    m, remat, virtual, blocks = (
        config.model,
        config.train.remat,
        config.sharding.virtual_stages,
        config.pipelined_blocks,
    )
    if stages == 1:
        if virtual > 1:
            raise UserError(
                f"config.sharding.virtual_stages={virtual} needs stages, but config.mesh.stage=1. "
                f"Set config.mesh.stage, or config.sharding.virtual_stages=0."
            )
        return
    if {"exchange", "experts_hidden"} & set(remat.removeprefix("save:").split(",")):
        raise UserError(
            f"config.train.remat={remat} and config.mesh.stage={stages}: inside a stage the exchange is "
            "always made "
            f"again in backward. Set config.train.remat to full, none or save:attention,mlp_hidden."
        )
    if stages > blocks:
        kind = "MoE layers" if m.num_hidden_layers > m.first_k_dense_replace else "layers"
        raise UserError(
            f"config.mesh.stage={stages} is above the number of {kind} to divide, {blocks}. "
            f"Set config.mesh.stage to a number up to {blocks}."
        )
    if virtual > -(-blocks // stages):
        raise UserError(
            f"config.sharding.virtual_stages={virtual} is above the {-(-blocks // stages)} layers of a stage "
            f"(config.mesh.stage={stages}). Set it to a number up to that, or to 0."
        )


def _check_compression(config: Config, shape: dict[str, int]) -> None:
    method = f"config.sharding.gradient_compression={config.sharding.gradient_compression}"
    if config.sharding.gradient_compression == "none":
        return
    if shape["data"] == 1:
        raise UserError(
            f"{method} is of the sum over replicas along data, but config.mesh.data=1. "
            f"Set config.mesh.data to 2 or more, or gradient_compression=none."
        )
    if shape["stage"] > 1:
        raise UserError(
            f"{method} and config.mesh.stage={shape['stage']}: stages sum their gradients over data as they "
            "are. "
            f"Set config.mesh.stage=1, or gradient_compression=none."
        )


def _check_divided_widths(config: Config, shape: dict[str, int]) -> None:
    """What the rule table of parallel/sharding.py divides, by the option that sets its width."""
    m, axes = config.model, divided_axes(config)
    dense_axes = [a for a in (*axes, *(("expert",) if axes else ()), "stage") if shape[a] > 1]
    dense, tensor = math.prod(shape[a] for a in dense_axes), shape["tensor"]
    widths = [(f"config.model.hidden_size={m.hidden_size}", m.hidden_size, 1)]
    widths += [(f"config.model.{name}", n, tensor) for name, n in m.attention_shape.lora_widths]
    for name, width, tensor in widths:
        if width % (dense * tensor):
            named = " x ".join([*dense_axes, *(["tensor"] if tensor > 1 else [])])
            hint = "; hybrid_shard leaves config.mesh.data out" if "data" in dense_axes else ""
            raise UserError(
                f"{name} (a width of {width}) is not divisible by the {dense * tensor} devices of {named} "
                "that weights are divided over "
                f"(config.sharding.strategy={config.sharding.strategy}). Make the product of these axes a "
                f"divisor of it{hint}."
            )


def _check_lora(config: Config, shape: dict[str, int]) -> None:
    """What the mesh divides of adapters and of a base in blocks, beside the widths of weights."""
    m, axes = config.model, divided_axes(config)
    if any(path.startswith(EXPERTS) for path in targets(m, config.lora.target_modules)):
        repair = ", or leave experts out of config.lora.target_modules"
        _check_factors(config, shape, "adapters", repair)
    if config.lora.base_dtype != "nf4":
        return
    divided = (*axes, "expert") if axes and DIVIDED_BY[config.sharding.canonical][0] else ()
    dense = [a for a in (*divided, "stage") if shape[a] > 1]
    heads = ("num_attention_heads x a head", m.num_attention_heads * m.value_head_dim)
    widths = [("hidden_size", m.hidden_size, dense), (*heads, ["tensor"])]
    if m.first_k_dense_replace:
        widths.append(("intermediate_size", m.intermediate_size, ["tensor"]))
    if m.has_experts:
        widths.append(("moe_intermediate_size", m.moe_intermediate_size, ["tensor"]))
    for name, width, over in widths:
        ways = math.prod(shape[a] for a in over)
        if width % (BLOCK * ways):
            raise UserError(
                f"config.lora.base_dtype=nf4 has blocks of {BLOCK} numbers, and the {ways} devices of "
                f"{' x '.join(over)} would divide config.model.{name}={width} within one. Make the product "
                f"of these axes a divisor of {width // BLOCK}, or set config.lora.base_dtype=int8."
            )


def _check_factors(config: Config, shape: dict[str, int], what: str, repair: str) -> None:
    """The width of an expert, which has no embed axis beside it in a factor, by what divides it there."""
    width = config.model.moe_intermediate_size
    experts = [a for a in ("tensor", *divided_axes(config), "stage") if shape[a] > 1]
    ways = math.prod(shape[a] for a in experts)
    if width % ways:
        raise UserError(
            f"config.model.moe_intermediate_size={width} is not divisible by the {ways} devices of "
            f"{' x '.join(experts)} that the experts' {what} are divided over "
            f"(config.sharding.strategy={config.sharding.strategy}). Make the product of these axes a "
            f"divisor of it{repair}."
        )


def _tensor_widths(m: ModelConfig) -> list[tuple[str, int]]:
    """The options whose width lies on the tensor axis."""
    widths = [("num_attention_heads", m.num_attention_heads), ("vocab_size", m.vocab_size)]
    widths += m.attention_shape.tensor_widths
    if m.first_k_dense_replace:
        widths.append(("intermediate_size", m.intermediate_size))
    if m.has_experts:
        widths.append(("moe_intermediate_size", m.moe_intermediate_size))
    return widths
