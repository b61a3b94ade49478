"""A run around its steps in Megatron's words: data, checkpoints, evaluation and the log.

Megatron-LM, Megatron-Bridge, NeMo 2 and gpt-neox share them. Source: training_config.py of Megatron-LM.
"""

from deepseek_jax.migrate.handlers import as_int, as_text, fact, is_off, no_effect, option, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools import megatron_data as md
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools.megatron_handlers import flag, whole
from deepseek_jax.migrate.tools.shared import because
from deepseek_jax.migrate.tracking import if_there, trackers

CONVERT = "Convert it to the form of Hugging Face, and name it with --config.init_from"


def begins_with_theirs(m: Migration, entry: Entry) -> None:
    """--finetune: the weights of --load, at step 0."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
    else:
        m.refuse(entry, "a checkpoint of Megatron's is not read", CONVERT)


def ends_early(m: Migration, entry: Entry) -> None:
    """--exit-interval: a job ends there, and another goes on."""
    steps = whole(m, "train_iters") or whole(m, "train_samples") // max(
        whole(m, "global_batch_size", 1), 1
    )
    if entry.value and as_int(entry) < steps:
        m.note(
            f"{entry.text} ends a job before the last step, {steps}: limit the job's time instead."
        )
    m.no_effect(entry, "a job may end at any step: the same command goes on")


def retained(m: Migration, entry: Entry) -> None:
    """--save-retain-interval: others are deleted but for the last."""
    m.tell(entry, "checkpoint.keep_every", as_int(entry))
    m.tell(entry, "checkpoint.keep", 1)


def document_mask(m: Migration, entry: Entry) -> None:
    """--reset-attention-mask and --reset-position-ids, which go together here."""
    section = m.canonical(entry).rpartition(".")[0]  # NeMo has them under data
    keys = ("reset_attention_mask", "reset_position_ids")
    mask, positions = (flag(m, f"{section}.{key}" if section else key) for key in keys)
    if mask != positions:
        m.refuse(
            entry,
            "attention and positions both end with a document here, or neither",
            "Set both --reset-attention-mask and --reset-position-ids, or none",
        )
    else:
        m.tell(entry, "data.document_mask", mask)


def end_of_document_loss(m: Migration, entry: Entry) -> None:
    """--eod-mask-loss."""
    if not is_off(entry.value):
        m.note(f"{entry.text}: the token that ends a document is scored here, too.")
    m.no_effect(entry, "every token is scored")


def weights_and_biases(m: Migration, entry: Entry) -> None:
    """--wandb-project turns it on."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
        return
    trackers(m, entry, ["tensorboard", "wandb"] if m.value("tensorboard_dir") else ["wandb"])
    if_there("log.project", "the tracker has a project of its own")(m, entry)


def tensorboard(m: Migration, entry: Entry) -> None:
    """--tensorboard-dir turns it on."""
    if m.value("wandb_project"):
        m.no_effect(entry, "events are in WORKDIR/tensorboard")
    else:
        trackers(m, entry, ["tensorboard"])


# Data, checkpoints and the log, which Megatron-Bridge has in the same words.
AROUND: dict[str, Handler] = {
    "micro_batch_size": fact("per_device_batch", as_int),
    "global_batch_size": fact("global_batch", as_int),
    "rampup_batch_size": mt.ramp,
    "train_iters": fact("steps", as_int),
    "train_samples": fact("samples", as_int),
    "eval_interval": fact("eval_every", as_int),
    "eval_iters": option("eval.batches"),
    "log_interval": fact("log_every", as_int),
    "save": fact("workdir", as_text),
    "save_interval": fact("save_every", as_int),
    "save_retain_interval": retained,
    "most_recent_k": option("checkpoint.keep", lambda e: max(as_int(e), 0)),
    "load": no_effect(mt.OWN_WORKDIR),
    "finetune": begins_with_theirs,
    "pretrained_checkpoint": refuse("a checkpoint of Megatron's is not read", CONVERT),
    "use_checkpoint_args": refuse("the model's sizes are in a checkpoint of Megatron's", CONVERT),
    "async_save": option("checkpoint.async_checkpointing"),
    "exit_interval": ends_early,
    "exit_duration_in_mins": no_effect(
        "at the end of a job's time SIGTERM saves, and the next one goes on"
    ),
    "exit_signal*": no_effect("SIGTERM saves, always"),
    "seed": option("seed"),
    "random_seed": option("seed"),
    "data_path": md.prefixes,
    "split": md.splits,
    "mock_data": refuse("there are no made-up data", "Name files with --data-path"),
    "reset_attention_mask": document_mask,
    "reset_position_ids": document_mask,
    "eod_mask_loss": end_of_document_loss,
    "tensorboard_dir": tensorboard,
    "wandb_project": weights_and_biases,
    "wandb_exp_name": if_there("log.run_name", "the run is its workdir"),
    "wandb_entity": no_effect("W&B reads WANDB_ENTITY"),
    "wandb_save_dir": no_effect("its files are in WORKDIR/wandb"),
    "tokenizer_*": no_effect(md.TOKENS_ARE_READ),
    "vocab_file": no_effect(md.TOKENS_ARE_READ),
    "merge_file": no_effect(md.TOKENS_ARE_READ),
    "tiktoken_*": no_effect(md.TOKENS_ARE_READ),
    "no_use_tokenizer_model_*": no_effect(md.TOKENS_ARE_READ),
    "vocab_extra_ids": no_effect(md.TOKENS_ARE_READ),
    "make_vocab_size_divisible_by": no_effect("config.model.vocab_size is padded by it"),
    **because(
        {
            "batches are read ahead, the same ones on any number of workers": (
                "num_workers data_cache_path no_mmap_bin_files mmap_bin_files dataloader_* "
                "num_dataset_builder_threads no_create_attention_mask* create_attention_mask* "
                "data_sharding skip_getting_attention_mask* persistent_workers pin_memory"
            ),
            "the log has loss, gradient norm, rates, memory and times": (
                "log_* timing_* logging_level tensorboard_* no_one_logger one_logger_* "
                "record_memory*"
            ),
            "checkpoints are whole and sharded, and restore on any mesh": (
                "ckpt_* no_ckpt_* dist_ckpt_* auto_detect_ckpt_format use_persistent_ckpt_worker "
                "no_save_* no_load_* fully_parallel_save fully_parallel_load use_dist_ckpt "
                "async_strategy save_optim save_rng load_optim load_rng"
            ),
            "updates that are not finite are skipped, always": (
                "*check_for_nan_in_loss* check_for_large_grads check_for_nan_in_grad"
            ),
            "Python's garbage collector is no matter here": (
                "manual_gc* empty_unused_memory_level"
            ),
            "gradients are summed in float32": (
                "accumulate_allreduce_grads_in_fp32 grad_reduce_in_fp32 grad_reduce_in_bf16"
            ),
        }
    ),
}
