"""DeepSpeed: the JSON file, beside a recipe of transformers or alone.

Read: DeepSpeed 0.19.6. `auto` is what transformers fills in from the recipe.
"""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import as_bool, as_float, as_int, no_effect, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Rank, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import deepspeed_optimizer, deepspeed_zero
from deepseek_jax.migrate.tools.deepspeed_zero import auto, is_auto, unless_auto

IGNORED = "it changes speed or memory alone, and XLA decides that here"
NOT_HERE = "it is another way of training, which is not in this version"
ALWAYS = "bad updates are always skipped and counted"


def recognise(source: Source) -> int:
    """By words that are DeepSpeed's alone; gpt-neox has them beside its own."""
    if source.form in ("flags", "launcher") or source.has(
        "num_layers", "pipe_parallel_size", "base_model"
    ):
        return 0
    if source.has("zero_optimization", "train_micro_batch_size_per_gpu"):
        return 95
    return 90 if source.has("train_batch_size") and source.form == "json" else 0


def enabled(dtype: str) -> Handler:
    """bf16.enabled, fp16.enabled."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_auto(entry):
            m.tell_auto(entry, "train.dtype")
        elif as_bool(entry):
            m.tell(entry, "train.dtype", dtype)
        else:
            m.no_effect(entry, "it is off")

    return handle


def prints(m: Migration, entry: Entry) -> None:
    """steps_per_print: a recipe has logging_steps."""
    if m.recipe:
        m.no_effect(entry, "the recipe says how often metrics are written")
    else:
        m.tell(entry, "log_every", as_float(entry))


def bf16_states(m: Migration, entry: Entry) -> None:
    """Moments in bfloat16."""
    if as_bool(entry):
        m.tell(entry, "optimizer.moment_dtype", "bfloat16")
    else:
        m.no_effect(entry, "it is off")


def accumulation_dtype(m: Migration, entry: Entry) -> None:
    """data_types.grad_accum_dtype."""
    text = str(entry.value).lower()
    if text in ("bf16", "bfloat16"):
        m.tell(entry, "train.accumulation_dtype", "bfloat16")
    elif text in ("fp32", "float32", "none"):
        m.tell(entry, "train.accumulation_dtype", "float32")
    else:
        m.refuse(entry, "gradients are added up in float32 or bfloat16", "Set it to fp32")


def autocast(m: Migration, entry: Entry) -> None:
    """torch_autocast.enabled, with its dtype beside it."""
    if as_bool(entry):
        dtype = str(m.value("torch_autocast.dtype", "bfloat16")).removeprefix("torch.")
        m.tell(entry, "train.dtype", dtype)
    else:
        m.no_effect(entry, "it is off")


def tracker(name: str) -> Handler:
    """wandb.enabled and the like."""

    def handle(m: Migration, entry: Entry) -> None:
        m.no_effect(entry, f"log.trackers={name} does that" if as_bool(entry) else "it is off")

    return handle


def number_above_one(name: str) -> Handler:
    """A parallel size; 1 says nothing."""

    def handle(m: Migration, entry: Entry) -> None:
        if as_int(entry) <= 1:
            m.no_effect(entry, "1 divides nothing")
        else:
            m.tell(entry, name, as_int(entry))

    return handle


TABLE: Mapping[str, Handler] = {
    # ---- the batch
    "train_batch_size": auto("global_batch", as_int),
    "train_micro_batch_size_per_gpu": auto("per_device_batch", as_int),
    "gradient_accumulation_steps": auto("accumulation", as_int),
    "gradient_clipping": auto("optimizer.grad_clip", as_float),
    **deepspeed_optimizer.TABLE,
    # ---- numbers
    "bf16.enabled": enabled("bfloat16"),
    "fp16.enabled": enabled("float16"),
    "fp16.loss_scale": unless_auto("fp16.loss_scale", as_float),
    "fp16.loss_scale_window": unless_auto("fp16.loss_scale_window", as_int),
    "fp16.initial_scale_power": unless_auto("fp16.initial_scale_power", as_int),
    "fp16.hysteresis": unless_auto("fp16.hysteresis", as_int),
    "fp16.min_loss_scale": unless_auto("fp16.min_loss_scale", as_float),
    "fp16.consecutive_hysteresis": no_effect("overflows count since the scale last rose"),
    "fp16.auto_cast": no_effect("inputs are token ids"),
    "fp16.fp16_master_weights_and_grads": refuse("parameters are float32", "Set it to false"),
    "bf16.bf16_master_weights_and_grads": refuse("parameters are float32", "Set it to false"),
    "bf16.bf16_optimizer_states": bf16_states,
    "bf16.*": no_effect(ALWAYS),
    "data_types.grad_accum_dtype": accumulation_dtype,
    "torch_autocast.enabled": autocast,
    "torch_autocast.*": no_effect("torch_autocast.enabled says whether"),
    "amp.enabled": refuse("apex is not here", "Use bf16"),
    "amp.*": no_effect("it is of apex"),
    "communication_data_type": no_effect(
        "gradients are reduced in train.dtype and added up in float32"
    ),
    "seq_parallel_communication_data_type": no_effect("sequences are not divided"),
    # ---- memory
    **deepspeed_zero.TABLE,
    "activation_checkpointing.cpu_checkpointing": deepspeed_zero.activations,
    "activation_checkpointing*": no_effect("it configures, and train.remat switches on"),
    # ---- parallel
    "tensor_parallel.autotp_size": number_above_one("tensor"),
    "tensor_parallel.*": no_effect(IGNORED),
    "expert_parallel.autoep_size": number_above_one("expert"),
    "expert_parallel.*": no_effect("its size says so"),
    "sequence_parallel_size": number_above_one("context"),
    "pipeline.stages": number_above_one("stage"),
    "pipeline.*": no_effect(IGNORED),
    # ---- checkpoints, log
    "checkpoint.use_node_local_storage": deepspeed_zero.node_local,
    "checkpoint*": no_effect("a checkpoint is read on any mesh"),
    "steps_per_print": prints,
    "wandb.enabled": tracker("wandb"),
    "tensorboard.enabled": tracker("tensorboard"),
    "comet.enabled": tracker("comet"),
    "csv_monitor.enabled": no_effect("WORKDIR/metrics.jsonl has the rows"),
    "wandb.*": no_effect("log.project and log.run_name say so"),
    "tensorboard.*": no_effect("events are in WORKDIR/tensorboard"),
    "comet.*": no_effect("there is no comet here"),
    "csv_monitor.*": no_effect("WORKDIR/metrics.jsonl has the rows"),
    "flops_profiler*": no_effect("profile.start traces steps, and says where their time went"),
    "wall_clock_breakdown": no_effect("profile.start traces steps, and says where their time went"),
    "memory_breakdown": no_effect("profile.start traces steps, and says where their time went"),
    "elasticity*": no_effect("python -m deepseek_jax.launch --min_processes goes on with fewer"),
    "compression_training*": refuse(NOT_HERE, "Take it out"),
    **{
        f"{name}*": refuse(NOT_HERE, "Take it out")
        for name in (
            "autotuning",
            "data_efficiency",
            "curriculum_learning",
            "progressive_layer_drop",
            "eigenvalue",
            "sparse_attention",
            "hybrid_engine",
            "random_ltd",
            "weight_quantization",
        )
    },
    "gradient_allreduce_op": refuse(
        "gradients are summed over tokens, and divided by them", "Take it out"
    ),
    **{
        f"{name}*": no_effect(IGNORED)
        for name in (
            "prescale_gradients",
            "gradient_predivide_factor",
            "sparse_gradients",
            "disable_allgather",
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
            "dump_state",
            "dataloader_drop_last",
            "aio",
            "nebula",
            "compile",
            "log_level",
            "graph_harvesting",
            "managed_gradient_accumulation",
            "vocabulary_size",
            "use_data_before_expert_parallelism",
            "_comment",
            "comment",
        )
    },
}


def finish(m: Migration) -> None:
    """What DeepSpeed does where its file is silent."""
    if m.entry("scheduler.type"):
        m.default("warmup_shape", "log", Rank.LAUNCHER)
        m.default("warmup_steps", 1000)
        kind = str(m.value("scheduler.type")).lower()
        if m.entry("scheduler.params.cos_min_ratio") is None:
            m.default("min_lr_fraction", 1e-4 if "cosine" in kind else 0.0, Rank.ABOVE)
        m.note(
            "DeepSpeed's scheduler wins over lr_scheduler_type; its warmup rises as the logarithm."
        )
    if m.entry("gradient_clipping") is None:
        if m.recipe:
            m.default("optimizer.grad_clip", 1.0, Rank.ABOVE)
            m.note(
                "Without gradient_clipping in its file, DeepSpeed does not read max_grad_norm: it clips at "
                "1.0 from 0.19 on, and not at all before that (set optimizer.grad_clip to 0)."
            )
        else:
            m.default("optimizer.grad_clip", 1.0)
    m.default("strategy", "no_shard")
    if m.recipe:
        return
    for name, value in {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "optimizer.name": "adamw",
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.999,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.0,
        "train.dtype": "float32",
        "train.remat": "none",
        "hf_aux_coef": 0.0,
        "moe.bias_update_rate": 0.0,
    }.items():
        m.default(name, value)
    if m.told_of("global_batch") is None:
        m.default("accumulation", 1)
    m.note(
        "DeepSpeed's file does not say what is trained, nor how long: give the recipe as well, or set "
        "data.path and train.steps. Weight decay there is of all parameters that the script names; here "
        "not of norms."
    )


TOOL = Tool(
    name="deepspeed",
    title="DeepSpeed",
    recognise=recognise,
    table=TABLE,
    finish=finish,
    companion=True,
)
