"""Megatron-Bridge: overrides of a recipe in Python, by its sections.

A file says what differs from the recipe that its script takes, and the recipe is not in the file: the model
is config.init_from, and the rest the recipes' common defaults. Sources: training/config.py and
recipes/common.py of src/megatron/bridge, snapshot of 2026-08.
"""

from deepseek_jax.migrate.handlers import as_bool, as_float, fact, no_effect, one_of, option, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools.megatron_lm import defaults_of_training
from deepseek_jax.migrate.tools.megatron_model import MODEL
from deepseek_jax.migrate.tools.megatron_run import AROUND
from deepseek_jax.migrate.tools.shared import need
from deepseek_jax.migrate.tracking import if_there

SECTIONS = (
    "model",
    "train",
    "validation",
    "optimizer",
    "scheduler",
    "ddp",
    "dist",
    "dataset",
    "logger",
    "tokenizer",
    "checkpoint",
    "rng",
    "mixed_precision",
    "comm_overlap",
    "profiling",
    "ft",
    "peft",
    "env_vars",
)


def canonical(key: str) -> str:
    """ "train.train_iters" -> "train_iters"; the teacher and its loss keep their sections."""
    if key == "model.kd_config" or key.startswith(("model.teacher", "model.kd_config.")):
        return key.removeprefix("model.")
    section, _, rest = key.partition(".")
    if section in ("peft", "env_vars", "profiling", "ft") or not rest:
        return key
    return rest if section in SECTIONS else key


def recognise(source: Source) -> int:
    """A train block in Megatron's words beside other sections."""
    known = (
        "train.train_iters",
        "train.global_batch_size",
        "scheduler",
        "ddp",
        "rng",
        "dist",
        "logger.log_interval",
    )
    found = source.has(*known)
    return 30 + 14 * found if source.has("train") and found >= 2 else 0


def teachers_own(m: Migration, entry: Entry) -> None:
    """The teacher is divided as the student is."""
    key = canonical(entry.key).removeprefix("teacher.")
    if key in MODEL or key in mt.PARALLEL:
        m.no_effect(entry, "the teacher is laid out over the mesh as the student is")
    else:
        m.refuse(
            entry, "a teacher is what its folder says", "Name it with --config.distill.teacher"
        )


def without_cross_entropy(m: Migration, entry: Entry) -> None:
    """kd_config.skip_lm_loss: the divergence is the whole loss."""
    if as_bool(entry):
        m.tell(entry, "distill.alpha", 1.0)
    else:
        m.no_effect(entry, "kd_loss_scale says how the two are weighted")


def scale(m: Migration, entry: Entry) -> None:
    """kd_config.kd_loss_scale: ModelOpt weighs the divergence so, relative to the cross-entropy."""
    skipped = m.entry("kd_config.skip_lm_loss")
    if skipped is not None and as_bool(skipped):
        if as_float(entry) == 1.0:
            m.no_effect(entry, "the divergence is the whole loss")
        else:
            m.refuse(
                entry, "the divergence is the whole loss, weighted by 1", "Scale the learning rate"
            )
        return
    m.refuse(
        entry,
        "the divergence is scaled to the cross-entropy at every step there, and by a constant here",
        "Set skip_lm_loss to true, or leave this out and set --config.distill.alpha",
    )


TABLE: dict[str, Handler] = {
    **MODEL,
    **mt.TRAINING,
    **AROUND,
    "teacher.*": teachers_own,
    "kd_config.skip_lm_loss": without_cross_entropy,
    "kd_config.kd_loss_scale": scale,
    "kd_config.logit_kl_temperature": option("distill.temperature"),
    "kd_config.logit_kl_topk": option("distill.top_k"),
    "kd_config.logit_layers": one_of(
        {"['output_layer', 'output_layer']": "logits are compared"},
        "the heads' logits are compared here",
        "",
    ),
    "kd_config.intermediate_layer_pairs": refuse(
        "pairs of layers are config.distill.hidden_layers here",
        "Set that, and leave this out",
        (None, "[]"),
    ),
    "mixed_precision": mt.precision,
    "num_epochs": fact("epochs", as_float),
    "skip_train": refuse("a run trains", "Set it to false"),
    "bf16": mt.flagged({"train.dtype": "bfloat16"}),
    "fp16": mt.flagged({"train.dtype": "float16"}),
    "weight_decay": no_effect("the scheduler's start_weight_decay and end_weight_decay win"),
    "mlflow_experiment": if_there("log.project", "the tracker has a project of its own"),
    "peft*": refuse("PEFT of Megatron-Bridge is Python", "Set --config.lora.r and its kin"),
    "env_vars.*": no_effect("export what begins with NCCL_; nothing else reads them here"),
    "profiling.*": no_effect("traces are taken with --config.profile.start"),
    "ft.*": no_effect("a run that hangs ends with exit code 4 or 6: see config.watchdog"),
    "recipe": no_effect("its defaults are known, and its model is config.init_from"),
}


def finish(m: Migration) -> None:
    """What recipes/common.py sets."""
    if m.entry("kd_config.skip_lm_loss") or m.entry("kd_config.kd_loss_scale"):
        m.default("objective", "distill")
        m.default("distill.alpha", 0.5)
        m.default("distill.temperature", 1.0)
        need(m, "distill.teacher", "the script names the teacher", "TEACHER")
    need(m, "init_from", "the script or its recipe names the model", "MODEL")
    need(m, "data.path", "the recipe's data are made up; name yours", "FILES")
    defaults_of_training(m)
    for name, value in {
        "global_batch": 32,
        "per_device_batch": 2,
        "sequence_length": 4096,
        "learning_rate": 3e-4,
        "min_lr": 3e-5,
        "schedule": "cosine",
        "warmup_steps": 500,
        "optimizer.b2": 0.95,
        "optimizer.weight_decay": 0.033,  # of its scheduler, which wins over the optimizer's 0.1
        "strategy": "zero1",
        "train.dtype": "bfloat16",
        "save_every": 500,
        "eval_every": 500,
        "eval.batches": 32,
        "log_every": 10,
        "seed": 1234,
        "data.split": "9999,8,2",
        "log.trackers": "tensorboard",
    }.items():
        m.default(name, value)


TOOL = Tool(
    name="bridge",
    title="Megatron-Bridge",
    recognise=recognise,
    table=TABLE,
    key=canonical,
    finish=finish,
)
