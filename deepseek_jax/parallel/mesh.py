"""The only place where a Mesh is made and checked."""

import math

import jax
from jax.sharding import AxisType

from deepseek_jax.config import Config, UserError
from deepseek_jax.parallel.sharding import divided_axes

AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the batch is divided over these


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The device mesh of `config.mesh`, with Explicit axes: a wrong sharding is an error, not a silent copy.

    Args:
      config: the run's options; an axis of -1 takes the devices that are left.
      devices: the devices to use, all of this job's by default.

    Raises:
      UserError: the mesh does not fit the devices, or does not divide the batch, the experts or the weights.
    """
    devices = jax.devices() if devices is None else devices
    shape = _resolve(config, len(devices))
    _check(config, shape)
    return jax.make_mesh(tuple(shape[a] for a in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def _resolve(config: Config, device_count: int) -> dict[str, int]:
    shape = {a: getattr(config.mesh, a) for a in AXES}
    text = " x ".join(f"{a} {n}" for a, n in shape.items() if n != 1) or "1"
    free = [a for a, n in shape.items() if n == -1]
    for axis, n in shape.items():
        if n < 1 and n != -1:
            raise UserError(f"config.mesh.{axis}={n} is not a number of devices. Set it to 1 or more, or to -1 for the devices that are left.")
    if len(free) > 1:
        raise UserError(f"config.mesh.{free[0]}=-1 and config.mesh.{free[1]}=-1: only one axis may take the devices that are left. "
                        f"Set one of them to a number.")
    asked = math.prod(n for n in shape.values() if n != -1)
    if free:
        if device_count % asked:
            raise UserError(f"config.mesh ({text}) asks for a multiple of {asked} devices, but there are {device_count}. "
                            f"Make the product of the axes a divisor of {device_count}{_more_on_cpu(asked)}.")
        shape[free[0]] = device_count // asked
    elif asked != device_count:
        raise UserError(f"config.mesh ({text}) has {asked} devices, but there are {device_count}. "
                        f"Set one axis, for instance config.mesh.fsdp, to -1, or make the product {device_count}{_more_on_cpu(asked)}.")
    return shape


def _more_on_cpu(wanted: int) -> str:
    return f", or run with JAX_NUM_CPU_DEVICES={wanted}" if jax.default_backend() == "cpu" else ""


def _check(config: Config, shape: dict[str, int]) -> None:
    m = config.model
    if m.n_routed_experts % shape["expert"]:
        raise UserError(f"n_routed_experts={m.n_routed_experts} is not divisible by the expert mesh axis ({shape['expert']} devices). "
                        f"Set config.mesh.expert to a divisor of {m.n_routed_experts}.")
    ways = math.prod(shape[a] for a in BATCH_AXES)
    if config.micro_batch % ways:
        raise UserError(f"config.train.batch_size={config.train.batch_size} / accumulation {config.train.accumulation} = {config.micro_batch} "
                        f"sequences is not divisible by the {ways} devices of data x fsdp x expert. "
                        f"Set config.train.batch_size to a multiple of {ways * config.train.accumulation}.")
    # What the rule table of parallel/sharding.py divides, by the option that sets its width.
    axes = divided_axes(config)
    if not axes:
        return
    experts = math.prod(shape[a] for a in axes)
    dense = experts * shape["expert"]
    heads = f"num_attention_heads={m.num_attention_heads}"
    widths = [(f"config.model.hidden_size={m.hidden_size}", m.hidden_size),
              (f"config.model.{heads} x (qk_nope_head_dim + v_head_dim)", m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim))]
    if m.q_lora_rank:
        widths.append((f"config.model.{heads} x (qk_nope_head_dim + qk_rope_head_dim)",
                       m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)))
    for name, width in widths:
        if width % dense:
            raise UserError(f"{name} (a width of {width}) is not divisible by the {dense} devices of {' x '.join((*axes, 'expert'))} that "
                            f"config.sharding.strategy={config.sharding.strategy} divides weights over. Make these axes smaller; "
                            f"hybrid_shard leaves config.mesh.data out.")
