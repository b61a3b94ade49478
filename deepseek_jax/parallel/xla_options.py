"""FSDP's prefetch options as options of XLA's GPU compiler.

PyTorch's FSDP issues collectives from hooks around each layer; XLA moves them in the compiled program. The
counterparts:

    forward_prefetch   the collective pipeliner takes the gathers out of the loop over layers: iteration i
                       gathers for i + 1
    backward_prefetch  pre: the same for the gathers of backward, and gradients are reduced while the next
                       layer computes; post: the latter only; none: neither
    limit_all_gathers  one collective in flight at a time; without it UNLIMITED, each with its own buffers

The latency-hiding scheduler puts computation between the start and the end of a collective. What is moved
to another layer's time is combined to about one message per layer, FSDP's flat parameter; what is not stays
in pieces, so that a layer can begin with the first. XLA has one switch for the gathers of both passes: where
the two options differ, gathers are ahead in both (`notes` says so). XLA's debug options are described in
xla/debug_options_flags.cc; those used here are known to jaxlib 0.10.2 to 0.12, the pipeliner's under two
names. What a compiler does not know is dropped when the step is compiled (train/compiled_step.py).
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from deepseek_jax.config.options import Config, ShardingConfig
from deepseek_jax.parallel import sharding

OPTIONS = ("forward_prefetch", "backward_prefetch", "limit_all_gathers")
# In flight at once without limit_all_gathers: more would share the same links.
UNLIMITED = 4
PIPELINED = ("all_gather", "reduce_scatter", "all_reduce")
RENAMED = jax.__version_info__ >= (0, 11)
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def xla_options(
    config: Config, platform: str, layer_bytes: int, environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """The options of XLA's compiler for a train step; none but for GPUs.

    Args:
      platform: of the mesh's devices, as `jax.Device.platform`: gpu, or cuda and rocm.
      layer_bytes: of `bytes_of_a_layer`.
      environment: what XLA_FLAGS in it sets is left out: the user's flags win.
    """
    if not is_gpu(platform):
        return {}
    s = config.sharding
    # Without weights to gather there is nothing to move, and the pipeliner of jaxlib 0.11 and 0.12 ends the
    # process on such a step with a tensor axis and several micro-batches (TransformLoopForward).
    ahead = gathers_weights(config) and (s.forward_prefetch or s.backward_prefetch == "pre")
    behind = s.backward_prefetch != "none"
    options: dict[str, Any] = {
        "xla_gpu_enable_latency_hiding_scheduler": ahead or behind,
        **dict(pipelined(kind, ahead if kind == "all_gather" else behind) for kind in PIPELINED),
        "xla_gpu_experimental_parallel_collective_overlap_limit": 1
        if s.limit_all_gathers
        else UNLIMITED,
    }
    for kind, moved in (("all_gather", ahead), ("reduce_scatter", behind)):
        if moved and layer_bytes:
            options[f"xla_gpu_{kind}_combine_threshold_bytes"] = layer_bytes
    given = re.findall(r"--(\w+)", environment.get("XLA_FLAGS", ""))
    return {name: value for name, value in options.items() if name not in given}


def gathers_weights(config: Config) -> bool:
    """Whether the strategy divides weights, so that layers gather them."""
    return sharding.DIVIDED_BY[config.sharding.canonical][0]


def pipelined(kind: str, on: bool, renamed: bool = RENAMED) -> tuple[str, Any]:
    """The option that lets the collective pipeliner move collectives of a kind to another layer's time, and
    its value.

    Args:
      renamed: as XLA calls it since jaxlib 0.11.
    """
    if renamed:
        return f"xla_gpu_pipeline_{kind}", f"COLLECTIVE_PIPELINING_MODE_{'ON' if on else 'OFF'}"
    return f"xla_gpu_enable_pipelined_{kind}", on


def other_name(name: str, value: Any) -> tuple[str, Any] | None:
    """The same option and value as another version of XLA calls them, if there is one."""
    for kind in PIPELINED:
        for on in (True, False):
            for renamed in (True, False):
                if (name, value) == pipelined(kind, on, renamed):
                    return pipelined(kind, on, not renamed)
    return None


def is_gpu(platform: str) -> bool:
    return platform in ("gpu", "cuda", "rocm")


def bytes_of_a_layer(config: Config, params: Any, mesh: jax.sharding.Mesh) -> int:
    """Bytes of one layer's weights on a device while the layer uses them: gathered, in the compute dtype. Of
    the largest kind of layer.

    Args:
      params: the model's parameters or their shapes, stacks with a leading "layers" axis.
    """
    most = 0
    for name, layers in (
        ("dense_layers", config.model.first_k_dense_replace),
        ("layers", config.model.num_hidden_layers - config.model.first_k_dense_replace),
    ):
        if layers:
            used = sharding.shardings(sharding.specs(params[name], sharding.COMPUTE_RULES), mesh)
            held = sharding.bytes_per_device(params[name], used) // layers
            # The base of LoRA travels as it is held.
            most = max(most, held if config.lora.r else held * ITEM_BYTES[config.train.dtype] // 4)
    return most


def notes(config: Config, platform: str) -> list[str]:
    """A line for each option that the user set and that does not do what it says: on this platform, or with
    the others.
    """
    s, default = config.sharding, ShardingConfig()
    if is_gpu(platform) and not gathers_weights(config):
        if s.forward_prefetch == default.forward_prefetch:
            return []
        return [
            f"sharding.forward_prefetch={s.forward_prefetch} has no effect with "
            f"sharding.strategy={s.strategy}, which keeps weights whole"
        ]
    if is_gpu(platform):
        if s.forward_prefetch != (s.backward_prefetch == "pre"):
            return [
                f"sharding.forward_prefetch={s.forward_prefetch} with "
                f"backward_prefetch={s.backward_prefetch}: XLA has one switch for the "
                f"gathers of both passes, so weights are gathered ahead in both"
            ]
        return []
    changed = [
        f"sharding.{name}={getattr(s, name)}"
        for name in OPTIONS
        if getattr(s, name) != getattr(default, name)
    ]
    return [f"has no effect on {platform.upper()}: {', '.join(changed)}"] if changed else []


_REFUSED = re.compile(r"No such compile option: '(\w+)'|While setting option (\w+), ")


def with_known_options(
    build: Callable[[dict[str, Any] | None], Any],
    options: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> Any:
    """What `build` makes with those options that XLA's compiler knows. Options differ between versions of
    XLA, and none is worth a run.

    Args:
      build: compiles with the options that it is given; XLA checks them before anything else.
      options: names and values. One that was renamed is tried under its other name.
      say: what to do with the line about each that is left out.
    """
    left, tried = dict(options or {}), set()
    while True:
        try:
            return build(left or None)
        except jax.errors.JaxRuntimeError as e:
            found = _REFUSED.search(str(e))
            name = found and (found[1] or found[2])
            if name not in left:
                raise
            value = left.pop(name)
            tried.add(name)
            other = other_name(name, value)
            if other and other[0] not in tried:
                left[other[0]] = other[1]
            else:
                say(
                    f"XLA of jaxlib {jax.lib.__version__} does not know the option {name}={value}: "
                    f"compiled without it."
                )
