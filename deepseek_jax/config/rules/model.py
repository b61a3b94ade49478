"""Rules between the options of the architecture."""

from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.config.rules.common import divides, without_effect
from deepseek_jax.errors import UserError

OF_GROUPED_QUERY = (
    "model.head_dim",
    "model.attention_bias",
    "model.attention_out_bias",
    "model.use_qk_norm",
    "model.partial_rotary_factor",
)


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    m = config.model
    if m.qk_rope_head_dim % 2:
        raise UserError(
            f"config.model.qk_rope_head_dim={m.qk_rope_head_dim} is odd, but rotation works on pairs. "
            f"Set it to an even number."
        )
    if m.first_k_dense_replace > m.num_hidden_layers:
        raise UserError(
            f"config.model.first_k_dense_replace={m.first_k_dense_replace} is above "
            "config.model.num_hidden_layers="
            f"{m.num_hidden_layers}. Set it to {m.num_hidden_layers} or less."
        )
    _check_grouped_query(config)
    _check_routing(config)
    _check_shared_core(config)
    _check_rope_scaling(m)


def _check_grouped_query(config: Config) -> None:
    m = config.model
    if m.attention_kind != "grouped_query":
        without_effect(
            config,
            OF_GROUPED_QUERY,
            "with config.model.num_key_value_heads=None, which means multi-head latent attention: "
            "it is of grouped-query attention",
            "config.model.num_key_value_heads to a number of heads",
        )
        return
    divides(config, "model.num_key_value_heads", "model.num_attention_heads")
    if m.head_dim is None:
        divides(config, "model.num_attention_heads", "model.hidden_size")
    if m.rotary_dim % 2 or not m.rotary_dim:
        raise UserError(
            f"config.model.partial_rotary_factor={m.partial_rotary_factor} rotates {m.rotary_dim} of a "
            "head's "
            f"{m.qk_head_dim} numbers, which must be an even number above 0. Set it to, for instance, "
            "1.0 or 0.5, or "
            f"config.model.head_dim."
        )


def _check_routing(config: Config) -> None:
    m = config.model
    divides(config, "model.n_group", "model.n_routed_experts")
    if m.topk_group > m.n_group:
        raise UserError(
            f"config.model.topk_group={m.topk_group} is above config.model.n_group={m.n_group}. "
            f"Set it to {m.n_group} or less."
        )
    per_group = m.n_routed_experts // m.n_group
    reachable = m.n_routed_experts if m.topk_method == "greedy" else m.topk_group * per_group
    if m.num_experts_per_tok > reachable:
        raise UserError(
            f"config.model.num_experts_per_tok={m.num_experts_per_tok} is above the {reachable} experts "
            "a token may choose "
            f"from (n_routed_experts={m.n_routed_experts}, topk_group={m.topk_group} of "
            f"n_group={m.n_group}). "
            f"Set it to {reachable} or less."
        )
    if m.topk_method == "noaux_tc" and m.n_group > 1 and per_group < 2:
        raise UserError(
            f"config.model.n_group={m.n_group} leaves one expert per group, but topk_method=noaux_tc "
            "sums the top two. "
            f"Set n_group to at most {m.n_routed_experts // 2}."
        )


def _check_shared_core(config: Config) -> None:
    m, rank = config.model, config.model.shared_core_rank
    if not rank:
        return
    text = f"config.model.shared_core_rank={rank}"
    if not m.has_experts:
        raise UserError(
            f"{text} is of routed experts, and no layer has any (config.model.first_k_dense_replace="
            f"{m.first_k_dense_replace}). Set config.model.shared_core_rank=0."
        )
    for name in ("hidden_size", "moe_intermediate_size"):
        if rank > getattr(m, name):
            raise UserError(
                f"{text} is above config.model.{name}={getattr(m, name)}, a side of an expert. Set it to at "
                f"most {min(m.hidden_size, m.moe_intermediate_size)}."
            )
    if config.lora.r:
        raise UserError(
            f"{text} and config.lora.r={config.lora.r}: experts around a shared core are factors already, "
            f"and no adapter is made beside them. Set config.lora.r=0, or multiply the experts out: python "
            f"-m deepseek_jax.compress multiply-out MODEL OUT."
        )
    if config.esft.experts:
        raise UserError(
            f"{text} and config.esft.experts={config.esft.experts}: experts share their core, so that one "
            f"cannot learn without the others. Set config.esft.experts=''."
        )


def _check_rope_scaling(m: ModelConfig) -> None:
    r = m.rope_scaling
    if r.type == "llama3" and not 0 < r.low_freq_factor < r.high_freq_factor:
        raise UserError(
            f"config.model.rope_scaling.low_freq_factor={r.low_freq_factor} and "
            f"high_freq_factor={r.high_freq_factor} are "
            f"not two positive numbers, the first below the second. Set them to, for instance, 1 and 4."
        )
    if not 0 < r.beta_slow <= r.beta_fast:
        raise UserError(
            f"config.model.rope_scaling.beta_fast={r.beta_fast} and beta_slow={r.beta_slow} are not two "
            "positive numbers, "
            f"the first at least the second. Set them to, for instance, 32 and 1."
        )
