"""Handlers of Accelerate's keys that are more than a word of ours."""

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_int,
    as_text,
    is_off,
    one_of,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Rank
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools.hf_fsdp import (
    STRATEGIES,
    backward_prefetch,
    reshard_strategy,
    tell_offload,
)
from deepseek_jax.migrate.tools.shared import NO_FP8

# Names of sharding strategies, by number
NUMBERS = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard")


def distributed_type(m: Migration, entry: Entry) -> None:
    """What divides the model. Of FSDP and DeepSpeed their sections say more."""
    kind = as_text(entry).upper()
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        section = {
            "FSDP": "fsdp_config",
            "DEEPSPEED": "deepspeed_config",
            "MEGATRON_LM": "megatron_lm_config",
        }
        m.no_effect(entry, f"{section[kind]} says what is divided")
    elif kind in ("NO", "FALSE", "MULTI_GPU", "MULTI_CPU"):
        m.tell(entry, "strategy", "no_shard")
    else:
        m.refuse(
            entry,
            f"{kind} is no hardware that runs are made for here",
            "Set it to FSDP or MULTI_GPU",
        )


def mixed_precision(m: Migration, entry: Entry) -> None:
    """What products are computed in; the recipe wins."""
    text = str(entry.value).lower()
    if text in ("bf16", "fp16"):
        m.tell(entry, "train.dtype", {"bf16": "bfloat16", "fp16": "float16"}[text])
    elif text in ("no", "false"):
        m.tell(entry, "train.dtype", "float32", Rank.DEFAULT)
    elif is_off(entry.value):
        m.no_effect(entry, "null is the default")
    else:
        m.refuse(entry, NO_FP8, "Set it to bf16")


def sharding_strategy(m: Migration, entry: Entry) -> None:
    """By name or number."""
    if str(m.value("fsdp_config.version", 1)) == "2":
        m.no_effect(entry, "FSDP2 reads reshard_after_forward in its place")
        return
    text = str(entry.value).lower()
    name = NUMBERS[int(text) - 1] if text in ("1", "2", "3", "4", "5") else STRATEGIES.get(text)
    if name is None:
        m.refuse(entry, "there is no such sharding strategy", "Set it to FULL_SHARD")
        return
    if text in ("5", "hybrid_shard_zero2"):
        m.note(f"{entry.label}: weights are divided within a host between steps, too.")
    m.tell(entry, "strategy", name)


def reshard(m: Migration, entry: Entry) -> None:
    """Of FSDP2 a bool; files of version 1 have a strategy's name here as well."""
    text = str(entry.value).lower()
    if str(m.value("fsdp_config.version", 1)) != "2" and m.entry("fsdp_config.sharding_strategy"):
        m.no_effect(entry, "FSDP1 reads sharding_strategy")
    elif text in STRATEGIES or text in ("true", "false") or text.isdecimal():
        m.tell(entry, "strategy", reshard_strategy(entry.value))
    else:
        m.refuse(entry, "there is no such sharding", "Set it to true")


def offload(m: Migration, entry: Entry) -> None:
    """Parameters, gradients and the optimizer."""
    if as_bool(entry):
        tell_offload(m, entry)
    else:
        m.no_effect(entry, "it is off")


def checkpointing(m: Migration, entry: Entry) -> None:
    """Activation checkpointing."""
    if as_bool(entry):
        m.tell(entry, "train.remat", "full", Rank.RECIPE)
    else:
        m.no_effect(entry, "it is off")


def prefetch(name: str) -> Handler:
    """A bool that FSDP1 alone reads."""

    def handle(m: Migration, entry: Entry) -> None:
        if str(m.value("fsdp_config.version", 1)) == "2":
            m.no_effect(entry, "FSDP2 does not read it")
        else:
            m.tell(entry, name, as_bool(entry))

    return handle


def backward(m: Migration, entry: Entry) -> None:
    """backward_prefetch of FSDP1."""
    if str(m.value("fsdp_config.version", 1)) == "2":
        m.no_effect(entry, "FSDP2 does not read it")
    else:
        backward_prefetch(m, entry)


def zero_stage(m: Migration, entry: Entry) -> None:
    """0 to 3."""
    stages = ("no_shard", "zero1", "shard_grad_op", "full_shard")
    number = as_int(entry)
    if 0 <= number < 4:
        m.tell(entry, "strategy", stages[number])
    else:
        m.refuse(entry, "ZeRO has the stages 0 to 3", "Set it to 3")


def accumulation(m: Migration, entry: Entry) -> None:
    """Of deepspeed_config: the recipe's wins."""
    if str(entry.value) == "auto":
        m.no_effect(entry, "auto: the recipe says it")
    else:
        m.tell(entry, "accumulation", as_int(entry))


def clipping(m: Migration, entry: Entry) -> None:
    """Of deepspeed_config."""
    if str(entry.value) == "auto":
        m.no_effect(entry, "auto: the recipe says it")
    else:
        option("optimizer.grad_clip")(m, entry)


def device(told: str) -> Handler:
    """Where DeepSpeed keeps optimizer or parameters."""
    return one_of(
        {"none": "it stays on the GPU", "cpu": {told: True}},
        "there is no NVMe offload: offload.optimizer_state and offload.parameters use the host's memory, and "
        "stream one layer at a time",
        "Set it to cpu",
    )


def offloaded_parameters(m: Migration, entry: Entry) -> None:
    """offload_param acts in stage 3 only."""
    stage = str(m.value("deepspeed_config.zero_stage", 2))
    if str(entry.value).lower() == "cpu" and stage != "3":
        m.no_effect(
            entry, f"ZeRO stage {stage} does not divide parameters: DeepSpeed does not offload them"
        )
    else:
        device("offload.parameters")(m, entry)


def size(name: str) -> Handler:
    """Of parallelism_config; 1 says nothing."""

    def handle(m: Migration, entry: Entry) -> None:
        number = as_int(entry)
        if number <= 1:
            m.no_effect(entry, "1 divides nothing")
        else:
            m.tell(entry, name, number)

    return handle


def machines(m: Migration, entry: Entry) -> None:
    """num_processes counts those of all machines."""
    m.tell(entry, "nodes", as_int(entry))


def dropout(m: Migration, entry: Entry) -> None:
    """Of Megatron-LM."""
    refuse("there is no dropout", "Set it to 0", ("0", "0.0", None))(m, entry)
