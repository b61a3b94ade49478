"""Accelerate: the file of `accelerate config`, and the flags of `accelerate launch`.

Read: accelerate 1.15. Keys at the top are checked there; those of fsdp_config become arguments that nobody
may read. Alone it says where a script runs, and not what is trained.
"""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import (
    as_int,
    fact,
    no_effect,
    one_of,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Rank, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import launchers
from deepseek_jax.migrate.tools.accelerate_handlers import (
    accumulation,
    backward,
    checkpointing,
    clipping,
    device,
    distributed_type,
    dropout,
    machines,
    mixed_precision,
    offload,
    offloaded_parameters,
    prefetch,
    reshard,
    sharding_strategy,
    size,
    zero_stage,
)
from deepseek_jax.migrate.tools.hf_arguments import file_of
from deepseek_jax.migrate.tools.hf_fsdp import (
    BY_LAYER,
    ONE_KIND,
    OWN_SHARDS,
    state_dict_type,
)
from deepseek_jax.migrate.tools.shared import NO_FP8

FOUND = "processes find each other, or train.py's --coordinator_address says where"
XLA = "everything here is compiled by XLA"
NO_TPU = "TPUs are not what this trainer is made for"
MOE_SAFE = "mixtures of experts cannot hang here: every device runs the same program"
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
    if not dot:
        return key
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


TABLE: Mapping[str, Handler] = {
    **launchers.TABLE,  # of torchrun, to which accelerate launch hands them on
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
    if m.value("use_fsdp"):
        kind = "FSDP"
    elif m.value("use_deepspeed"):
        kind = "DEEPSPEED"
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
