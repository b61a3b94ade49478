"""A Ray cluster: connected to, or made of this host, and whether a run has room there."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deepseek_jax.errors import UserError, one_line
from deepseek_jax.launch.ray.options import RayOptions


@contextlib.contextmanager
def connected(o: RayOptions) -> Iterator[tuple[Any, bool]]:
    """(Ray, connected to a cluster: as the caller left it, or until the end of the block; whether it keeps
    its own lines and those of workers to itself).

    Raises:
      UserError: Ray is not installed, or no cluster answers at --address.
    """
    try:
        import ray
        import ray.train.v2.jax  # noqa: F401  the newest part of it that is used
    except ImportError as e:
        raise UserError(
            f"Ray Train cannot be used ({one_line(e)}). Install it: pip install 'deepseek_jax[ray]'."
        ) from e
    if ray.is_initialized():
        yield ray, False
        return
    where = o.address or os.environ.get("RAY_ADDRESS", "")
    try:
        _connect(ray, o, where)
    except Exception as e:  # whatever Ray raises where a process of its own does not start
        raise UserError(
            f"--address={where or 'this host'}: Ray cannot be reached or started there ({one_line(e)}). Name "
            "the cluster's HOST:PORT, or leave it out for one on this host."
        ) from e
    try:
        yield ray, not o.ray_logs
    finally:
        ray.shutdown()


def _connect(ray: Any, o: RayOptions, where: str) -> None:
    logging = {"log_to_driver": o.ray_logs, "logging_level": "info" if o.ray_logs else "error"}
    if not where:
        try:
            # One of this host alone, which nobody else needs to reach; Ray refuses where `ray start` has
            # started one already.
            ray.init(
                include_dashboard=False,
                num_cpus=max(os.cpu_count() or 1, o.num_workers * o.cpus_per_worker),
                object_store_memory=1 << 27,  # nothing but lines and signals goes through it
                _node_ip_address="127.0.0.1",
                **logging,
            )
            return
        except ValueError as e:
            if "existing cluster" not in str(e):
                raise
    ray.init(address=where or None, **logging)


def fitting(nodes: Sequence[dict[str, float]], o: RayOptions) -> int:
    """How many workers the hosts of a cluster could hold.

    Args:
      nodes: resources of each host, as Ray names them.
    """
    each = [("GPU", o.gpus_per_worker), ("CPU", o.cpus_per_worker)]
    counts = [
        min((int(node.get(name, 0.0) // n) for name, n in each if n), default=o.num_workers)
        for node in nodes
    ]
    return sum(min(c, 1) if o.placement_strategy == "STRICT_SPREAD" else c for c in counts)


def check_room(ray: Any, o: RayOptions, say: Callable[[str], None]) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed, found = o.min_workers or o.num_workers, fitting(nodes, o)
    if found >= needed:
        return
    text = (
        f"the cluster has room for {found} of {needed} workers with {o.gpus_per_worker} GPUs and "
        f"{o.cpus_per_worker} CPUs each"
    )
    if len(nodes) == 1 and nodes[0].get("node:127.0.0.1"):  # of this host alone: no host will join
        raise UserError(
            f"--num_workers={o.num_workers} --gpus_per_worker={o.gpus_per_worker}: {text}. Name another "
            "number, or a larger cluster by --address."
        )
    say(f"{text} now; waiting for hosts.")
