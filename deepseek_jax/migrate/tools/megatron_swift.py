"""ms-swift's `megatron sft` and `megatron pt`: Megatron's words for training, swift's for model and data.

Sources: swift/megatron/arguments/megatron_args.py, snapshot of 2026-08.
"""

from deepseek_jax.migrate.handlers import as_int, as_text, fact, no_effect, option, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import hf, megatron_model, ms_swift
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools.shared import because, tell_defaults

TABLE: dict[str, Handler] = {
    **mt.TRAINING,
    **{k: v for k, v in megatron_model.ROUTING.items() if k.startswith("moe_")},
    **{k: megatron_model.BLOCKS[k] for k in ("mtp_num_layers", "mtp_loss_scaling_factor")},
    **ms_swift.COMMON,
    "micro_batch_size": fact("per_device_batch", as_int),
    "global_batch_size": fact("global_batch", as_int),
    "num_train_epochs": fact("epochs"),
    "max_epochs": fact("epochs"),
    "train_iters": fact("steps", as_int),
    "output_dir": fact("workdir", as_text),
    "save": fact("workdir", as_text),
    "save_steps": fact("save_every", as_int),
    "save_interval": fact("save_every", as_int),
    "save_strategy": hf.when("save_when"),
    "save_total_limit": option("checkpoint.keep", as_int),
    "eval_steps": fact("eval_every", as_int),
    "eval_interval": fact("eval_every", as_int),
    "eval_iters": option("eval.batches", lambda e: as_int(e) if as_int(e) >= 0 else 16),
    "logging_steps": fact("log_every", as_int),
    "log_interval": fact("log_every", as_int),
    "seed": option("seed"),
    "bf16": mt.flagged({"train.dtype": "bfloat16"}),
    "fp16": mt.flagged({"train.dtype": "float16"}),
    "torch_dtype": hf.COMMON["torch_dtype"],
    "report_to": hf.ARGUMENTS["report_to"],
    "finetune": no_effect("the model's weights are config.init_from"),
    "mcore_model": refuse("a checkpoint of Megatron's is not read", "Name the Hugging Face model"),
    "mcore_adapter": refuse(
        "a checkpoint of Megatron's is not read", "Name it with --config.lora.adapter"
    ),
    "load": no_effect(mt.OWN_WORKDIR),
    "async_save": option("checkpoint.async_checkpointing"),
    "attention_softmax_in_fp32": no_effect("softmax is in float32 here"),
    "apply_query_key_layer_scaling": no_effect("it guards float16's range and changes no result"),
    "wandb_project": hf.COMMON["wandb_project"],
    **because(
        {
            "checkpoints are whole and sharded, and restore on any mesh": (
                "no_save_* no_load_* dist_ckpt_* use_persistent_ckpt_worker bridge_backend"
            ),
            "batches are read ahead, in an order that follows from the seed": (
                "dataloader_* train_dataloader_* num_workers data_sharding group_by_length"
            ),
            "Python's garbage collector is no matter here": ("manual_gc*"),
            "events are in WORKDIR/tensorboard": ("tensorboard_*"),
            "gradients are summed in float32": ("accumulate_allreduce_grads_in_fp32"),
            "config.watchdog ends a step that hangs": ("ddp_timeout ddp_backend local_rank"),
            "the log has loss, gradient norm, rates, memory and times": (
                "log_* wandb_exp_name wandb_save_dir"
            ),
        }
    ),
}


def recognise(source: Source) -> int:
    """Swift's model and data beside Megatron's batch."""
    if not source.has("model") or not source.has("dataset"):
        return 0
    return min(30 * source.has(*ms_swift.OF_MEGATRON), 100)


def finish(m: Migration) -> None:
    """Its defaults: all weights are trained, unlike in swift sft."""
    lora = str(m.value("tuner_type") or m.value("train_type") or "full").startswith("lora")
    if lora:
        ms_swift.tell_method(m)
    tell_defaults(
        m,
        objective="sft",
        learning_rate=1e-4 if lora else 1e-5,
        schedule="cosine",
        min_lr=0.0,
        optimizer__b2=0.95,
        optimizer__weight_decay=0.1,
        per_device_batch=1,
        global_batch=16,
        epochs=3.0,
        strategy="zero1",
        train__dtype="bfloat16",
        train__remat="dots",
        train__mtp_loss_weight=0.1,
        train__mtp_loss_weight_final=0.1,
        sft__packing="bfd" if m.told_of("sft.packing") == "bfd" else "none",
        sft__truncation="drop",
        eval_when="steps" if m.told_of("data.eval_fraction") else "no",
        log_every=5,
        log__trackers="tensorboard",
    )


TOOL = Tool(
    name="megatron_swift",
    title="ms-swift with Megatron",
    recognise=recognise,
    table=TABLE,
    finish=finish,
)
