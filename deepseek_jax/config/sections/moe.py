"""How tokens meet experts."""

from dataclasses import dataclass

from deepseek_jax.config.option import Alias, option


@dataclass(frozen=True)
class MoeConfig:
    """How tokens meet experts. Only dropping, the bias update and the z-loss change the mathematics."""

    dispatch: str = option(
        "all_to_all",
        "How tokens get to the devices of their experts.",
        choices={
            "all_to_all": "send, compute, return",
            "all_gather": "tokens to all devices",
            "ring": "expert pipeline",
        },
        on_resume="free",
        aliases=[
            Alias(
                "all_to_all",
                nemo="moe_token_dispatcher_type: alltoall",
                fsdp="send-compute-return",
                note="the default",
            ),
            Alias(
                "all_gather",
                nemo="moe_token_dispatcher_type: allgather",
                fsdp="all-to-all expert gathering",
            ),
            Alias("ring", fsdp="expert pipeline"),
        ],
    )
    capacity_factor: float = option(
        1.25,
        "Capacity per round = this x the mean load; overflow costs a round (none where a device has all "
        "experts and multiplies by groups), no token.",
        above=0,
        example=1.25,
        on_resume="free",
        aliases=[
            Alias(
                nemo="moe_expert_capacity_factor",
                also={"moe.drop": True},
                note="there it drops tokens; here it sizes a dispatch round, and without `moe.drop` "
                "drops none",
            )
        ],
    )
    experts_implementation: str = option(
        "auto",
        "What multiplies tokens by the matrices of their experts; every value gives the same numbers.",
        choices={
            "auto": "grouped products: on GPUs by kernels that pass a test at start, on a CPU with all "
            "experts by its own; rounds where neither is",
            "mosaic": "grouped products by kernels for Hopper GPUs, in numbers of 16 bits",
            "triton": "grouped products by kernels for GPUs from Ampere on; JAX announces their end",
            "rounds": "batched products over the places of a round, on any device",
        },
        on_resume="free",
        aliases=[
            Alias(
                "auto",
                nemo="moe_grouped_gemm: true",
                hf="experts_implementation: grouped_mm",
                note="the default",
            ),
            Alias(
                "rounds",
                nemo="moe_grouped_gemm: false",
                note="experts of equal capacity at once, not one after the other",
            ),
        ],
    )
    fp8_dispatch: bool = option(
        False,
        "With train.fp8, tokens travel to their experts in FP8, half the bytes of bfloat16; results and "
        "gradients travel as without it.",
        on_resume="free",
    )
    drop: bool = option(
        False,
        "Drop what overflows the capacity of one round on its device, instead of running more rounds.",
        on_resume="free",
    )
    drop_policy: str = option(
        "probability",
        "What drop keeps.",
        choices={
            "probability": "the highest router weights",
            "position": "the earliest tokens",
        },
        synonyms={"probs": "probability"},
        on_resume="free",
        aliases=[
            Alias(
                "probability",
                nemo="moe_token_drop_policy: probs",
                note="with `moe.drop`; what was dropped is in the metrics",
            ),
            Alias(
                "position",
                nemo="moe_token_drop_policy: position",
                note="with `moe.drop`; what was dropped is in the metrics",
            ),
        ],
    )
    bias_update_rate: float = option(
        0.001,
        "Step of the selection bias per optimizer step (noaux_tc).",
        at_least=0,
        special={0: "fixed bias"},
        on_resume="free",
        aliases=[
            Alias(
                nemo="moe_router_bias_update_rate",
                note="with `model.topk_method=noaux_tc`",
            )
        ],
    )
    bias_update_fraction: float = option(
        1.0,
        "The bias moves during this fraction of the steps, then is fixed (V3: 14.3/14.8).",
        at_least=0,
        at_most=1,
        on_resume="free",
    )
    bias_centre: bool = option(
        False,
        "Subtract the bias's mean after each update, so that it cannot drift as a whole.",
        on_resume="free",
    )
    router_z_loss_coef: float = option(
        0.0,
        "Weight of mean(logsumexp(router logits)^2), ST-MoE arXiv:2202.08906.",
        at_least=0,
        special={0: "off"},
        on_resume="free",
        aliases={"nemo": "moe_z_loss_coeff"},
    )
