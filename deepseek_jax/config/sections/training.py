"""Steps, their batch and the numbers they compute in."""

from dataclasses import dataclass

from deepseek_jax.config.option import NAMES, Alias, option
from deepseek_jax.config.sections.model import INT32

# What remat=save:NAME,NAME may keep, and offload.activations may send to the host's memory; numbers per token
# and layer, in items of the compute dtype, and what backward need not do again. D hidden_size, N heads, F
# width of the dense MLP or of the shared experts together, f that of a routed expert, K experts per token, c
# capacity_factor, X devices on mesh.expert.
REMAT_NAMES = (
    "layer_input",  # D: every remat keeps it, so nothing is recomputed less; its memory can be offloaded
    "mla_latent",  # kv_lora_rank + qk_rope_head_dim + q_lora_rank: the down-projections
    "attention",  # N v_head_dim, and N float32: attention itself, all but its products for backward
    "mlp_gate_up",  # 2 F: two of the three matmuls of dense MLP and shared experts
    "mlp_hidden",  # F: their activation function
    "exchange",  # K c D (all_to_all) or X D (all_gather, ring), where X > 1: the tokens' way to the experts
    "experts_hidden",  # 2 K c f: two of the three matmuls of the routed experts, in the first round
)


@dataclass(frozen=True)
class TrainConfig:
    """The steps of a run, their batch and the numbers they compute in."""

    steps: int = option(
        1000,
        "Optimizer steps; above 0 they win over epochs.",
        unit="steps",
        at_least=0,
        special={0: "as many as train.epochs needs"},
        aliases={"nemo": "max_steps", "hf": "max_steps"},
    )
    epochs: float = option(
        0.0,
        "Passes over the training data, each in an order of its own, where steps is 0.",
        unit="passes",
        at_least=0,
        special={0: "by train.steps"},
        example=3.0,
        aliases={"nemo": "max_epochs", "hf": "num_train_epochs"},
    )
    batch_size: int = option(
        8,
        "Sequences per step, over the whole mesh.",
        unit="sequences",
        at_least=1,
        at_most=INT32,
        on_resume="free",
        aliases={"deepspeed": "train_batch_size", "nemo": "global_batch_size"},
    )
    sequence_length: int = option(
        512,
        "Tokens per sequence.",
        unit="tokens",
        at_least=1,
        at_most=INT32,
        on_resume="new pass",
        aliases={"nemo": "seq_length", "hf": ("max_length", "max_seq_length")},
    )
    accumulation: int = option(
        1,
        "Micro-batches per step; divides batch_size.",
        unit="micro-batches",
        at_least=1,
        on_resume="free",
        aliases=[
            Alias(
                deepspeed="gradient_accumulation_steps",
                hf="gradient_accumulation_steps",
                note="splits `train.batch_size`, which is accumulation x the micro-batch of a GPU x the "
                "devices of data, fsdp "
                "and expert",
            )
        ],
    )
    batch_ramp_start: int = option(
        0,
        "Sequences per step at the start, growing linearly to batch_size.",
        unit="sequences",
        at_least=0,
        special={0: "no ramp"},
        on_resume="free",
    )
    batch_ramp_steps: int = option(
        0,
        "Steps over which the batch grows, in whole micro-batches.",
        unit="steps",
        at_least=0,
        on_resume="free",
    )
    dtype: str = option(
        "bfloat16",
        "Compute dtype; parameters are float32.",
        choices={"float32": "", "bfloat16": "", "float16": "with loss scaling, config.fp16"},
        aliases=[
            Alias(
                "bfloat16",
                deepspeed="bf16.enabled: true",
                nemo=("precision: bf16", "precision: bf16-mixed"),
                hf=("bf16: true", "mixed_precision: bf16"),
                note="parameters and optimizer stay float32",
            ),
            Alias(
                "float16",
                deepspeed="fp16.enabled: true",
                nemo=("precision: 16", "precision: 16-mixed"),
                hf=("fp16: true", "mixed_precision: fp16"),
                note="with loss scaling (`config.fp16`)",
            ),
        ],
    )
    fp8: str = option(
        "none",
        "Products of the routed experts in FP8; all else, and the weights, as without it.",
        choices={
            "none": "in train.dtype",
            "row": "a scale for each row and each column of a product; e4m3, gradients in e5m2. On devices "
            "without FP8 (GPUs before Ada, CPUs) the same numbers, slower",
        },
        on_resume="free",
        aliases=[
            Alias(
                "row",
                nemo=("fp8: hybrid", "fp8_format: hybrid"),
                note="routed experts alone; scales of rows and columns, not of tensors",
            )
        ],
    )
    accumulation_dtype: str = option(
        "float32",
        "Dtype of the micro-batches' summed gradients.",
        choices={"float32": "4 bytes per parameter", "bfloat16": "2 bytes per parameter"},
        on_resume="free",
        aliases=[Alias("bfloat16", deepspeed="data_types.grad_accum_dtype: bf16")],
    )
    remat: str = option(
        "auto",
        "What a layer keeps for backward; the rest is computed again.",
        choices={
            "auto": "what fits a GPU's memory, said at the start; full on CPUs and with stages",
            "none": "all but weights",
            "dots": "matmul results",
            "full": "nothing but its input",
            "exchange": "what was exchanged with the experts' devices",
            f"save:{NAMES}": "what is named",
        },
        names=REMAT_NAMES,
        on_resume="free",
        aliases=[
            Alias(
                "full",
                fsdp="checkpoint_wrapper",
                deepspeed="activation_checkpointing",
                nemo="recompute_granularity: full",
                hf=("gradient_checkpointing: true", "fsdp_activation_checkpointing: true"),
                note="activation checkpointing; also `dots`, `none`, `exchange` or `save:NAME,...`",
            )
        ],
    )
    attention: str = option(
        "auto",
        "Which attention kernel.",
        choices={
            "auto": "blocks",
            "blocks": "any device",
            "mosaic": "fused kernels for Hopper GPUs, bfloat16 or float16",
            "triton": "fused kernels for NVIDIA GPUs from Ampere on",
            "cudnn": "NVIDIA GPUs from Hopper on, bfloat16; blocks for packed sequences, or if cuDNN is "
            "too old",
        },
        on_resume="free",
    )
    mtp_loss_weight: float = option(
        0.3,
        "Weight of the multi-token prediction loss (V3: 0.3, then 0.1).",
        at_least=0,
        on_resume="free",
        aliases={"nemo": "mtp_loss_scaling_factor"},
    )
    mtp_loss_weight_final: float = option(
        0.3, "The weight after mtp_switch_fraction of the steps.", at_least=0, on_resume="free"
    )
    mtp_switch_fraction: float = option(
        1.0,
        "Fraction of the steps after which the final weight applies (V3: 10/14.8).",
        at_least=0,
        at_most=1,
        on_resume="free",
    )
    max_bad_steps: int = option(
        10,
        "Consecutive skipped updates (non-finite loss or gradient) before on_bad_steps acts; those of "
        "the search for "
        "a float16 loss scale do not count.",
        unit="steps",
        at_least=1,
        on_resume="free",
    )
    on_bad_steps: str = option(
        "stop",
        "What happens at that limit.",
        choices={
            "stop": "exit code 3",
            "rollback": "to the last good checkpoint, and on with the data after the bad steps",
        },
        on_resume="free",
    )
    max_rollbacks: int = option(
        3, "Rollbacks after which the run stops.", at_least=1, on_resume="free"
    )


@dataclass(frozen=True)
class Fp16Config:
    """Loss scaling of train.dtype=float16, in the words of DeepSpeed's `fp16` block."""

    loss_scale: float = option(
        0.0,
        "A fixed factor for the loss.",
        at_least=0,
        special={0: "dynamic, found by the options below"},
        aliases={"deepspeed": "fp16.loss_scale"},
    )
    initial_scale_power: int = option(
        16,
        "The dynamic scale starts at 2 to this power.",
        at_least=0,
        at_most=32,
        aliases={"deepspeed": "fp16.initial_scale_power"},
    )
    loss_scale_window: int = option(
        1000,
        "Steps without overflow after which the scale doubles.",
        unit="steps",
        at_least=1,
        aliases={"deepspeed": "fp16.loss_scale_window"},
    )
    hysteresis: int = option(
        2,
        "The scale halves at the overflow of this number since it last doubled, and at every one after that.",
        unit="overflows",
        at_least=1,
        aliases={"deepspeed": "fp16.hysteresis"},
    )
    min_loss_scale: float = option(
        1.0,
        "The scale never falls below; overflows there count towards train.max_bad_steps.",
        at_least=1,
        aliases={"deepspeed": "fp16.min_loss_scale"},
    )
