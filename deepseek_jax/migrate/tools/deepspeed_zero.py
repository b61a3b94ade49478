"""zero_optimization of DeepSpeed, and `auto`."""

from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_float,
    as_int,
    is_off,
    no_effect,
    one_of,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler

BUCKETS = "XLA joins and overlaps collectives by itself"
NO_NVME = (
    "there is no NVMe offload: offload.optimizer_state and offload.parameters use the host's memory, and "
    "stream one layer at a time"
)
STAGES = ("no_shard", "zero1", "shard_grad_op", "full_shard")


def is_auto(entry: Entry) -> bool:
    """Whether transformers fills it in."""
    return str(entry.value).lower() == "auto"


def auto(name: str, read: Callable[[Entry], Any]) -> Handler:
    """A fact or an option, or what the recipe says of it."""

    def handle(m: Migration, entry: Entry) -> None:
        if not is_auto(entry):
            m.tell(entry, name, read(entry))
        elif name == "global_batch" and m.recipe:
            m.no_effect(entry, "auto: it follows from the recipe's batch, accumulation and GPUs")
        else:
            m.tell_auto(entry, name)

    return handle


def unless_auto(name: str, read: Callable[[Entry], Any]) -> Handler:
    """An option; auto leaves it at its default."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_auto(entry):
            m.no_effect(entry, "auto: the default")
        else:
            m.tell(entry, name, read(entry))

    return handle


def stage(m: Migration, entry: Entry) -> None:
    """0 to 3; an old file has a bool."""
    if isinstance(entry.value, bool):
        m.tell(entry, "strategy", "zero1" if entry.value else "no_shard")
        return
    number = as_int(entry)
    if 0 <= number < len(STAGES):
        m.tell(entry, "strategy", STAGES[number])
    else:
        m.refuse(entry, "ZeRO has the stages 0 to 3", "Set it to 3")


def device(told: str) -> Handler:
    """none, cpu or nvme."""
    return one_of(
        {"none": "it stays on the GPU", "cpu": {told: True}, "auto": "it stays on the GPU"},
        NO_NVME,
        "Set device to cpu",
    )


def parameters(m: Migration, entry: Entry) -> None:
    """offload_param acts in stage 3 only."""
    number = str(m.value("zero_optimization.stage", 0))
    if str(entry.value).lower() == "cpu" and number != "3":
        m.no_effect(
            entry,
            f"ZeRO stage {number} does not divide parameters: DeepSpeed does not offload them",
        )
    else:
        device("offload.parameters")(m, entry)


def legacy_offload(told: str) -> Handler:
    """cpu_offload: true."""

    def handle(m: Migration, entry: Entry) -> None:
        if as_bool(entry):
            m.tell(entry, told, True)
        else:
            m.no_effect(entry, "it is off")

    return handle


def threshold(m: Migration, entry: Entry) -> None:
    """Smaller weights stay whole."""
    if is_auto(entry):
        m.no_effect(entry, "auto: sharding.min_weight_size is 2048 elements here")
    else:
        m.tell(entry, "sharding.min_weight_size", as_int(entry))


def group(m: Migration, entry: Entry) -> None:
    """hpZ and MiCS: weights are divided over so many devices, and the groups are replicas."""
    if is_off(entry.value) or as_int(entry) <= 1:
        m.no_effect(entry, "it divides nothing")
    else:
        m.tell(entry, "shards", as_int(entry))
        m.note(
            f"{entry.label}: the whole state is divided over so many GPUs here (hybrid_shard); "
            f"there the optimizer's is divided over all."
        )


def quantized_gradients(m: Migration, entry: Entry) -> None:
    """qgZ: int8 between hosts."""
    if not as_bool(entry):
        m.no_effect(entry, "it is off")
    elif m.value("zero_optimization.zero_hpz_partition_size") or m.value(
        "zero_optimization.mics_shard_size"
    ):
        m.tell(entry, "sharding.gradient_compression", "int8")
    else:
        m.refuse(
            entry,
            "gradients are compressed between replicas, and there are none",
            "Set zero_hpz_partition_size to the GPUs of a host",
        )


def ratio(m: Migration, entry: Entry) -> None:
    """Share of the optimizer that is offloaded."""
    if as_float(entry) == 1.0:
        m.no_effect(entry, "all of it")
    else:
        m.refuse(entry, "the optimizer's state lies on the host whole", "Set it to 1")


def activations(m: Migration, entry: Entry) -> None:
    """cpu_checkpointing."""
    if as_bool(entry):
        m.tell(entry, "offload.activations", "layer_input")
    else:
        m.no_effect(entry, "it is off")


def node_local(m: Migration, entry: Entry) -> None:
    """use_node_local_storage."""
    if as_bool(entry):
        m.tell(entry, "checkpoint.kind", "local")
    else:
        m.no_effect(entry, "checkpoints are in a folder that all hosts see")


_NVME_PATH = refuse(NO_NVME, "Set device to cpu", (None, "none", ""))
_OF_NVME = no_effect("device says where it lies")

ZERO: Mapping[str, Handler] = {
    "stage": stage,
    "offload_optimizer": no_effect("it is empty"),
    "offload_param": no_effect("it is empty"),
    "offload_optimizer.device": device("offload.optimizer_state"),
    "offload_param.device": parameters,
    "offload_*.nvme_path": _NVME_PATH,
    "offload_*.ratio": ratio,
    "offload_*": _OF_NVME,
    "cpu_offload": legacy_offload("offload.optimizer_state"),
    "cpu_offload_param*": legacy_offload("offload.parameters"),
    "cpu_offload_use_pin_memory": _OF_NVME,
    "param_persistence_threshold": threshold,
    "zero_hpz_partition_size": group,
    "mics_shard_size": group,
    "mics_hierarchical_params_gather": no_effect(BUCKETS),
    "zero_quantized_gradients": quantized_gradients,
    "zero_quantized_weights": refuse("weights are gathered in train.dtype", "Set it to false"),
    "zero_quantized_nontrainable_weights": refuse(
        "weights are gathered in train.dtype", "Set it to false"
    ),
    "zeropp_loco_param*": refuse("it is of zero_quantized_gradients", "Take it out"),
    "zenflow*": refuse("every step updates all weights", "Take it out", ()),
    "gather_16bit_weights_on_model_save": no_effect(
        "python -m deepseek_jax.hf export --dtype=bfloat16 writes them at the end"
    ),
    "gather_fp16_weights_on_model_save": no_effect(
        "python -m deepseek_jax.hf export --dtype=bfloat16 writes them at the end"
    ),
    **{
        name: no_effect(BUCKETS)
        for name in (
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "overlap_reduce_scatter",
            "sub_group_size",
            "max_live_parameters",
            "max_reuse_distance",
            "prefetch_bucket_size",
            "model_persistence_threshold",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "use_multi_rank_bucket_allreduce",
            "allgather_sequential",
            "round_robin_gradients",
            "ignore_unused_parameters",
            "legacy_stage1",
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "memory_efficient_linear",
            "override_module_apply",
            "leaf_module*",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "pipeline_loading_checkpoint",
            "save_muon_momentum_buffer_in_memory",
            "grad_hooks",
        )
    },
}
TABLE: Mapping[str, Handler] = {
    "zero_optimization": stage,
    **{
        f"zero_optimization.{prefix}{name}": handler
        for name, handler in ZERO.items()
        for prefix in ("", "stage3_")
    },
}
