"""Devices, and how they are divided: world size, mesh, sharding strategy."""

from dataclasses import dataclass

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.migration import Migration

WORLD = ("world", "nodes", "gpus_per_node")
SPLIT = ("tensor", "stage", "context")


@dataclass(frozen=True)
class Layout:
    """Devices of their run and of ours."""

    theirs: int  # GPUs of their run
    ours: int  # of --devices, else the same
    per_sequence: int  # theirs that work on one sequence: tensor x stage x context
    per_sequence_ours: int  # tensor x stage

    @property
    def data_theirs(self) -> int:
        """Their data parallel size."""
        return self.theirs // self.per_sequence

    @property
    def data_ours(self) -> int:
        """Our devices of data, fsdp and expert."""
        return self.ours // self.per_sequence_ours


def settle(m: Migration) -> Layout:
    """Sets config.mesh and config.sharding.

    Raises:
      UserError: the number of devices is not known, or does not divide.
    """
    theirs = world(m)
    ours = m.devices or theirs
    if theirs is None or ours is None:
        raise UserError(
            "--devices is missing: no file says on how many GPUs this runs, and the batch follows from that. "
            "Give the number of all hosts together, for instance --devices=8."
        )
    per_sequence = 1
    for name in SPLIT:
        per_sequence *= int(m.fact(name, 1))
    for count, what in ((theirs, "their"), (ours, "your")):
        if count % per_sequence:
            raise UserError(
                f"tensor x pipeline x context parallel sizes are {per_sequence}, which does not divide "
                f"{what} {count} GPUs. Give another --devices."
            )
    if theirs != ours:
        m.note(
            f"Their run has {theirs} GPUs and yours {ours} (--devices): the batch of a step is theirs, in "
            f"other micro-batches."
        )
    context = int(m.fact("context", 1))
    out = Layout(theirs, ours, per_sequence, per_sequence // context)
    if context > 1:
        m.refuse_fact(
            "context",
            "sequences are not divided over devices in this version (config.mesh.context)",
            "Set it to 1",
        )
    _set_mesh(m, out)
    return out


def world(m: Migration) -> int | None:
    """GPUs of their run, by what they say of it; else --devices."""
    nodes, per_node = m.fact("nodes"), m.fact("gpus_per_node")
    if m.fact("world"):
        return int(m.fact("world"))
    if per_node:
        return int(per_node) * int(nodes or 1)
    if m.devices:
        return m.devices
    batch, each, times = (m.fact(n) for n in ("global_batch", "per_device_batch", "accumulation"))
    if m.said("global_batch") and m.said("per_device_batch") and times:
        return max(int(batch) // (int(each) * int(times)), 1)  # DeepSpeed's three
    return None


def hosts(m: Migration, devices: int) -> int:
    """Hosts of our run: theirs where it has as many devices, else 8 GPUs each at most."""
    if m.gpus_per_node:
        return max(-(-devices // m.gpus_per_node), 1)
    nodes, per_node = m.fact("nodes"), m.fact("gpus_per_node")
    if nodes and devices % int(nodes) == 0 and devices == world(m):
        return int(nodes)
    return max(-(-devices // int(per_node or 8)), 1)


def _set_mesh(m: Migration, layout: Layout) -> None:
    for axis in ("tensor", "stage"):
        if m.fact(axis):
            m.set(f"mesh.{axis}", int(m.fact(axis)), axis)
    expert = int(m.fact("expert", 1))
    if layout.data_ours % expert:
        m.refuse_fact(
            "expert",
            f"it does not divide the {layout.data_ours} data parallel devices",
            f"Give --devices of which {expert * layout.per_sequence_ours} is a divisor",
        )
        expert = 1
    elif m.fact("expert"):
        m.set("mesh.expert", expert, "expert")
    strategy = m.fact("strategy", "full_shard")
    if m.fact("strategy"):
        m.set("sharding.strategy", strategy, "strategy")
    replicas = 1
    names: tuple[str, ...] = ("strategy", *WORLD)
    if m.fact("replicas") or m.fact("shards"):
        names = ("replicas", "shards")
        replicas = int(m.fact("replicas") or layout.data_ours // int(m.fact("shards")))
        if replicas > 1 and strategy in ("full_shard", "shard_grad_op"):
            m.set("sharding.strategy", "hybrid_shard", "strategy", "replicas", "shards")
            strategy = "hybrid_shard"
    elif strategy == "hybrid_shard":
        replicas = hosts(m, layout.ours)
    if strategy == "hybrid_shard" and layout.data_ours % (replicas * expert):
        raise UserError(
            f"{layout.data_ours} data parallel GPUs are not divided by {replicas} replicas x {expert} expert "
            f"parallel. Give another --devices, or --gpus_per_node."
        )
    m.set("mesh.data", replicas if strategy == "hybrid_shard" else 1, *names)
    if strategy == "hybrid_shard":
        inside = layout.data_ours // (replicas * expert)
        m.set("mesh.fsdp", inside, *names, how=f"{replicas} replicas of {inside * expert} GPUs")
    else:
        m.set("mesh.fsdp", -1, *names, how=f"{layout.data_ours // expert} of {layout.ours} GPUs")
