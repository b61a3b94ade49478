"""Distillation: from which teacher, on what data, by which loss."""

from dataclasses import dataclass

from deepseek_jax.config.option import Alias, option

SCHEDULES = {
    "constant": "its value at all steps",
    "linear": "to its final value at the last step, evenly",
    "cosine": "so too, slowly at both ends",
}

SCHEDULED = ("alpha", "temperature", "beta")  # each with NAME_schedule and NAME_final


@dataclass(frozen=True)
class DistillConfig:
    """A student learns from a teacher's probabilities (objective=distill):
    loss = (1 - alpha) x cross-entropy + alpha x temperature^2 x divergence, means over the scored tokens."""

    # ---- the teacher
    teacher: str = option(
        "",
        "Folder of the teacher: a Hugging Face checkpoint, or the workdir of a run, of which the newest "
        "checkpoint is taken.",
        path=True,
        on_resume="free",
        aliases={
            "hf": ("teacher_model_name_or_path", "teacher_model"),
            "mfc": "teacher.model_path",
        },
    )
    teacher_dtype: str = option(
        "",
        "What its matrices are held in; router and norms: float32. Empty: train.dtype.",
        choices={
            "": "train.dtype",
            "float32": "",
            "bfloat16": "",
            "int8": "symmetric, one scale for each output channel; embedding and head: bfloat16",
        },
        on_resume="free",
    )
    cache: str = option(
        "",
        "Folder of a teacher's cached logits (python -m deepseek_jax.distill cache), in place of the "
        "teacher.",
        path=True,
        on_resume="free",
        aliases=[
            Alias(
                mfc=("teacher.cache_dir", "teacher.use_cached_logits"),
                note="made by a command of its own; one of other data, tokenizer or packing is refused "
                "(there it is known by row numbers alone)",
            )
        ],
    )
    data: str = option(
        "auto",
        "What data.path holds.",
        choices={
            "auto": "by its first row",
            "text": "documents, packed as in pretraining; all tokens are scored",
            "examples": "chats and the like, as config.sft reads and packs them",
        },
        on_resume="new pass",
    )

    # ---- the loss
    alpha: float = option(
        0.5,
        "Share of the divergence in the loss.",
        at_least=0,
        at_most=1,
        special={0: "cross-entropy alone"},
        example=0.5,
        on_resume="free",
        aliases=[
            Alias(nemo="kd_loss_scale", note="there added to the whole cross-entropy"),
            Alias(mfc="loss.alpha"),
        ],
    )
    alpha_schedule: str = option(
        "constant", "How alpha changes over the steps.", choices=SCHEDULES, on_resume="free"
    )
    alpha_final: float = option(
        0.5, "alpha at the last step.", at_least=0, at_most=1, example=0.5, on_resume="free"
    )
    temperature: float = option(
        2.0,
        "Divides the logits of both before their softmax; the divergence is multiplied by its square.",
        above=0,
        example=2.0,
        on_resume="free",
        aliases=[
            Alias(
                nemo="logit_kl_temperature",
                hf="temperature",
                note="TRL leaves the square out: there multiply alpha's share by it",
            ),
            Alias(mfc="loss.temperature"),
        ],
    )
    temperature_schedule: str = option(
        "constant", "How temperature changes over the steps.", choices=SCHEDULES, on_resume="free"
    )
    temperature_final: float = option(
        1.0, "temperature at the last step.", above=0, example=1.0, on_resume="free"
    )
    beta: float = option(
        0.0,
        "Which divergence.",
        at_least=0,
        at_most=1,
        special={
            0: "KL(teacher || student)",
            1: "KL(student || teacher)",
        },
        example=0.5,
        on_resume="free",
        aliases=[
            Alias(hf="beta", note="between 0 and 1 the generalized Jensen-Shannon divergence")
        ],
    )
    beta_schedule: str = option(
        "constant", "How beta changes over the steps.", choices=SCHEDULES, on_resume="free"
    )
    beta_final: float = option(
        0.0, "beta at the last step.", at_least=0, at_most=1, example=0.0, on_resume="free"
    )
    top_k: int = option(
        0,
        "Take so many of the teacher's likeliest words, by logits of float16 as a cache has them.",
        unit="words",
        at_least=0,
        special={0: "the full vocabulary; of a cache: all that it has"},
        example=64,
        on_resume="free",
        aliases=[
            Alias(nemo="logit_kl_topk", hf="loss_top_k"),
            Alias(
                mfc="teacher.generation.top_k",
                note="the rest of the vocabulary is one word more (`tail`); there it has logits of -1e4, "
                "which makes the teacher surer than it is",
            ),
        ],
    )
    tail: str = option(
        "bucket",
        "What becomes of the words outside top_k.",
        choices={
            "bucket": "all of them are one word more, of both, with the exact rest",
            "renormalise": "left out, of both: what the student gives them costs nothing",
        },
        synonyms={"renormalize": "renormalise"},
        on_resume="free",
        aliases=[
            Alias("bucket", hf="loss_add_tail: true"),
            Alias("renormalise", hf="loss_add_tail: false"),
        ],
    )

    # ---- what else the student takes over
    hidden_weight: float = option(
        0.0,
        "Weight of the distance between hidden states of the two.",
        at_least=0,
        special={0: "off"},
        example=1.0,
        on_resume="free",
    )
    hidden_layers: str = option(
        "",
        "Pairs of layers STUDENT:TEACHER, as 2:4,5:11, counted from 0; empty: all of the student's, by the "
        "map of what was compressed, or spread evenly over the teacher's.",
        on_resume="free",
    )
    hidden_loss: str = option(
        "cosine",
        "The distance between hidden states.",
        choices={"cosine": "1 - cosine of the angle", "mse": "mean of the squared differences"},
        on_resume="free",
    )
    router_weight: float = option(
        0.0,
        "Weight of the KL divergence between the routers, over the teacher's experts that the student kept.",
        at_least=0,
        special={0: "off"},
        example=0.01,
        on_resume="free",
    )
    map: str = option(
        "",
        "Path of compression.json, which says what of the teacher the student's layers and experts are; "
        "empty: that of init_from, if it has one.",
        path=True,
        on_resume="free",
    )

    # ---- one after the other
    stages: str = option(
        "",
        "Stages of the run, one after the other, with any objective: a JSON list of {name, epochs or steps, "
        "lr_multipliers, learning_rate}, as text, the path of a file, or dicts in a config file. Each has "
        "weights that learn, a schedule and an optimizer of its own; how long they are is how long the run "
        "is, whatever train.steps and train.epochs say. Empty: one.",
        path=True,
        or_text=True,
        json=True,
        aliases=[
            Alias(
                mfc=("stages.configs", "stages.enabled", "stage_name", "num_epochs"),
                note="each with a schedule over its own steps (there the second has none, and what the first "
                "froze stays frozen); a run resumes inside them",
            )
        ],
    )

    @property
    def tail_kind(self) -> str:
        """tail, by its first name."""
        return "bucket" if self.tail == "bucket" else "renormalise"

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Those of alpha, temperature and beta that change over the steps."""
        return tuple(n for n in SCHEDULED if getattr(self, f"{n}_schedule") != "constant")
