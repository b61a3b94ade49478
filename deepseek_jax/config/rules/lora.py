"""Rules between the options of LoRA."""

from deepseek_jax.config.lora_targets import EXPERTS, SAVED, linear_maps, matches, targets
from deepseek_jax.config.options import Config
from deepseek_jax.config.rules.common import without_effect
from deepseek_jax.config.sections.lora import ALL_LINEAR, names
from deepseek_jax.errors import UserError

BLOCK = 64  # numbers of nf4 that share a scale; parallel/quantized.py


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    lora = config.lora
    if not lora.r:
        options = (
            "alpha",
            "dropout",
            "use_rslora",
            "target_modules",
            "modules_to_save",
            "base_dtype",
        )
        why = "with config.lora.r=0, which trains all weights"
        without_effect(config, [f"lora.{name}" for name in options], why, "config.lora.r")
        return
    _check_targets(config)
    _check_saved(config)
    m = config.model
    routed = m.num_hidden_layers > m.first_k_dense_replace
    if routed and m.topk_method == "noaux_tc":
        for name in ("bias_update_rate", "bias_centre"):
            if value := getattr(config.moe, name):
                raise UserError(
                    f"config.moe.{name}={value} and config.lora.r={lora.r}: an adapter has no place for the "
                    f"router's selection bias, so it must stay as it is. Set config.moe.{name}="
                    f"{type(value)()}."
                )
    if config.esft.experts:
        raise UserError(
            f"config.esft.experts={config.esft.experts} and config.lora.r={lora.r}: the experts of the table "
            f"are trained whole. Set config.lora.r=0, or config.esft.experts=''."
        )
    chosen = targets(m, lora.target_modules)
    if lora.dropout and all(path.startswith(f"{EXPERTS}.") for path in chosen):
        without_effect(
            config,
            ["lora.dropout"],
            f"with config.lora.target_modules={lora.target_modules}: routed experts have none",
            "config.lora.target_modules to linear maps besides",
        )
    of_text = config.objective == "distill" and config.distill.data == "text"
    if lora.dropout and (config.objective == "pretrain" or of_text):
        asked = "config.distill.data=text" if of_text else f"config.objective={config.objective}"
        raise UserError(
            f"config.lora.dropout={lora.dropout} and {asked}: what is dropped "
            f"follows from the numbers of examples. Set config.lora.dropout=0, or config.objective=sft."
        )
    if lora.dropout and config.mesh.stage > 1:
        raise UserError(
            f"config.lora.dropout={lora.dropout} and config.mesh.stage={config.mesh.stage}: layers in a "
            f"pipeline do not know which rows they see. Set config.lora.dropout=0, or config.mesh.stage=1."
        )
    if lora.base_dtype in ("int8", "nf4") and config.offload.parameters:
        raise UserError(
            f"config.lora.base_dtype={lora.base_dtype} and config.offload.parameters=True: weights in few "
            f"bits stay on the devices. Set config.offload.parameters=False, or base_dtype=bfloat16."
        )
    if lora.base_dtype == "nf4":
        _check_blocks(config)


def _check_targets(config: Config) -> None:
    lora, there = config.lora, linear_maps(config.model)
    text = f"config.lora.target_modules={lora.target_modules}"
    if lora.target_modules == ALL_LINEAR:
        return
    given = names(lora.target_modules)
    if not given:
        raise UserError(
            f"{text} names nothing. Set it to {ALL_LINEAR}, or to names of {', '.join(there)}."
        )
    for name in given:
        last = name.rpartition(".")[2]
        if last in SAVED:
            raise UserError(
                f"{text}: {last} is not adapted by LoRA here. Take it out, and train it whole with "
                f"config.lora.modules_to_save={last}."
            )
        if not any(matches(path, name) for path in there):
            raise UserError(
                f"{text}: {name!r} matches nothing. Set it to {ALL_LINEAR}, or to names of "
                f"{', '.join(there)}."
            )
    chosen = targets(config.model, lora.target_modules)
    pair = [f"{EXPERTS}.{name}" for name in ("gate_proj", "up_proj")]
    if len(found := [path for path in pair if path in chosen]) == 1:
        missing = next(path for path in pair if path not in chosen)
        raise UserError(
            f"{text} names {found[0]} without {missing}, and routed experts hold both in one weight. Name "
            f"both, or neither."
        )


def _check_saved(config: Config) -> None:
    saved = config.lora.saved
    text = f"config.lora.modules_to_save={config.lora.modules_to_save}"
    for name in saved:
        if name not in SAVED:
            raise UserError(
                f"{text}: {name!r} is not one of {', '.join(SAVED)}. Set names of these."
            )
    if "lm_head" in saved and config.model.tie_word_embeddings:
        raise UserError(
            f"{text}: the output head of this model is its embedding "
            f"(config.model.tie_word_embeddings=True). Set config.lora.modules_to_save=embed_tokens."
        )


def _check_blocks(config: Config) -> None:
    """Blocks of nf4 lie along the inputs of a weight, and no device holds a part of one."""
    m = config.model
    widths = {"hidden_size": m.hidden_size}
    if m.first_k_dense_replace:
        widths["intermediate_size"] = m.intermediate_size
    if m.has_experts:
        widths["moe_intermediate_size"] = m.moe_intermediate_size
    if m.attention_kind == "mla":
        widths |= {"kv_lora_rank": m.kv_lora_rank}
        widths |= {"q_lora_rank": m.q_lora_rank} if m.q_lora_rank else {}
    heads = m.num_attention_heads * m.value_head_dim
    widths["num_attention_heads x the width of a head"] = heads
    for name, width in widths.items():
        if width % BLOCK:
            raise UserError(
                f"config.lora.base_dtype=nf4 has blocks of {BLOCK} numbers, and config.model.{name}={width} "
                f"is no multiple of that. Set config.lora.base_dtype=int8."
            )
