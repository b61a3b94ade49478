"""The update of the weights: which optimizer, and what it takes."""

from dataclasses import dataclass

from deepseek_jax.config.option import Alias, option


@dataclass(frozen=True)
class UpdateOptions:
    """The first half of `optimizer`; its schedule and multipliers are the second (sections/optimizer.py)."""

    name: str = option(
        "adamw",
        "Which optimizer.",
        choices={
            "adamw": "",
            "adafactor": "row and column means, no moments; as transformers.optimization.Adafactor",
            "muon": "orthogonalised momentum; norms, embedding and head: adamw",
            "lion": "the sign of a momentum; published with b2=0.99, and a third to a tenth of adamw's "
            "learning rate",
            "sgd": "as torch.optim.SGD: decay is added to the gradient",
        },
        aliases=[
            Alias("adamw", deepspeed="optimizer.type: AdamW", hf="optim: adamw_torch"),
            Alias(
                "adafactor",
                hf="optim: adafactor",
                also={
                    "optimizer.scale_parameter": False,
                    "optimizer.min_dim_size_to_factor": 1,
                },
                note="what the Trainer sets; the default of `scale_parameter`, True, takes the learning rate "
                "relative to each weight",
            ),
            Alias("muon", deepspeed="optimizer.type: Muon"),
            Alias(
                "lion",
                deepspeed="optimizer.type: Lion",
                hf=("optim: lion_32bit", "optim: lion_8bit", "optim: paged_lion_32bit"),
                note="moments are float32, or `optimizer.moment_dtype=bfloat16`; none are of 8 bits",
            ),
            Alias(
                "sgd",
                deepspeed="optimizer.type: SGD",
                hf="optim: sgd",
                nemo="optimizer: sgd",
                also={"optimizer.momentum": 0.0},
                note="torch's default; Megatron's `--sgd-momentum` is `optimizer.momentum`",
            ),
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
        "adamw's decay of the first moment; lion's share of the momentum in what it takes the sign of.",
        at_least=0,
        below=1,
        example=0.9,
        on_resume="free",
        aliases={"deepspeed": "optimizer.params.betas", "nemo": "adam_beta1", "hf": "adam_beta1"},
    )
    b2: float = option(
        0.95,
        "adamw's decay of the second moment; lion's of its momentum.",
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
        "What the moments of adamw, muon, lion and sgd are stored in; they are computed in float32.",
        choices={"float32": "", "bfloat16": "half the state (V3)"},
        aliases=[
            Alias(
                "bfloat16",
                deepspeed="bf16.bf16_optimizer_states: true",
                note="for all but Adafactor",
            )
        ],
    )
    momentum: float = option(
        0.95,
        "muon's momentum (Nesterov), or sgd's.",
        at_least=0,
        below=1,
        special={0: "sgd: no momentum, and no state"},
        example=0.95,
        on_resume="free",
        aliases={"nemo": "sgd_momentum"},
    )
    nesterov: bool = option(
        False, "sgd: with Nesterov's momentum.", on_resume="free", aliases={"hf": "nesterov"}
    )
    scale_parameter: bool = option(
        True,
        "adafactor: learning rate and weight decay are relative to a weight's root mean square (1e-2); "
        "False: absolute, as adamw's.",
        aliases={"hf": "scale_parameter"},
    )
    relative_step: bool = option(
        False,
        "adafactor: the learning rate is min(0.01, 1 / sqrt(step)), whatever learning_rate and schedule.",
        on_resume="free",
        aliases=[Alias(hf="relative_step", note="its default is True; the Trainer sets False")],
    )
    warmup_init: bool = option(
        False,
        "relative_step: min(1e-6 x step, 1 / sqrt(step)).",
        on_resume="free",
        aliases={"hf": "warmup_init"},
    )
    clip_threshold: float = option(
        1.0,
        "adafactor: largest root mean square of a matrix's update before the learning rate.",
        above=0,
        example=1.0,
        on_resume="free",
        aliases={"hf": "clip_threshold"},
    )
    first_moment: float = option(
        0.0,
        "adafactor: decay of a mean of its updates, which is applied in their place.",
        at_least=0,
        below=1,
        special={0: "none, and no array of the weights' size"},
        example=0.9,
        aliases=[Alias(hf="beta1", note="null there is 0 here")],
    )
    min_dim_size_to_factor: int = option(
        128,
        "adafactor: matrices whose sides are both at least this have row and column means, all other "
        "weights a mean of every square.",
        at_least=1,
        special={1: "every matrix, as Hugging Face"},
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
