"""Accelerate: the file of `accelerate config`, and the flags of `accelerate launch`.

Read: accelerate 1.15. Keys at the top are checked there; those of fsdp_config become arguments that nobody
may read. Alone it says where a script runs, and not what is trained.
"""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_int,
    as_text,
    fact,
    is_off,
    no_effect,
    one_of,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Rank, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools.hf_arguments import file_of
from deepseek_jax.migrate.tools.hf_fsdp import (
    BY_LAYER,
    ONE_KIND,
    OWN_SHARDS,
    STRATEGIES,
    backward_prefetch,
    reshard_strategy,
    state_dict_type,
    tell_offload,
)

FOUND = "processes find each other, or train.py's --coordinator_address says where"
XLA = "everything here is compiled by XLA"
NO_TPU = "TPUs are not what this trainer is made for"
MOE_SAFE = "mixtures of experts cannot hang here: every device runs the same program"
NO_FP8 = "products in 8 bits are not in this version"
# Names of sharding strategies, by number
NUMBERS = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard")
SECTIONS = (
    "fsdp_config",
    "deepspeed_config",
    "megatron_lm_config",
    "parallelism_config",
    "dynamo_config",
)
DEEPSPEED_FLAGS = {
    "zero_stage",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "deepspeed_config_file",
    "deepspeed_hostfile",
    "deepspeed_inclusion_filter",
    "deepspeed_exclusion_filter",
    "deepspeed_multinode_launcher",
    "deepspeed_moe_layer_cls_names",
}


def canonical(key: str) -> str:
    """Keys as the file has them: with their section, without its prefix."""
    key = key.replace("-", "_")
    section, dot, name = key.partition(".")
    if not dot and key not in SECTIONS:  # a flag of accelerate launch
        if key.startswith("fsdp_"):
            return f"fsdp_config.{key.removeprefix('fsdp_')}"
        if key in DEEPSPEED_FLAGS:
            return f"deepspeed_config.{key}"
        for prefix in ("megatron_lm_", "parallelism_config_"):
            if key.startswith(prefix):
                where = {
                    "megatron_lm_": "megatron_lm_config",
                    "parallelism_config_": "parallelism_config",
                }
                return f"{where[prefix]}.{key.removeprefix(prefix)}"
        return {"config_file": "config_file", "num_cpu_threads_per_process": "num_cpu_threads"}.get(
            key, key
        )
    prefixes = {"fsdp_config": "fsdp_", "parallelism_config": "parallelism_config_"}
    prefixes |= {"megatron_lm_config": "megatron_lm_", "dynamo_config": "dynamo_"}
    return f"{section}.{name.removeprefix(prefixes.get(section, '~'))}"


def recognise(source: Source) -> int:
    """Its file, or what stands behind `accelerate launch`."""
    if source.form == "launcher":
        return 101 if source.name == "accelerate launch" else 0
    if source.form == "flags":
        return 0
    if source.has("compute_environment"):
        return 100
    return 90 if source.has("distributed_type") else 0


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


TABLE: Mapping[str, Handler] = {
    "compute_environment": one_of(
        {"LOCAL_MACHINE": "train.py runs where it is started"},
        "it is of SageMaker",
        "Set it to LOCAL_MACHINE",
    ),
    "distributed_type": distributed_type,
    "mixed_precision": mixed_precision,
    "num_processes": fact("world", as_int),
    "num_machines": machines,
    "gradient_accumulation_steps": accumulation,
    "downcast_bf16": no_effect(NO_TPU),
    "tpu_*": no_effect(NO_TPU),
    "machine_rank": no_effect(FOUND),
    "main_process_ip": no_effect(FOUND),
    "main_process_port": no_effect(FOUND),
    "rdzv_backend": no_effect(FOUND),
    "same_network": no_effect(FOUND),
    "deepspeed_hostfile": no_effect(FOUND),
    "main_training_function": no_effect("train.py is what runs"),
    "command_file": no_effect("train.py is what runs"),
    "commands": no_effect("train.py is what runs"),
    "module": no_effect("train.py is what runs"),
    "config_file": no_effect("it is read beside"),
    "gpu_ids": no_effect("a run takes all GPUs that it sees: CUDA_VISIBLE_DEVICES"),
    "use_cpu": one_of(
        {"False": "GPUs are taken where there are some"},
        "it trains on CPUs",
        "Set JAX_PLATFORMS=cpu",
    ),
    "enable_cpu_affinity": no_effect("the system places threads"),
    "num_cpu_threads": no_effect("the system places threads"),
    "debug": no_effect("every compiled program checks its collectives"),
    "dynamo_backend": no_effect(XLA),
    "dynamo_config*": no_effect(XLA),
    "mpirun_config*": no_effect(FOUND),
    "ipex_config*": no_effect(XLA),
    "fp8_config*": refuse(NO_FP8, "Set mixed_precision to bf16", unless=()),
    "multi_gpu": no_effect("a run takes all GPUs that it sees"),
    "use_fsdp": no_effect("fsdp_config says what is divided"),
    "use_deepspeed": no_effect("deepspeed_config says what is divided"),
    "env.*": no_effect("NCCL_* keep their meaning; others are of PyTorch"),
    # ---- FSDP
    "fsdp_config": no_effect("it is empty"),
    "fsdp_config.version": no_effect(ONE_KIND),
    "fsdp_config.sharding_strategy": sharding_strategy,
    "fsdp_config.reshard_after_forward": reshard,
    "fsdp_config.auto_wrap_policy": no_effect(BY_LAYER),
    "fsdp_config.transformer_layer_cls_to_wrap": no_effect(BY_LAYER),
    "fsdp_config.min_num_params": no_effect(BY_LAYER),
    "fsdp_config.backward_prefetch": backward,
    "fsdp_config.backward_prefetch_policy": backward,
    "fsdp_config.forward_prefetch": prefetch("sharding.forward_prefetch"),
    "fsdp_config.limit_all_gathers": prefetch("sharding.limit_all_gathers"),
    "fsdp_config.offload_params": offload,
    "fsdp_config.state_dict_type": state_dict_type,
    "fsdp_config.cpu_ram_efficient_loading": no_effect(OWN_SHARDS),
    "fsdp_config.sync_module_states": no_effect(OWN_SHARDS),
    "fsdp_config.use_orig_params": no_effect(ONE_KIND),
    "fsdp_config.ignored_modules": refuse("no module is left out of sharding", unless=(None, "")),
    "fsdp_config.activation_checkpointing": checkpointing,
    # ---- DeepSpeed
    "deepspeed_config": no_effect("it is empty"),
    "deepspeed_config.zero_stage": zero_stage,
    "deepspeed_config.gradient_accumulation_steps": accumulation,
    "deepspeed_config.gradient_clipping": clipping,
    "deepspeed_config.offload_optimizer_device": device("offload.optimizer_state"),
    "deepspeed_config.offload_param_device": offloaded_parameters,
    "deepspeed_config.offload_*_nvme_path": refuse(
        "there is no NVMe offload: the host's memory is used",
        "Set the device to cpu",
        (None, "none", ""),
    ),
    "deepspeed_config.zero3_init_flag": no_effect(OWN_SHARDS),
    "deepspeed_config.zero3_save_16bit_model": no_effect(
        "python -m deepseek_jax.hf export --dtype=bfloat16 writes it at the end"
    ),
    "deepspeed_config.deepspeed_moe_layer_cls_names": no_effect(MOE_SAFE),
    "deepspeed_config.deepspeed_config_file": file_of("deepspeed", "DeepSpeed's file"),
    "deepspeed_config.deepspeed_*": no_effect(FOUND),
    # ---- Megatron-LM
    "megatron_lm_config": no_effect("it is empty"),
    "megatron_lm_config.tp_degree": size("tensor"),
    "megatron_lm_config.pp_degree": size("stage"),
    "megatron_lm_config.expert_model_parallel_size": size("expert"),
    "megatron_lm_config.context_parallel_size": size("context"),
    "megatron_lm_config.num_micro_batches": fact("accumulation", as_int),
    "megatron_lm_config.gradient_clipping": option("optimizer.grad_clip"),
    "megatron_lm_config.sequence_parallelism": no_effect("XLA divides what lies between"),
    "megatron_lm_config.recompute_activations": checkpointing,
    "megatron_lm_config.use_distributed_optimizer": one_of(
        {"true": {"strategy": "zero1"}, "false": {"strategy": "no_shard"}},
        "it is neither true nor false",
    ),
    "megatron_lm_config.*_dropout": dropout,
    # ---- sizes
    "parallelism_config": no_effect("it is empty"),
    "use_parallelism_config": no_effect("parallelism_config says the sizes"),
    "parallelism_config.dp_replicate_size": size("replicas"),
    "parallelism_config.dp_shard_size": size("shards"),
    "parallelism_config.tp_size": size("tensor"),
    "parallelism_config.cp_size": size("context"),
    "parallelism_config.sp_size": size("context"),
    "parallelism_config.cp_*": no_effect("sequences are not divided"),
    "parallelism_config.sp_*": no_effect("sequences are not divided"),
}


def finish(m: Migration) -> None:
    """Its defaults: FULL_SHARD, ZeRO stage 2, no mixed precision."""
    kind = str(m.value("distributed_type", "")).upper()
    if kind == "FSDP":
        m.default("strategy", "full_shard")
    elif kind == "DEEPSPEED" and not any(r.kin == "deepspeed" for r in m.readings):
        m.default("strategy", "shard_grad_op")
    if not m.recipe:
        m.note(
            "Accelerate's file says where a script runs, and not what is trained: give the recipe as well. "
            "What no file says is at this trainer's default."
        )
        m.default("train.dtype", "float32")


TOOL = Tool(
    name="accelerate",
    title="Accelerate",
    recognise=recognise,
    table=TABLE,
    key=canonical,
    finish=finish,
    companion=True,
    rank=Rank.LAUNCHER,
)
