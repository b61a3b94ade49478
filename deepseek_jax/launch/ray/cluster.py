"""A Ray cluster: connected to, or made of this host, and whether a run has room there."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError, one_line
from deepseek_jax.launch.ray.options import RayOptions


class Connection(NamedTuple):
    """Ray, connected to a cluster.

    Attributes:
      ray: the module.
      quiet: whether it keeps its own lines and those of workers to itself.
      alone: the cluster is of this host alone, and no other will join.
    """

    ray: Any
    quiet: bool
    alone: bool


@contextlib.contextmanager
def connected(o: RayOptions) -> Iterator[Connection]:
    """A cluster: as the caller left it, or until the end of the block.

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
        yield Connection(ray, quiet=False, alone=False)
        return
    where = o.address or os.environ.get("RAY_ADDRESS", "")
    try:
        alone = not where and _start_here(ray, o)
        if not alone:
            ray.init(address=where or None, **_logging(o))
    except Exception as e:  # whatever Ray raises where a process of its own does not start
        raise UserError(
            f"--address={where or 'this host'}: Ray cannot be reached or started there ({one_line(e)}). Name "
            "the cluster's HOST:PORT, or leave it out for one on this host."
        ) from e
    try:
        yield Connection(ray, not o.ray_logs, alone)
    finally:
        ray.shutdown()


def _start_here(ray: Any, o: RayOptions) -> bool:
    """Starts a cluster of this host alone. Ray takes no loopback address, and asks whoever comes for a token.

    Returns:
      False where `ray start` has started one already.
    """
    for last in (False, True):
        try:
            ray.init(
                include_dashboard=False,
                num_cpus=max(os.cpu_count() or 1, o.num_workers * o.cpus_per_worker),
                object_store_memory=1 << 27,  # nothing but lines and signals goes through it
                **_logging(o),
            )
            return True
        except ValueError as e:
            if "existing cluster" in str(e):
                return False
            raise
        except Exception:  # a busy host may need longer than the half minute that Ray gives it
            ray.shutdown()
            if last:
                raise
    return False


def _logging(o: RayOptions) -> dict[str, Any]:
    return {"log_to_driver": o.ray_logs, "logging_level": "info" if o.ray_logs else "error"}


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


def check_room(to: Connection, o: RayOptions, say: Callable[[str], None]) -> None:
    """Says that a run has to wait for hosts.

    Raises:
      UserError: none will come.
    """
    nodes = [node["Resources"] for node in to.ray.nodes() if node["Alive"]]
    needed, found = o.min_workers or o.num_workers, fitting(nodes, o)
    if found >= needed:
        return
    text = (
        f"the cluster has room for {found} of {needed} workers with {o.gpus_per_worker} GPUs and "
        f"{o.cpus_per_worker} CPUs each"
    )
    if to.alone:
        raise UserError(
            f"--num_workers={o.num_workers} --gpus_per_worker={o.gpus_per_worker}: {text}. Name another "
            "number, or a larger cluster by --address."
        )
    say(f"{text} now; waiting for hosts.")
