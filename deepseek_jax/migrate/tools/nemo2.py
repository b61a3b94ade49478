"""NeMo 2: the YAML that nemo_run writes of a recipe, with the class of each part under `_target_`.

Sources: nemo/lightning and nemo/collections/llm/recipes of NeMo 2, snapshot of 2025-09.
"""

import re

from deepseek_jax.migrate.handlers import as_int, as_text, fact, no_effect, option, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import megatron_data as md
from deepseek_jax.migrate.tools import megatron_lm, megatron_run, nemo
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools.megatron_handlers import flag, whole
from deepseek_jax.migrate.tools.megatron_model import MODEL, finish_model
from deepseek_jax.migrate.tools.shared import need

SECTIONS = ("model.config.", "trainer.strategy.ddp.", "trainer.strategy.", "optim.config.")
UNASKED = tuple(u for u in nemo.UNASKED if u[0] in ("hidden_dropout", "attention_dropout")) + (
    ("normalization", "LayerNorm", "layers are normed by RMSNorm here", "Set it to RMSNorm"),
    ("gated_linear_unit", "False", "MLPs are SwiGLU here", "Set it to true"),
    ("add_bias_linear", "True", "linear maps have no biases here", "Set it to false"),
    ("position_embedding_type", "learned_absolute", "positions are rotary here", "Set it to rope"),
)


def canonical(key: str) -> str:
    """ "trainer.plugins.0.precision" -> "trainer.plugins.precision"; without sections."""
    if key == "model.config._target_":
        return "_class_"
    for section in SECTIONS:
        key = key.removeprefix(section)
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def recognise(source: Source) -> int:
    """A trainer and a model that are classes of NeMo's."""
    classes = str(source.value("trainer._target_", "")) + str(source.value("model._target_", ""))
    return 100 if "nemo.collections" in classes or "nemo.lightning" in classes else 0


def paths(m: Migration, entry: Entry) -> None:
    """data.paths: as Megatron's data_path."""
    md.prefixes(m, entry)


def checkpoint(m: Migration, entry: Entry) -> None:
    """resume.restore_config.path, and the like."""
    m.refuse(entry, "a checkpoint of NeMo's is not read", megatron_run.CONVERT)


def data_class(m: Migration, entry: Entry) -> None:
    """data._target_."""
    if "Mock" in as_text(entry):
        m.refuse(entry, "there are no made-up data", "Name files with --config.data.path")
    elif "PreTraining" in as_text(entry):
        m.no_effect(entry, "documents of token ids")
    else:
        m.refuse(entry, "this data module is Python", "Write its examples as JSONL (docs/data.md)")


def model_class(m: Migration, entry: Entry) -> None:
    """model.config._target_: a class of one model has sizes of its own, in Python."""
    name = as_text(entry).rpartition(".")[2]
    if name in ("GPTConfig", "TransformerConfig", "MLATransformerConfig"):
        m.no_effect(entry, "its fields stand beside it")
    else:
        m.refuse(
            entry,
            f"{name} has sizes and routing of its own, in Python",
            "Write its fields beside it (or name a checkpoint by --config.init_from), and allow this",
        )


def scheduler_class(m: Migration, entry: Entry) -> None:
    """optim.lr_scheduler._target_."""
    if as_text(entry).endswith("CosineAnnealingScheduler"):
        m.tell(entry, "schedule", "cosine")
    else:
        m.refuse(entry, "there is no such schedule", "Set it to CosineAnnealingScheduler")


TABLE: dict[str, Handler] = {
    **MODEL,
    **mt.TRAINING,
    **megatron_run.AROUND,
    **nemo.words.TRAINER,
    "trainer.plugins.precision": mt.precision,
    "trainer.plugins.*": no_effect("gradients are summed in float32"),
    "trainer.callbacks*": no_effect("it is Lightning's, and changes no number"),
    "activation_func": no_effect("gated_linear_unit says so"),
    "bf16": no_effect("trainer.plugins.precision says so"),
    "fp16": no_effect("trainer.plugins.precision says so"),
    "ddp": no_effect("use_distributed_optimizer says what is divided"),
    "_class_": model_class,
    "optim.lr_scheduler._target_": scheduler_class,
    "optim.lr_scheduler.warmup_steps": fact("warmup_steps"),
    "optim.lr_scheduler.constant_steps": fact("hold_steps", as_int),
    "optim.lr_scheduler.min_lr": fact("min_lr"),
    "optim.lr_scheduler.max_steps": fact("schedule_steps", as_int),
    "optim.lr_scheduler.*": no_effect("the schedule steps with the optimizer"),
    "data._target_": data_class,
    "data.paths": paths,
    "data.split": md.splits,
    "data.seq_length": fact("sequence_length", as_int),
    "data.micro_batch_size": fact("per_device_batch", as_int),
    "data.global_batch_size": fact("global_batch", as_int),
    "data.seed": option("seed"),
    "data.*": no_effect("batches are read ahead, in an order that follows from the seed"),
    "tokenizer": no_effect(md.TOKENS_ARE_READ),
    "resume.restore_config.path": checkpoint,
    "resume.restore_config*": no_effect("resume.restore_config.path says so"),
    "resume.*": no_effect("the same command goes on from --workdir"),
    "log.log_dir": fact("workdir", as_text),
    "log.ckpt.save_top_k": option("checkpoint.keep_best", lambda e: max(as_int(e), 0)),
    "log.ckpt.every_n_train_steps": fact("save_every", as_int),
    "log.ckpt.*": no_effect("checkpoints are named by their step"),
    "log.*": no_effect("--workdir names the run"),
    "peft*": refuse("PEFT of NeMo 2 is Python", "Set --config.lora.r and its kin"),
    "*_target_": no_effect("the class of what stands beside it"),
    "_target_": no_effect("the class of what stands beside it"),
    "*_partial_": no_effect("the class of what stands beside it"),
    "_partial_": no_effect("the class of what stands beside it"),
}


def finish(m: Migration) -> None:
    """Its defaults."""
    finish_model(m, UNASKED)
    megatron_lm.vocabulary(m, nemo.VOCABULARIES, whole(m, "make_vocab_size_divisible_by", 128))
    megatron_lm.defaults_of_training(m)
    warmup, peak = whole(m, "optim.lr_scheduler.warmup_steps"), m.told_of("learning_rate")
    if warmup and peak and not whole(m, "optim.lr_scheduler.constant_steps"):
        m.default("warmup_init", peak / (warmup + 1))
    if flag(m, "multi_latent_attention") and m.value("rotary_scaling_factor") is None:
        m.default("model.rope_scaling.type", "yarn")  # MLATransformerConfig's own
        m.default("model.rope_scaling.factor", 40.0)
        m.default("model.rope_scaling.mscale", 1.0)
    if flag(m, "use_distributed_optimizer", default=True):
        m.default("strategy", "zero1")
    m.default("model.tie_word_embeddings", True)
    m.default("schedule", "cosine")
    m.default("train.dtype", "bfloat16")
    m.default("seed", 1234)
    m.default("log.trackers", "tensorboard")
    if not m.value("data.paths"):
        need(m, "data.path", "data.paths is not given", "FILES")


TOOL = Tool(
    name="nemo2",
    title="NeMo 2",
    recognise=recognise,
    table=TABLE,
    family="nemo2",
    key=canonical,
    finish=finish,
)
