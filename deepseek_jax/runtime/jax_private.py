"""Every use of JAX's private parts (jax._src). The rest of deepseek_jax goes through this module.

Two kinds: repairs of JAX, each as small as it can be and none where JAX has changed, and doors to
what JAX has but does not publish. Each says for which versions it was written and when it can go;
tests/runtime/test_jax_private.py fails, on any of them, where something no longer fits or is no
longer needed. Written for jax 0.10.2 to 0.12.0.

Imports JAX inside the functions only: the environment is looked at before JAX is imported, and some
processes never import it.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any


def keep_explicit_axes_through_shard_map() -> None:
    """Repair: a shard_map over some axes of an Explicit mesh must not make its arrays whole along the others.

    jax 0.10.2 lowers its arguments, results and residuals with the mapped axes alone: the compiler
    gathers every weight of a pipeline stage over fsdp and expert on the way in, and once more on
    the way to backward. The types have the right sharding; this uses it. jax 0.11 has the same
    function and no need of this, 0.12 has another: it can go when 0.11 is the oldest.
    """
    shard_map: Any = importlib.import_module("jax._src.shard_map")
    lower: Any = getattr(shard_map, "_shardy_shard_map_sharding", None)
    if not _takes(lower, "ctx", "mesh", "manual_axes", "spec", "aval_in"):
        return

    def lower_as_typed(ctx, mesh, manual_axes, spec, aval_in):
        sharding = getattr(aval_in, "sharding", None)
        partly = len(manual_axes) < len(mesh.axis_names)
        if partly and sharding is not None and not sharding.mesh.empty and any(sharding.spec):
            spec = sharding.spec
        return lower(ctx, mesh, manual_axes, spec, aval_in)

    _replaces(lower_as_typed, lower)
    shard_map._shardy_shard_map_sharding = lower_as_typed


def name_cached_programs_by(cpu_kind: Callable[[], str]) -> None:
    """Repair: lets processes on CPUs find the programs that process 0 keeps in the compile cache.

    A CPU's topology has the index of the process in its fingerprint, which JAX (0.10.2 to 0.12)
    makes part of an entry's name: every other process looks for a name that nobody writes. What the
    fingerprint should tell apart is told here by the kind of CPU and by which process has which
    device. No longer needed when that index has left the fingerprint.

    Args:
      cpu_kind: makes a name of this host's kind of CPU.
    """
    cache_key: Any = importlib.import_module("jax._src.cache_key")
    hash_devices: Any = getattr(cache_key, "_hash_accelerator_config", None)
    if not _takes(hash_devices, "hash_obj", "accelerators"):
        return

    def hash_layout(hash_obj: Any, accelerators: Any) -> None:
        if any(d.platform != "cpu" for d in accelerators.flat):
            return hash_devices(hash_obj, accelerators)
        layout = [(d.id, d.process_index) for d in accelerators.flat]
        hash_obj.update(f"{cpu_kind()} {layout}".encode())

    _replaces(hash_layout, hash_devices)
    cache_key._hash_accelerator_config = hash_layout


def _replaces(repaired: Any, original: Any) -> None:
    """Marks a repair: a second one finds other parameters and changes nothing."""
    repaired.__signature__ = inspect.Signature()
    repaired.__wrapped__ = original


def _takes(function: Any, *names: str) -> bool:
    return function is not None and list(inspect.signature(function).parameters) == list(names)


def coordination_client() -> Any:
    """The client of JAX's coordination service: key_value_set, blocking_key_value_get, key_value_delete.

    Until JAX publishes a way for processes to exchange texts without their devices (multihost_utils
    computes on them).
    """
    return importlib.import_module("jax._src.distributed").global_state.client


def detect_cluster(
    address: str | None, count: int | None, index: int | None, timeout: int
) -> tuple[str | None, int | None, int | None]:
    """Address of process 0, number of processes and number of this one, as JAX finds them out from
    the scheduler.

    Until JAX publishes it apart from jax.distributed.initialize, which joins at once.

    Args:
      address, count, index: what is known already; None: find it out.
      timeout: seconds that Kubernetes' name service may take.
    """
    clusters = importlib.import_module("jax._src.clusters")
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    return detect(address, count, index, [], None, timeout)[:3]


def raised_while_devices_started(error: BaseException) -> bool:
    """Whether JAX raised an error while it looked for devices.

    JAX raises RuntimeError, or AssertionError without a word for a GPU where it has no plugin. Its
    own frame tells, or, where JAX has cut its frames from the traceback, the text and that there
    are no backends yet. Until there is an exception for that.
    """
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace:
        file = trace.tb_frame.f_code.co_filename.replace(os.sep, "/")
        if file.endswith("jax/_src/xla_bridge.py"):
            return True
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = getattr(bridge, "backends_are_initialized", lambda: True)()
    begins = ("Unable to initialize backend", "Unknown backend") if str(error) else ""
    return not started and str(error).startswith(begins)


def compile_for(lowered: Any, devices: Any, options: dict[str, Any]) -> Any:
    """Compiles a lowered program for given devices, which may be elsewhere.

    `lowered.compile()` compiles for the devices of the mesh; over a mesh without devices (see
    plan/topology.py: `lay_out`) it knows only those that are here. Until JAX takes devices there.

    Args:
      lowered: jax.stages.Lowered.
      devices: [devices] NumPy array of objects.
      options: of XLA's compiler.

    Returns:
      XLA's executable: get_compiled_memory_stats, hlo_modules.
    """
    compiler = importlib.import_module("jax._src.compiler")
    pxla = importlib.import_module("jax._src.interpreters.pxla")
    module, client = lowered.compiler_ir(), devices[0].client
    made = pxla.create_compile_options(module, False, [False], [False], client, devices, options)
    return compiler.backend_compile_and_load(
        client, module, pxla._create_device_list(tuple(devices)), made, []
    )


def cudnn_attention() -> Any:
    """JAX's module of cuDNN's fused attention, with both primitives and the enumerations of their parameters.

    Until jax.nn.dot_product_attention takes values of another width than queries and keys, which MLA has.

    Raises:
      ImportError: this JAX has no such module.
      AttributeError: its parts have other names.
    """
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    _ = (
        fused._dot_product_attention_fwd_p,
        fused._dot_product_attention_bwd_p,
        fused.MaskType.CAUSAL,
        fused.AttentionLayout.BTNH,
        fused.check_cudnn_version,
    )
    return fused


def cudnn_version() -> int | None:
    """cuDNN's, as 90100 for 9.1.0; None where JAX finds none. Until JAX publishes it."""
    # JAX's own question. What else its module lacks must not pass for a missing cuDNN.
    fused = cudnn_attention()
    try:
        return int(fused.check_cudnn_version())
    except RuntimeError:  # no CUDA plugin, or a library that cannot be loaded
        return None
