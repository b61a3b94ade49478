"""The optimizer and its learning rate."""

from dataclasses import dataclass

from deepseek_jax.config.option import Alias, option


@dataclass(frozen=True)
class OptimizerConfig:
    """The update, its learning rate and their schedule."""

    name: str = option(
        "adamw",
        "Which optimizer.",
        choices={
            "adamw": "",
            "adafactor": "row and column means, no moments",
            "muon": "orthogonalised momentum; norms, embedding and head: adamw",
        },
        aliases=[
            Alias("adamw", deepspeed="optimizer.type: AdamW", hf="optim: adamw_torch"),
            Alias(
                "adafactor",
                hf="optim: adafactor",
                also={"optimizer.scale_parameter": False},
                note="the default of `scale_parameter`, True, takes the learning rate relative to each "
                "weight",
            ),
            Alias("muon", deepspeed="optimizer.type: Muon"),
        ],
    )
    learning_rate: float = option(
        1e-3,
        "Peak learning rate.",
        above=0,
        example=1e-3,
        on_resume="free",
        aliases={
            "deepspeed": "optimizer.params.lr",
            "nemo": ("lr", "optim.lr"),
            "hf": "learning_rate",
        },
    )
    b1: float = option(
        0.9,
        "adamw's decay of the first moment.",
        at_least=0,
        below=1,
        example=0.9,
        on_resume="free",
        aliases={"deepspeed": "optimizer.params.betas", "nemo": "adam_beta1", "hf": "adam_beta1"},
    )
    b2: float = option(
        0.95,
        "adamw's decay of the second moment.",
        at_least=0,
        below=1,
        example=0.95,
        on_resume="free",
        aliases={"deepspeed": "optimizer.params.betas", "nemo": "adam_beta2", "hf": "adam_beta2"},
    )
    eps: float = option(
        1e-8,
        "adamw's term in the denominator.",
        at_least=0,
        on_resume="free",
        aliases={"deepspeed": "optimizer.params.eps", "nemo": "adam_eps", "hf": "adam_epsilon"},
    )
    moment_dtype: str = option(
        "float32",
        "What adamw's and muon's moments are stored in; they are computed in float32.",
        choices={"float32": "", "bfloat16": "half the state (V3)"},
        aliases=[
            Alias(
                "bfloat16",
                deepspeed="bf16.bf16_optimizer_states: true",
                note="for AdamW and Muon",
            )
        ],
    )
    momentum: float = option(
        0.95,
        "muon's momentum (Nesterov).",
        at_least=0,
        below=1,
        example=0.95,
        on_resume="free",
    )
    scale_parameter: bool = option(
        True,
        "adafactor: learning_rate is relative to a weight's root mean square (1e-2); False: absolute, as "
        "adamw's.",
        aliases={"hf": "scale_parameter"},
    )
    weight_decay: float = option(
        0.1,
        "Weight decay of matrices; norms and the selection bias are never decayed.",
        at_least=0,
        on_resume="free",
        aliases={
            "deepspeed": "optimizer.params.weight_decay",
            "nemo": "optim.weight_decay",
            "hf": "weight_decay",
        },
    )
    grad_clip: float = option(
        1.0,
        "Largest global gradient norm.",
        at_least=0,
        special={0: "no clipping"},
        on_resume="free",
        aliases={
            "deepspeed": "gradient_clipping",
            "nemo": ("gradient_clip_val", "clip_grad"),
            "hf": "max_grad_norm",
        },
    )
    schedule: str = option(
        "cosine",
        "Learning rate over the steps, after the warmup.",
        choices={
            "constant": "",
            "cosine": "",
            "wsd": "warmup, stable, decay",
            "deepseek_v2": "drops of 0.316",
            "deepseek_v3": "constant, cosine, then two constants",
        },
        on_resume="free",
        aliases=[
            Alias("cosine", hf="lr_scheduler_type: cosine", nemo="lr_decay_style: cosine"),
            Alias(
                "constant",
                hf="lr_scheduler_type: constant_with_warmup",
                nemo="lr_decay_style: constant",
            ),
            Alias(
                "wsd",
                hf="lr_scheduler_type: warmup_stable_decay",
                nemo="lr_decay_style: WSD",
            ),
        ],
    )
    schedule_steps: int = option(
        0,
        "Steps that the schedule spans, its warmup among them; after them the last learning rate stays.",
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
        "Linear warmup from 0, at most all steps (V2 and V3: 2000).",
        unit="steps",
        at_least=0,
        on_resume="free",
        aliases={
            "deepspeed": "scheduler.params.warmup_num_steps",
            "nemo": ("lr_warmup_iters", "sched.warmup_steps"),
            "hf": "warmup_steps",
        },
    )
    final_fraction: float = option(
        0.1,
        "Last learning rate / peak, for cosine and wsd.",
        at_least=0,
        at_most=1,
        on_resume="free",
    )
    decay_fraction: float = option(
        0.2,
        "Share of the steps that wsd decays over, linearly; for deepseek_v2, that follow the first drop.",
        at_least=0,
        at_most=1,
        on_resume="free",
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
