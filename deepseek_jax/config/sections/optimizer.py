"""The optimizer: its update (update.py), its learning rate and their schedule."""

from dataclasses import dataclass

from deepseek_jax.config.option import Alias, option
from deepseek_jax.config.sections.update import UpdateOptions


@dataclass(frozen=True)
class OptimizerConfig(UpdateOptions):
    """The update, its learning rate and their schedule."""

    schedule: str = option(
        "cosine",
        "Learning rate over the steps, after the warmup.",
        choices={
            "constant": "",
            "cosine": "",
            "linear": "",
            "polynomial": "linear, to the power of optimizer.power",
            "inverse_sqrt": "1 / sqrt(step / timescale), not below final_fraction",
            "cosine_with_restarts": "optimizer.cycles cosines, each from the peak",
            "wsd": "warmup, stable, decay",
            "deepseek_v2": "drops of 0.316",
            "deepseek_v3": "constant, cosine, then two constants",
        },
        on_resume="free",
        aliases=[
            Alias(
                "cosine",
                deepspeed="scheduler.type: WarmupCosineLR",
                hf="lr_scheduler_type: cosine",
                nemo=("lr_decay_style: cosine", "sched.name: CosineAnnealing"),
                note="Hugging Face's ends at 0: `optimizer.final_fraction=0`",
            ),
            Alias(
                "constant",
                deepspeed="scheduler.type: WarmupLR",
                hf="lr_scheduler_type: constant_with_warmup",
                nemo="lr_decay_style: constant",
            ),
            Alias(
                "linear",
                deepspeed="scheduler.type: WarmupDecayLR",
                hf="lr_scheduler_type: linear",
                nemo="lr_decay_style: linear",
                also={"optimizer.final_fraction": 0.0},
            ),
            Alias(
                "polynomial",
                hf="lr_scheduler_type: polynomial",
                nemo="sched.name: PolynomialDecayAnnealing",
                note="their `lr_end` or `min_lr` is `optimizer.final_fraction` x the peak",
            ),
            Alias(
                "inverse_sqrt",
                hf="lr_scheduler_type: inverse_sqrt",
                nemo=(
                    "lr_decay_style: inverse-square-root",
                    "sched.name: InverseSquareRootAnnealing",
                ),
                also={"optimizer.final_fraction": 0.0},
                note="Megatron's `min_lr` is `optimizer.final_fraction` x the peak",
            ),
            Alias(
                "cosine_with_restarts",
                hf="lr_scheduler_type: cosine_with_restarts",
                also={"optimizer.final_fraction": 0.0},
            ),
            Alias(
                "wsd",
                hf="lr_scheduler_type: warmup_stable_decay",
                nemo="lr_decay_style: WSD",
                note="theirs decay by a cosine and exponentially: `optimizer.decay_shape`",
            ),
        ],
    )
    schedule_steps: int = option(
        0,
        "Steps that the schedule spans, warmup and hold among them; after them the last learning rate stays.",
        unit="steps",
        at_least=0,
        special={0: "as many as the run has"},
        on_resume="free",
        aliases={
            "deepspeed": "scheduler.params.total_num_steps",
            "nemo": ("lr_decay_iters", "sched.max_steps"),
        },
    )
    warmup_steps: int = option(
        100,
        "Warmup to the peak, at most all steps (V2 and V3: 2000).",
        unit="steps",
        at_least=0,
        on_resume="free",
        aliases={
            "deepspeed": "scheduler.params.warmup_num_steps",
            "nemo": ("lr_warmup_iters", "sched.warmup_steps"),
            "hf": "warmup_steps",
        },
    )
    warmup_fraction: float = option(
        0.0,
        "The warmup as a share of the schedule's steps, rounded up.",
        at_least=0,
        at_most=1,
        special={0: "by warmup_steps"},
        on_resume="free",
        aliases={
            "nemo": ("lr_warmup_fraction", "sched.warmup_ratio"),
            "hf": "warmup_ratio",
        },
    )
    warmup_shape: str = option(
        "linear",
        "How the learning rate rises.",
        choices={
            "linear": "",
            "log": "log(step + 1) / log(steps): the peak one step earlier",
        },
        on_resume="free",
        aliases=[
            Alias(
                "log",
                deepspeed="scheduler.params.warmup_type: log",
                note="its default; `linear` is `linear`",
            )
        ],
    )
    warmup_init_fraction: float = option(
        0.0,
        "First learning rate / peak, where there is a warmup.",
        at_least=0,
        at_most=1,
        on_resume="free",
        aliases=[
            Alias(
                deepspeed=("scheduler.params.warmup_min_lr", "scheduler.params.warmup_min_ratio"),
                nemo="lr_warmup_init",
                note="divided by the peak, where it is a learning rate",
            )
        ],
    )
    final_fraction: float = option(
        0.1,
        "Last learning rate / peak; inverse_sqrt: the least.",
        at_least=0,
        at_most=1,
        on_resume="free",
        aliases=[
            Alias(
                deepspeed="scheduler.params.cos_min_ratio",
                hf=("min_lr_rate", "min_lr_ratio"),
                nemo=("min_lr", "sched.min_lr"),
                note="NeMo's divided by the peak",
            )
        ],
    )
    hold_steps: int = option(
        0,
        "Steps at the end that keep the last learning rate: the schedule comes to it so many steps earlier.",
        unit="steps",
        at_least=0,
        on_resume="free",
        aliases={"nemo": "sched.constant_steps"},
    )
    decay_fraction: float = option(
        0.2,
        "Share of the steps (without hold_steps) that wsd decays over; for deepseek_v2, that follow the "
        "first drop.",
        at_least=0,
        at_most=1,
        on_resume="free",
        aliases=[
            Alias(
                hf="num_decay_steps",
                nemo="lr_wsd_decay_iters",
                note="divided by the steps",
            )
        ],
    )
    decay_shape: str = option(
        "linear",
        "How wsd decays, over the share p of its decay.",
        choices={
            "linear": "1 - p",
            "cosine": "(1 + cos(pi p)) / 2",
            "sqrt": "1 - sqrt(p)",
            "exponential": "2 x 0.5^p - 1",
        },
        on_resume="free",
        aliases=[
            Alias(
                "cosine",
                hf="decay_type: cosine",
                nemo="lr_wsd_decay_style: cosine",
            ),
            Alias("sqrt", hf="decay_type: 1-sqrt", nemo="lr_wsd_decay_style: minus_sqrt"),
            Alias("exponential", nemo="lr_wsd_decay_style: exponential"),
        ],
    )
    power: float = option(
        1.0,
        "polynomial: the power of the share of steps that is left.",
        above=0,
        example=2.0,
        on_resume="free",
        aliases={"hf": "power", "nemo": "sched.power"},
    )
    cycles: int = option(
        1,
        "cosine_with_restarts: how many cosines.",
        at_least=1,
        on_resume="free",
        aliases={"hf": "num_cycles"},
    )
    timescale: int = option(
        0,
        "inverse_sqrt: how soon it falls; after 3 times as many steps it is half the peak.",
        unit="steps",
        at_least=0,
        special={0: "the warmup's, or 10,000 without one"},
        on_resume="free",
        aliases={"hf": "timescale"},
    )
    lr_multipliers: str = option(
        "",
        "PATTERN=FACTOR, separated by commas: what the learning rate of weights is multiplied by. A pattern "
        "is a regular expression, searched in a weight's path here (layers/mlp/gate/kernel) and in its "
        "Hugging Face names; the first that matches wins; 0 freezes a weight: no gradient, no optimizer "
        "state (and a router's selection bias stays).",
        example="experts=1.0,embed|lm_head=0.1,norm=0",
        on_resume="free",
        aliases=[
            Alias(
                hf=("param.requires_grad = False", "optimizer_grouped_parameters"),
                nemo="scale_lr_cond",
            ),
            Alias(
                mfc="parameter_lr_multipliers",
                note="one line of PATTERN=FACTOR. A pattern that matches nothing is an error, and what "
                "each matches is printed: its `.*gate.*` is gate_proj too; write `mlp.gate.weight`",
            ),
        ],
    )
    default_lr_multiplier: float = option(
        1.0,
        "The same factor for weights that no pattern of lr_multipliers matches.",
        at_least=0,
        example=1.0,
        on_resume="free",
        aliases={"mfc": "default_lr_multiplier"},
    )
