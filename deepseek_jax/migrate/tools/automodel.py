"""NeMo AutoModel: YAML with `recipe`, `step_scheduler`, `distributed`, and classes under `_target_`.

Sources: nemo_automodel/recipes/llm/train_ft.py, components/training/step_scheduler.py, components/optim and
components/distributed/config.py, snapshot of 2026-08.
"""

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
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import megatron_data as md
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools import trl_arguments
from deepseek_jax.migrate.tools.nemo_words import betas
from deepseek_jax.migrate.tools.shared import NO_FP8, hub_data
from deepseek_jax.migrate.tracking import if_there

CLASS = "the class of what stands beside it"
COLUMNS = "Write its examples as JSONL (docs/data.md), and name them with --config.data.path"
OPTIMIZERS = {
    "Adam": "adamw",
    "AdamW": "adamw",
    "FusedAdam": "adamw",
    "Muon": "muon",
    "SGD": "sgd",
}


def recognise(source: Source) -> int:
    """Its recipes and its batch."""
    if source.has("step_scheduler"):
        return 100
    return 100 if "nemo_automodel" in str(source.value("model._target_", "")) else 0


def strategy(m: Migration, entry: Entry) -> None:
    """distributed.strategy. FSDP2 keeps a layer's weights gathered unless pipelined or told otherwise."""
    name = as_text(entry).lower()
    told = {"fsdp2": "full_shard", "megatron_fsdp": "full_shard", "ddp": "no_shard"}.get(name)
    if told is None:
        m.refuse(entry, "there is no such strategy", "Set it to fsdp2 or ddp")
    else:
        m.tell(entry, "strategy", told)


def optimizer(m: Migration, entry: Entry) -> None:
    """optimizer._target_. torch's Adam adds its decay to the gradient, which AdamW does not."""
    name = as_text(entry).rpartition(".")[2]
    decay = m.entry("optimizer.weight_decay")
    if name not in OPTIMIZERS:
        m.refuse(entry, "there is no such optimizer", f"Choose of {', '.join(OPTIMIZERS)}")
    elif name == "Adam" and decay is not None and as_float(decay):
        m.refuse(
            entry,
            "weight decay is AdamW's here, and not in the gradient",
            "Set it to torch.optim.AdamW",
        )
    else:
        m.tell(entry, "optimizer.name", OPTIMIZERS[name])


def model_class(m: Migration, entry: Entry) -> None:
    """model._target_: weights of a checkpoint, or random ones of its sizes."""
    name = as_text(entry)
    if name.endswith("from_pretrained"):
        m.no_effect(entry, "the weights of config.init_from")
    elif name.endswith("from_config"):
        m.refuse(
            entry,
            "init_from brings weights, and theirs are random",
            "Take the model's sizes from a config in configs/ to train anew",
        )
    else:
        m.refuse(
            entry,
            "a model that is built in Python has no config.json",
            "Name a folder with --config.init_from",
        )


def data_class(m: Migration, entry: Entry) -> None:
    """dataset._target_: what is read."""
    name = as_text(entry).rpartition(".")[2]
    if "mock" in as_text(entry).lower():
        m.refuse(entry, "there are no made-up data", "Name files with --config.data.path")
    elif name in ("MegatronPretraining", "NanogptDataset"):
        m.tell(entry, "objective", "pretrain")
    elif name == "ChatDataset":
        m.tell(entry, "objective", "sft")
    else:
        m.refuse(entry, f"{name} is Python", COLUMNS)


def data_paths(m: Migration, entry: Entry) -> None:
    """Files of token ids or of chats, or the id of a data set."""
    hub_data(m, entry, [as_text(entry)])


def shares(m: Migration, entry: Entry) -> None:
    """dataset.split: of Megatron's files shares of the documents; else a part of a data set."""
    if "Megatron" in str(m.value("dataset._target_")):
        md.splits(m, entry)
    else:
        m.no_effect(entry, "the files of config.data.path are what is trained on")


def rows(m: Migration, entry: Entry) -> None:
    """packed_sequence.packed_sequence_size: 0 is one example a row."""
    size = as_int(entry) if entry.value is not None else 0
    if size:
        m.tell(entry, "sequence_length", size)
        m.tell(entry, "sft.packing", "bfd")
    else:
        m.tell(entry, "unpacked", True)


def checkpointing(m: Migration, entry: Entry) -> None:
    """checkpoint.enabled."""
    if is_off(entry.value):
        m.tell(entry, "save_when", "no")
    else:
        m.no_effect(entry, "step_scheduler.ckpt_every_steps says how often")


def recompute(m: Migration, entry: Entry) -> None:
    """distributed.activation_checkpointing: a switch, full or selective."""
    if str(entry.value).lower() == "selective":
        m.tell(entry, "train.remat", "dots")
    else:
        m.tell(entry, "train.remat", "none" if is_off(entry.value) else "full")


def loss(m: Migration, entry: Entry) -> None:
    """loss_fn._target_: cross-entropy in any of its kernels."""
    if any(name in as_text(entry) for name in ("CrossEntropy", "cross_entropy")):
        m.no_effect(entry, "the loss is cross-entropy, computed in chunks of the vocabulary")
    else:
        m.refuse(entry, "there is no such loss", "Set it to MaskedCrossEntropy")


TABLE: dict[str, Handler] = {
    "recipe": one_of(
        {
            name: "it trains the next token"
            for name in (
                "TrainFinetuneRecipeForNextTokenPrediction",
                "BenchmarkingRecipeForNextTokenPrediction",
                "nemo_automodel.recipes.llm.train_ft.TrainFinetuneRecipeForNextTokenPrediction",
            )
        },
        "this recipe is not one of the next token",
        "See configs/post for what there is",
    ),
    "seed": option("seed"),
    "rng.seed": option("seed"),
    "rng.*": no_effect("all numbers follow from the seed"),
    "step_scheduler.global_batch_size": fact("global_batch", as_int),
    "step_scheduler.local_batch_size": fact("per_device_batch", as_int),
    "step_scheduler.max_steps": fact("steps", as_int),
    "step_scheduler.num_epochs": fact("epochs"),
    "step_scheduler.ckpt_every_steps": fact("save_every", as_int),
    "step_scheduler.val_every_steps": fact("eval_every", as_int),
    "step_scheduler.log_remote_every_steps": fact("log_every", as_int),
    "step_scheduler.*": no_effect("a run saves at its end and when it is told to stop"),
    "distributed.strategy": strategy,
    "distributed._target_": no_effect(CLASS),
    "distributed.tp_size": fact("tensor", as_int),
    "distributed.pp_size": fact("stage", as_int),
    "distributed.ep_size": fact("expert", as_int),
    "distributed.cp_size": fact("context", as_int),
    "distributed.dp_size": no_effect("it is what the other sizes leave"),
    "distributed.dp_replicate_size": fact("replicas", as_int),
    "distributed.sequence_parallel": no_effect(
        "XLA divides what lies between tensor parallel maps"
    ),
    "distributed.activation_checkpointing": recompute,
    "distributed.moe.*": no_effect(
        "experts are divided over mesh.expert, and recomputed as the rest"
    ),
    "distributed.pipeline.*": no_effect(
        "stages are visited in turn, by the micro-batches of a step"
    ),
    "distributed.*": no_effect(mt.OVERLAP),
    "dist_env.*": no_effect("train.py finds the processes and waits --cluster_timeout seconds"),
    "model._target_": model_class,
    "model.pretrained_model_name_or_path": trl_arguments.model,
    "model.config.pretrained_model_name_or_path": trl_arguments.model,
    "model.config._target_": no_effect(CLASS),
    "model.backend.fake_balanced_gate": refuse(
        "the router decides here; a benchmark may not",
        "Set it to false, or use python -m benchmarks",
    ),
    "model.backend.*": no_effect(mt.XLA),
    "model.torch_dtype": no_effect("weights are float32, and computation has train.dtype"),
    "model.trust_remote_code": no_effect("no code of a checkpoint's is run"),
    "model.*": no_effect(mt.XLA),
    "checkpoint.enabled": checkpointing,
    "checkpoint.checkpoint_dir": fact("workdir", as_text),
    "checkpoint.restore_from": refuse(
        "a checkpoint of AutoModel's is not read", "Export it, and set init_from"
    ),
    "checkpoint.*": no_effect("checkpoints are whole and sharded, and restore on any mesh"),
    "loss_fn._target_": loss,
    "loss_fn.*": no_effect("the loss is computed in float32"),
    "clip_grad_norm.max_norm": option("optimizer.grad_clip"),
    "optimizer._target_": optimizer,
    "optimizer.lr": fact("learning_rate"),
    "optimizer.betas": betas,
    "optimizer.eps": option("optimizer.eps"),
    "optimizer.weight_decay": option("optimizer.weight_decay"),
    "optimizer.*": no_effect(
        "moments are float32, or bfloat16 with --config.optimizer.moment_dtype"
    ),
    **{f"lr_scheduler.{key}": handler for key, handler in mt.SCHEDULE.items()},
    "lr_scheduler.init_lr": fact("warmup_init"),
    "lr_scheduler.max_lr": fact("learning_rate"),
    "lr_scheduler.wsd_decay_steps": fact("decay_steps", as_int),
    "lr_scheduler.lr_warmup_steps": fact("warmup_steps", as_int),
    "lr_scheduler.lr_decay_steps": fact("schedule_steps", as_int),
    "lr_scheduler._target_": no_effect(CLASS),
    "dataset._target_": data_class,
    "dataset.paths": md.prefixes,
    "dataset.file_pattern": data_paths,
    "dataset.path_or_dataset_id": data_paths,
    "dataset.dataset_name": data_paths,
    "dataset.split": shares,
    "dataset.seq_len": fact("sequence_length", as_int),
    "dataset.seq_length": fact("sequence_length", as_int),
    "dataset.*": no_effect("the files of config.data.path are what is trained on"),
    "packed_sequence.packed_sequence_size": rows,
    "packed_sequence.*": no_effect("rows are packed whole, the longest first"),
    "validation_*": no_effect("a share of the data is held out (config.data.eval_fraction)"),
    "dataloader.dataset._target_": no_effect(CLASS),
    "dataloader.*": no_effect("batches are read ahead, in an order that follows from the seed"),
    "peft.dim": option("lora.r"),
    "peft.alpha": option("lora.alpha"),
    "peft.dropout": option("lora.dropout"),
    "peft.match_all_linear": neutral(
        {True: ""}, "name the weights with --config.lora.target_modules"
    ),
    "peft.target_modules": option("lora.target_modules"),
    "peft.*": no_effect("A begins random and B at zero, as in PEFT"),
    "wandb.project": if_there("log.project", "W&B reads WANDB_PROJECT"),
    "wandb.name": if_there("log.run_name", "W&B reads WANDB_NAME"),
    "wandb.*": no_effect("W&B reads its own environment variables"),
    "mlflow.experiment_name": if_there("log.project", "MLflow reads MLFLOW_EXPERIMENT_NAME"),
    "mlflow.*": no_effect("MLflow reads its own environment variables"),
    "fp8*": refuse(NO_FP8, "Leave fp8 out"),
    "quantization*": refuse("a base in few bits is --config.lora.base_dtype here", "Leave it out"),
    "compile.*": no_effect("XLA compiles everything"),
    "benchmark.*": no_effect("python -m benchmarks measures"),
    "ci.*": no_effect("it is of AutoModel's tests"),
    "_*": no_effect("what begins with _ is left out there as well"),
    "nvtx": no_effect("traces are taken with --config.profile.start"),
    "slurm.*": no_effect("see python -m deepseek_jax.launch"),
}


def finish(m: Migration) -> None:
    """Its defaults."""
    scheduled = any(m.entry(key) for key in TABLE if key.startswith("lr_scheduler."))
    peak, steps = m.told_of("learning_rate"), m.told_of("steps")
    if scheduled:
        m.default("schedule", "cosine")
        if peak:
            m.default("min_lr", 0.01 * peak)
            m.default("warmup_init", 0.1 * peak)
        m.default("warmup_steps", min(1000, int(steps) // 10) if steps else 0.1)
    else:
        m.default("schedule", "constant")
    for name, value in {
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.999,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.0,
        "optimizer.grad_clip": 1.0,
        "per_device_batch": 1,
        "strategy": "full_shard",
        "train.dtype": "bfloat16",
        "train.remat": "none",
        "seed": 42,
        "save_when": "steps",
        "log_every": 1,
        "moe.bias_update_rate": 0.0,
        "hf_aux_coef": 0.0,
        "log.trackers": "mlflow"
        if m.entry("mlflow.experiment_name")
        else "wandb"
        if m.entry("wandb.project")
        else "",
    }.items():
        m.default(name, value)
    m.note(
        "AutoModel trains weights of the dtype that they are loaded in, bfloat16 unless model.torch_dtype "
        "says otherwise; here they are float32."
    )
    if m.told_of("objective") == "sft":
        m.default("sft.packing", "none")
        m.default("unpacked", True)
    if m.told_of("eval_every") is None:
        m.default("eval_when", "no")
    else:
        m.default("data.eval_fraction", 0.01)


TOOL = Tool(
    name="automodel",
    title="NeMo AutoModel",
    recognise=recognise,
    table=TABLE,
    finish=finish,
)
