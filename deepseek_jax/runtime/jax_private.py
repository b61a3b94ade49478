"""Repairs of JAX, each as small as it can be, and none where JAX has changed."""

import inspect

from jax._src import shard_map


def keep_explicit_axes_through_shard_map() -> None:
    """A shard_map over some of the axes of an Explicit mesh must not make its arrays whole along the others.

    jax 0.10.2 lowers its arguments, results and residuals with the mapped axes alone: the compiler gathers every weight of a pipeline
    stage over fsdp and expert on the way in, and once more on the way to backward. The types have the right sharding; use it.
    tests/parallel/test_strategies.py fails where this repair is needed and does not act.
    """
    lower = getattr(shard_map, "_shardy_shard_map_sharding", None)
    if lower is None or list(inspect.signature(lower).parameters) != [
        "ctx",
        "mesh",
        "manual_axes",
        "spec",
        "aval_in",
    ]:
        return

    def lower_as_typed(ctx, mesh, manual_axes, spec, aval_in):
        sharding = getattr(aval_in, "sharding", None)
        if (
            len(manual_axes) < len(mesh.axis_names)
            and sharding is not None
            and not sharding.mesh.empty
            and any(sharding.spec)
        ):
            spec = sharding.spec
        return lower(ctx, mesh, manual_axes, spec, aval_in)

    shard_map._shardy_shard_map_sharding = lower_as_typed
