"""NeMo's words around the model: Lightning's trainer, the experiment manager, optimizer and data.

Sources: examples/nlp/language_modeling/conf and nemo/core/optim/lr_scheduler.py of NeMo 1 and 2.
"""

from collections.abc import Mapping

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
from deepseek_jax.migrate.tools import megatron_data as md
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools.megatron_run import CONVERT, document_mask, end_of_document_loss
from deepseek_jax.migrate.tracking import if_there, trackers

LIGHTNING = "it is Lightning's, and changes no number"
DISTRIBUTED = ("distributed_fused_adam", "mcore_distributed_optim")
TRACKERS = {
    "exp_manager.create_wandb_logger": "wandb",
    "exp_manager.create_mlflow_logger": "mlflow",
    "exp_manager.create_clearml_logger": "clearml",
    "exp_manager.create_tensorboard_logger": "tensorboard",
}


def strategy(m: Migration, entry: Entry) -> None:
    """trainer.strategy: ddp divides nothing; Megatron's strategies say so elsewhere."""
    name = as_text(entry).lower()
    if not is_off(m.value("fsdp")) or str(m.value("optim.name")) in DISTRIBUTED:
        m.no_effect(entry, "model.fsdp and optim.name say what is divided")
    elif name in ("ddp", "nlp_ddp", "megatron", "auto", ""):
        m.tell(entry, "strategy", "no_shard")
    elif name.startswith("fsdp"):
        m.tell(entry, "strategy", "full_shard")
    else:
        m.refuse(entry, "there is no such strategy", "Set it to ddp or fsdp")


def evaluation_batches(m: Migration, entry: Entry) -> None:
    """trainer.limit_val_batches: a count, or a share of them."""
    value = as_float(entry)
    if isinstance(entry.value, float) and value <= 1.0:
        if value < 1.0:
            m.note(
                f"{entry.text} is a share of the held-out batches: here it is eval.batches at most."
            )
        m.no_effect(entry, "config.eval.batches is a number of batches")
    else:
        m.tell(entry, "eval.batches", int(value))


def clock(m: Migration, entry: Entry) -> None:
    """trainer.max_time, run.time_limit: the job's."""
    m.no_effect(entry, "limit the job's time: SIGTERM saves, and the same command goes on")


def micro_batches_by_itself(m: Migration, entry: Entry) -> None:
    """trainer.accumulate_grad_batches, which NeMo says not to change."""
    m.no_effect(entry, "NeMo takes micro-batches from global_batch_size and micro_batch_size")


def tracker(m: Migration, entry: Entry) -> None:
    """exp_manager.create_*_logger: of all that are on."""
    on = [name for key, name in TRACKERS.items() if key in _on(m)]
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
    else:
        trackers(m, entry, sorted(on))


def _on(m: Migration) -> set[str]:
    return {key for key in TRACKERS if not is_off(m.value(key))}


def of_tracker(key: str, handler: Handler) -> Handler:
    """What is of a tracker that may be off."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_off(m.value(key)):
            m.no_effect(entry, f"{key.rpartition('.')[2]} is off")
        else:
            handler(m, entry)

    return handle


def best(m: Migration, entry: Entry) -> None:
    """checkpoint_callback_params.save_top_k: by the held-out loss."""
    prefix = "exp_manager.checkpoint_callback_params"
    monitor = str(m.value(f"{prefix}.monitor", "val_loss"))
    count = as_int(entry)
    if count < 0:
        m.tell(entry, "checkpoint.keep", 0)
    elif "loss" not in monitor.replace("${", "loss"):
        m.refuse(
            entry, f"the best are those of lowest held-out loss here, and not of {monitor}", ""
        )
    else:
        m.tell(entry, "checkpoint.keep_best", count)


def schedule_name(m: Migration, entry: Entry) -> None:
    """optim.sched.name."""
    name = {
        "CosineAnnealing": "cosine",
        "WarmupPolicy": "constant_with_warmup",
        "PolynomialDecayAnnealing": "polynomial",
        "InverseSquareRootAnnealing": "inverse_sqrt",
        "WarmupAnnealing": "linear",
    }.get(as_text(entry))
    if name is None:
        m.refuse(entry, "there is no such schedule", "Set it to CosineAnnealing")
    else:
        m.tell(entry, "schedule", name)


def folder(m: Migration, entry: Entry) -> None:
    """exp_manager.exp_dir: unless explicit_log_dir names the folder itself."""
    if is_off(entry.value) or not is_off(m.value("exp_manager.explicit_log_dir")):
        m.no_effect(entry, "explicit_log_dir says so")
    else:
        m.tell(entry, "workdir", as_text(entry))


def betas(m: Migration, entry: Entry) -> None:
    """optim.betas."""
    if isinstance(entry.value, list) and len(entry.value) == 2:
        m.tell(entry, "optimizer.b1", float(entry.value[0]))
        m.tell(entry, "optimizer.b2", float(entry.value[1]))
    else:
        m.refuse(entry, "it is not two numbers", "Write [0.9, 0.95]")


def optimizer(m: Migration, entry: Entry) -> None:
    """optim.name: the distributed ones divide their state as ZeRO 1."""
    name = as_text(entry)
    if name in DISTRIBUTED:
        if is_off(m.value("fsdp")):
            m.tell(entry, "strategy", "zero1")
    elif name not in ("fused_adam", "adamw", "megatron_fused_adam"):
        m.refuse(entry, "there is no such optimizer", "Set it to fused_adam")
        return
    m.tell(entry, "optimizer.name", "adamw")


def fsdp(m: Migration, entry: Entry) -> None:
    """model.fsdp."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
        return
    kinds = {"full": "full_shard", "hybrid": "hybrid_shard", "grad": "shard_grad_op"}
    m.tell(
        entry, "strategy", kinds.get(str(m.value("fsdp_sharding_strategy", "full")), "full_shard")
    )


TRAINER: Mapping[str, Handler] = {
    "trainer.devices": fact("gpus_per_node", as_int),
    "trainer.num_nodes": fact("nodes", as_int),
    "trainer.precision": mt.precision,
    "precision": mt.precision,
    "trainer.strategy": strategy,
    "trainer.max_steps": fact("steps", as_int),
    "trainer.max_epochs": fact("epochs", lambda e: max(as_float(e), 0.0)),
    "trainer.max_time": clock,
    "trainer.val_check_interval": fact("eval_every"),
    "trainer.limit_val_batches": evaluation_batches,
    "trainer.log_every_n_steps": fact("log_every"),
    "trainer.gradient_clip_val": option("optimizer.grad_clip"),
    "trainer.accumulate_grad_batches": micro_batches_by_itself,
    "trainer.accelerator": neutral(
        {"gpu": "", "auto": "", "cuda": "", "cpu": "set JAX_PLATFORMS=cpu"}, "no such device"
    ),
    "trainer.*": no_effect(LIGHTNING),
}

EXPERIMENT: Mapping[str, Handler] = {
    "exp_manager.explicit_log_dir": fact("workdir", as_text),
    "exp_manager.exp_dir": folder,
    "exp_manager.name": no_effect("--workdir names the run"),
    "exp_manager.resume_from_checkpoint": refuse(
        "a checkpoint of NeMo's is not read", CONVERT, (None, "")
    ),
    **{key: tracker for key in TRACKERS},
    "exp_manager.wandb_logger_kwargs.project": of_tracker(
        "exp_manager.create_wandb_logger",
        if_there("log.project", "the tracker has a project of its own"),
    ),
    "exp_manager.wandb_logger_kwargs.name": of_tracker(
        "exp_manager.create_wandb_logger", if_there("log.run_name", "the run is its workdir")
    ),
    "exp_manager.mlflow_logger_kwargs.experiment_name": of_tracker(
        "exp_manager.create_mlflow_logger",
        if_there("log.project", "the tracker has a project of its own"),
    ),
    "exp_manager.*_logger_kwargs.*": no_effect(
        "the tracker's own environment variables say the rest"
    ),
    "exp_manager.create_neptune_logger": refuse(
        "there is no tracker for Neptune", "Set it to false"
    ),
    "exp_manager.create_dllogger_logger": refuse("there is no DLLogger", "Set it to false"),
    "exp_manager.create_early_stopping_callback": refuse(
        "a run ends after its steps", "Set it to false, and watch the held-out loss"
    ),
    "exp_manager.early_stopping_callback_params.*": no_effect("a run ends after its steps"),
    "exp_manager.checkpoint_callback_params.save_top_k": best,
    "exp_manager.checkpoint_callback_params.every_n_train_steps": fact("save_every", as_int),
    "exp_manager.checkpoint_callback_params.async_save": option("checkpoint.async_checkpointing"),
    "exp_manager.checkpoint_callback_params.mode": neutral(
        {"min": ""}, "the best have the lowest loss"
    ),
    "exp_manager.checkpoint_callback_params.*": no_effect("checkpoints are named by their step"),
    "exp_manager.*": no_effect("the same command goes on from --workdir"),
}

OPTIM: Mapping[str, Handler] = {
    "optim.name": optimizer,
    "optim.lr": fact("learning_rate"),
    "optim.weight_decay": option("optimizer.weight_decay"),
    "optim.betas": betas,
    "optim.eps": option("optimizer.eps"),
    "optim.sched.name": schedule_name,
    "optim.sched.warmup_steps": fact("warmup_steps"),
    "optim.sched.warmup_ratio": fact("warmup_fraction"),
    "optim.sched.min_lr": fact("min_lr"),
    "optim.sched.max_steps": fact("schedule_steps", as_int),
    "optim.sched.constant_steps": fact("hold_steps", as_int),
    "optim.sched.power": fact("power"),
    "optim.sched.last_epoch": neutral({-1: ""}, "a schedule begins at step 0"),
    "optim.sched.reduce_on_plateau": refuse("schedules do not look at the loss", "Set it to false"),
    "optim.sched.monitor": no_effect("schedules do not look at the loss"),
    "optim.grad_sync_dtype": no_effect(
        "gradients are reduced in the compute dtype, and summed in float32"
    ),
    "optim.*": no_effect(mt.OVERLAP),
}

DATA: Mapping[str, Handler] = {
    "data.data_prefix": md.prefixes,
    "data.splits_string": md.splits,
    "data.seq_length": fact("sequence_length", as_int),
    "data.reset_attention_mask": document_mask,
    "data.reset_position_ids": document_mask,
    "data.eod_mask_loss": end_of_document_loss,
    "data.data_impl": one_of(
        {"mmap": "files of token ids are mapped into memory"},
        "data are files of token ids here",
        "Set it to mmap",
    ),
    "data.*": no_effect("batches are read ahead, in an order that follows from the seed"),
    "tokenizer.*": no_effect(md.TOKENS_ARE_READ),
}
