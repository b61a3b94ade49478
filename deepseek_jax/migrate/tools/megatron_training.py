"""How Megatron-core trains, in its words: parallelism, optimizer, schedule, numbers, checkpoints.

Megatron-LM, NeMo, Megatron-Bridge and ms-swift share these keys; here with underscores, without dashes and
sections. Sources: megatron/training/arguments.py, megatron/core/optimizer_param_scheduler.py and
model_parallel_config.py of Megatron-LM.
"""

import math

from deepseek_jax.migrate.handlers import (
    as_float,
    as_int,
    as_text,
    fact,
    is_off,
    neutral,
    no_effect,
    one_of,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools.megatron_handlers import flag, whole
from deepseek_jax.migrate.tools.shared import NO_FP8, because

XLA = "XLA chooses and fuses kernels"
OVERLAP = "XLA overlaps communication with computation"
ANY_STAGES = "stages may hold any number of layers here"
OWN_WORKDIR = (
    "the same command goes on from its --workdir; a checkpoint of theirs is not read: convert it to the form "
    "of Hugging Face, and name it with --config.init_from"
)
STRATEGIES = {
    "no_shard": "no_shard",
    "optim": "zero1",
    "optim_grads": "shard_grad_op",
    "optim_grads_params": "full_shard",
}


def divided_optimizer(m: Migration, entry: Entry) -> None:
    """use_distributed_optimizer: ZeRO 1, unless FSDP divides more."""
    if flag(m, "use_megatron_fsdp") or flag(m, "use_torch_fsdp2"):
        m.no_effect(entry, "FSDP divides the optimizer as well")
    else:
        on = not is_off(entry.value)
        m.tell(entry, "strategy", "zero1" if on else "no_shard")


def fsdp(m: Migration, entry: Entry) -> None:
    """use_megatron_fsdp, use_torch_fsdp2."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
    elif m.entry("data_parallel_sharding_strategy"):
        m.no_effect(entry, "data_parallel_sharding_strategy says what is divided")
    else:
        m.tell(entry, "strategy", "full_shard")


def sharding_strategy(m: Migration, entry: Entry) -> None:
    """data_parallel_sharding_strategy: of Megatron's FSDP."""
    name = STRATEGIES.get(as_text(entry))
    if not flag(m, "use_megatron_fsdp"):
        m.no_effect(entry, "it is of use_megatron_fsdp, which is off")
    elif name is None:
        m.refuse(entry, "there is no such strategy", f"Set it to one of {', '.join(STRATEGIES)}")
    else:
        m.tell(entry, "strategy", name)


def expert_tensor(m: Migration, entry: Entry) -> None:
    """expert_tensor_parallel_size: experts are divided as the rest is here."""
    tensor = whole(m, "tensor_model_parallel_size", 1)
    if entry.value is None or as_int(entry) == tensor:
        m.no_effect(entry, "as tensor_model_parallel_size")
    else:
        m.refuse(
            entry,
            f"mesh.tensor divides experts as everything else, and tensor_model_parallel_size is {tensor}",
            f"Set it to {tensor}",
        )


def virtual_stages(m: Migration, entry: Entry) -> None:
    """Layers in one virtual stage: num_layers_per_virtual_pipeline_stage."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
        return
    stages = whole(m, "pipeline_model_parallel_size", 1)
    layers = whole(m, "num_layers")
    m.tell(entry, "sharding.virtual_stages", layers // (stages * as_int(entry)))


def recompute(m: Migration, entry: Entry) -> None:
    """recompute_granularity."""
    choices = {"full": "full", "selective": "dots", "none": "none"}
    m.tell(entry, "train.remat", choices.get(as_text(entry) or "none", "full"))


def ramp(m: Migration, entry: Entry) -> None:
    """rampup_batch_size: start, increment, samples; linear here."""
    value = entry.value.split() if isinstance(entry.value, str) else entry.value
    if not value:
        m.no_effect(entry, "it is off")
        return
    try:
        start, _, samples = (int(float(v)) for v in value)
    except (TypeError, ValueError):
        m.refuse(entry, "it is not start, increment and samples", "Write three numbers")
        return
    full = whole(m, "global_batch_size", start)
    m.tell(entry, "train.batch_ramp_start", start)
    m.tell(entry, "train.batch_ramp_steps", max(1, round(2 * samples / (start + full))))
    m.note(
        "The batch grows evenly here, in whole micro-batches, and there by an increment at a time."
    )


def of_float16(name: str, power: bool = False) -> Handler:
    """An option of the loss scale, which there is of float16 alone."""

    def handle(m: Migration, entry: Entry) -> None:
        on = any(flag(m, key) for key in ("fp16", "fp16.enabled", "fp16.fp16"))
        half = on or as_precision(m) == "float16"
        if not half or is_off(entry.value):
            m.no_effect(entry, "it is of float16")
        else:
            value = as_float(entry)
            m.tell(entry, name, round(math.log2(value)) if power else value)

    return handle


def as_precision(m: Migration) -> str:
    """The dtype that a key "precision" names, in any of its sections."""
    for key in ("precision", "trainer.precision", "mixed_precision"):
        if m.value(key) is not None:
            return PRECISIONS.get(str(m.value(key)).lower(), "")
    return ""


PRECISIONS = {
    "16": "float16",
    "16-mixed": "float16",
    "16_mixed": "float16",
    "fp16": "float16",
    "fp16_mixed": "float16",
    "bf16": "bfloat16",
    "bf16-mixed": "bfloat16",
    "bf16_mixed": "bfloat16",
    "bfloat16": "bfloat16",
    "32": "float32",
    "32-true": "float32",
    "fp32": "float32",
}
precision = one_of(
    {name: {"train.dtype": dtype} for name, dtype in PRECISIONS.items()},
    "train.dtype is float32, bfloat16 or float16 here",
    "Set it to bf16",
)


def flagged(told: dict[str, object], otherwise: str = "it is off") -> Handler:
    """What a switch says when it is on."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_off(entry.value):
            m.no_effect(entry, otherwise)
        for name, value in told.items() if not is_off(entry.value) else ():
            m.tell(entry, name, value)

    return handle


SCHEDULE: dict[str, Handler] = {
    "lr": fact("learning_rate"),
    "min_lr": fact("min_lr"),
    "lr_decay_style": one_of(
        {
            "constant": {"schedule": "constant_with_warmup"},
            "linear": {"schedule": "linear"},
            "cosine": {"schedule": "cosine"},
            "inverse-square-root": {"schedule": "inverse_sqrt"},
            "wsd": {"schedule": "wsd"},
        },
        "there is no such schedule",
    ),
    "lr_wsd_decay_style": one_of(
        {
            "exponential": {"decay_shape": "exponential"},
            "linear": {"decay_shape": "linear"},
            "cosine": {"decay_shape": "cosine"},
            "minus_sqrt": {"decay_shape": "sqrt"},
        },
        "there is no such decay",
    ),
    "lr_decay_iters": fact("schedule_steps", as_int),
    "lr_decay_samples": fact("schedule_samples", as_int),
    "lr_wsd_decay_iters": fact("decay_steps", as_int),
    "lr_wsd_decay_samples": fact("decay_samples", as_int),
    "lr_warmup_iters": fact("warmup_steps", as_int),
    "lr_warmup_samples": fact("warmup_samples", as_int),
    "lr_warmup_fraction": fact("warmup_fraction"),
    "lr_warmup_init": fact("warmup_init"),
    "override_opt_param_scheduler": no_effect("the schedule is always the config's here"),
    "use_checkpoint_opt_param_scheduler": no_effect("the schedule is always the config's here"),
}

OPTIMIZER: dict[str, Handler] = {
    "optimizer": one_of(
        {
            "adam": {"optimizer.name": "adamw"},
            "muon": {"optimizer.name": "muon"},
            "dist_muon": {"optimizer.name": "muon"},
            "sgd": {"optimizer.name": "sgd"},
            "lion": {"optimizer.name": "lion"},
        },
        "there is no such optimizer",
    ),
    "weight_decay": option("optimizer.weight_decay"),
    "start_weight_decay": option("optimizer.weight_decay"),
    "end_weight_decay": option("optimizer.weight_decay"),
    "weight_decay_incr_style": neutral({"constant": ""}, "weight decay stays the same here"),
    "adam_beta1": option("optimizer.b1"),
    "adam_beta2": option("optimizer.b2"),
    "adam_eps": option("optimizer.eps"),
    "clip_grad": option("optimizer.grad_clip"),
    "muon_momentum": option("optimizer.momentum"),
    "muon_*": no_effect("muon is orthogonalised as its authors do"),
    "decoupled_lr": refuse(
        "embedding and head have the learning rate of the rest", "See lr_multipliers"
    ),
    "exp_avg_dtype": one_of(
        {
            "fp32": {"optimizer.moment_dtype": "float32"},
            "bf16": {"optimizer.moment_dtype": "bfloat16"},
        },
        "moments are float32 or bfloat16 here",
        "Set it to bf16",
    ),
    "exp_avg_sq_dtype": no_effect("both moments have exp_avg_dtype"),
    "main_grads_dtype": one_of(
        {
            "fp32": {"train.accumulation_dtype": "float32"},
            "bf16": {"train.accumulation_dtype": "bfloat16"},
        },
        "gradients are summed in float32 or bfloat16 here",
        "Set it to fp32",
    ),
    "main_params_dtype": neutral({"fp32": ""}, "weights are float32 here", "Set it to fp32"),
    "optimizer_cpu_offload": flagged({"offload.optimizer_state": True}),
    "optimizer_offload_fraction": neutral(
        {1: "", "1.0": ""}, "all of the optimizer's state is offloaded here"
    ),
    "use_precision_aware_optimizer": no_effect("exp_avg_dtype says so"),
    "overlap_cpu_optimizer_d2h_h2d": no_effect(OVERLAP),
}

PARALLEL: dict[str, Handler] = {
    "tensor_model_parallel_size": fact("tensor", as_int),
    "pipeline_model_parallel_size": fact("stage", as_int),
    "expert_model_parallel_size": fact("expert", as_int),
    "context_parallel_size": fact("context", as_int),
    "expert_tensor_parallel_size": expert_tensor,
    "virtual_pipeline_model_parallel_size": option("sharding.virtual_stages"),
    "num_virtual_stages_per_pipeline_rank": option("sharding.virtual_stages"),
    "num_layers_per_virtual_pipeline_stage": virtual_stages,
    "pipeline_model_parallel_layout": no_effect(ANY_STAGES),
    "num_layers_in_first_pipeline_stage": no_effect(ANY_STAGES),
    "num_layers_in_last_pipeline_stage": no_effect(ANY_STAGES),
    "decoder_*_pipeline_num_layers": no_effect(ANY_STAGES),
    "account_for_*_in_pipeline_split": no_effect(ANY_STAGES),
    "sequence_parallel": no_effect(
        "norms between tensor parallel maps need no switch: XLA divides them"
    ),
    "use_distributed_optimizer": divided_optimizer,
    "use_megatron_fsdp": fsdp,
    "use_torch_fsdp2": fsdp,
    "data_parallel_sharding_strategy": sharding_strategy,
    "recompute_granularity": recompute,
    "recompute_activations": flagged({"train.remat": "dots"}),
    "recompute_method": no_effect("every layer is recomputed alike"),
    "recompute_num_layers": no_effect("every layer is recomputed alike"),
    "recompute_modules": no_effect("what is kept is train.remat; see save:NAME there"),
    "distribute_saved_activations": no_effect("activations lie as the mesh divides them"),
    "cpu_offloading": flagged({"offload.activations": "layer_input"}),
    "distributed_timeout_minutes": no_effect("train.py waits --cluster_timeout seconds"),
    "distributed_backend": no_effect("XLA brings its own"),
    "calculate_per_token_loss": no_effect(
        "the loss is the mean over all scored tokens of a step, always"
    ),
    **because(
        {
            OVERLAP: (
                "overlap_* no_overlap_* align_* no_align_* delay_* batch_p2p_* tp_comm_* ub_tp_* "
                "defer_embedding_* ddp_* gradient_as_bucket_view nccl_* use_sharp sharp "
                "average_in_*"
            )
        }
    ),
}

KERNELS: dict[str, Handler] = {
    **because(
        {
            XLA: (
                "*_fusion no_*_fusion use_flash_att* attention_backend transformer_impl "
                "persist_layer_norm no_persist_layer_norm memory_efficient_layer_norm "
                "moe_grouped_gemm moe_permute_* moe_shared_expert_overlap moe_layer_recompute "
                "moe_pad_expert_input_to_capacity moe_*deepep* moe_flex_dispatcher_backend "
                "moe_*hybridep* moe_token_dropping moe_use_legacy_grouped_gemm enable_cuda_graph "
                "cuda_graph_* external_cuda_graph cross_entropy_fusion_impl fused_* use_te_* "
                "te_rng_tracker deallocate_pipeline_outputs barrier_with_L1_time disable_jit_fuser"
            )
        }
    ),
    "moe_router_dtype": no_effect("the router computes in float32"),
    "deterministic_mode": no_effect("runs are deterministic here, always"),
    "fp8*": refuse(NO_FP8, "Leave fp8 out"),
    "fp4*": refuse("train.dtype is float32, bfloat16 or float16 here", "Leave fp4 out"),
    "params_dtype": no_effect("weights are float32, and computation has train.dtype"),
    "pipeline_dtype": no_effect("stages exchange the compute dtype"),
    "autocast_dtype": no_effect("computation has train.dtype"),
    "use_cpu_initialization": no_effect("weights are made where they lie"),
    "perform_initialization": no_effect("weights are made where they lie"),
    "init_model_with_meta_device": no_effect("weights are made where they lie"),
}

TRAINING: dict[str, Handler] = {**SCHEDULE, **OPTIMIZER, **PARALLEL, **KERNELS}
