"""The architecture in the words of Megatron-core's TransformerConfig, which Megatron-LM, NeMo and
Megatron-Bridge share: keys with underscores, without dashes and sections.

Source: megatron/core/transformer/transformer_config.py of Megatron-LM.
"""

from collections.abc import Sequence

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.handlers import as_int, fact, neutral, no_effect, one_of, option, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools import megatron_handlers as mh
from deepseek_jax.migrate.tools.megatron_handlers import (
    flag,
    has_experts,
    of_experts,
    whole,
    yes_no,
)
from deepseek_jax.migrate.tools.shared import need

NO_DROPOUT = refuse("there is no dropout here", "Set it to 0", unless=(None, False, 0, 0.0))
GATED_SILU = {"swiglu": "", "fast-swiglu": ""}

ATTENTION: dict[str, Handler] = {
    "num_attention_heads": option("model.num_attention_heads"),
    "num_query_groups": mh.query_groups,
    "kv_channels": mh.of_other_attention("model.head_dim"),
    "multi_latent_attention": no_effect("the widths of latent attention say so"),
    "q_lora_rank": mh.of_latent_attention("model.q_lora_rank"),
    "kv_lora_rank": mh.of_latent_attention("model.kv_lora_rank"),
    "qk_head_dim": mh.of_latent_attention("model.qk_nope_head_dim"),
    "qk_pos_emb_head_dim": mh.of_latent_attention("model.qk_rope_head_dim"),
    "v_head_dim": mh.of_latent_attention("model.v_head_dim"),
    "qk_layernorm": mh.norm_of_queries,
    "add_qkv_bias": yes_no("model.attention_bias"),
    "window_size": refuse("there is no sliding window here", "Leave it out"),
    "attention_type": neutral(
        {"multihead": ""}, "attention is multi-head here", "Set it to multihead"
    ),
    "position_embedding_type": neutral(
        {"rope": ""}, "positions are rotary here", "Set it to rope, and train anew"
    ),
    "rotary_base": option("model.rope_theta"),
    "rotary_percent": mh.of_other_attention("model.partial_rotary_factor"),
    "rotary_interleaved": yes_no("model.rope_interleave"),
    "rotary_scaling_factor": mh.yarn_factor,
    "rotary_seq_len_interpolation_factor": mh.stretched,
    "beta_fast": mh.of_latent_attention("model.rope_scaling.beta_fast"),
    "beta_slow": mh.of_latent_attention("model.rope_scaling.beta_slow"),
    "mscale": mh.of_latent_attention("model.rope_scaling.mscale"),
    "mscale_all_dim": mh.of_latent_attention("model.rope_scaling.mscale_all_dim"),
    "original_max_position_embeddings": mh.of_latent_attention(
        "model.rope_scaling.original_max_position_embeddings"
    ),
    "rope_type": no_effect("rotary_scaling_factor says so"),
    "use_rope_scaling": mh.scaled_as_llama3,
    "rope_scaling_factor": no_effect("use_rope_scaling takes it"),
    "apply_query_key_layer_scaling": no_effect("it guards float16's range and changes no result"),
    "normalize_attention_scores": neutral(
        {True: ""}, "scores are divided by sqrt(head width) here"
    ),
    "attention_softmax_in_fp32": no_effect("softmax is in float32 here"),
}

BLOCKS: dict[str, Handler] = {
    "num_layers": option("model.num_hidden_layers"),
    "hidden_size": option("model.hidden_size"),
    "ffn_hidden_size": option("model.intermediate_size"),
    "max_position_embeddings": option("model.max_position_embeddings"),
    "seq_length": fact("sequence_length", as_int),
    "encoder_seq_length": fact("sequence_length", as_int),
    "layernorm_epsilon": option("model.rms_norm_eps"),
    "init_method_std": option("model.initializer_range"),
    "untie_embeddings_and_output_weights": yes_no("model.tie_word_embeddings", inverted=True),
    "share_embeddings_and_output_weights": yes_no("model.tie_word_embeddings"),
    "normalization": neutral(
        {"rmsnorm": ""}, "layers are normed by RMSNorm here", "Set it to RMSNorm"
    ),
    "activation": neutral(GATED_SILU, "MLPs are SwiGLU here", "Set it to fast-swiglu"),
    "swiglu": neutral({True: ""}, "MLPs are SwiGLU here", "Set it to true"),
    "gated_linear_unit": neutral({True: ""}, "MLPs are SwiGLU here", "Set it to true"),
    "squared_relu": refuse("MLPs are SwiGLU here"),
    "quick_geglu": refuse("MLPs are SwiGLU here"),
    "openai_gelu": refuse("MLPs are SwiGLU here"),
    "bias": refuse("linear maps have no biases here, but q, k and v", "Set it to false"),
    "add_bias_linear": refuse("linear maps have no biases here, but q, k and v", "Set it to false"),
    "disable_bias_linear": neutral({True: ""}, "linear maps have no biases here", "Set it to true"),
    "hidden_dropout": NO_DROPOUT,
    "attention_dropout": NO_DROPOUT,
    "ffn_dropout": NO_DROPOUT,
    "transformer_block_type": neutral({"pre_ln": ""}, "norms stand before attention and MLP here"),
    "headscale": refuse("heads are not scaled here", "Set it to false"),
    "fp32_residual_connection": no_effect("the residual stream has the compute dtype"),
    "mtp_num_layers": option(
        "model.num_nextn_predict_layers", lambda e: as_int(e) if e.value else 0
    ),
    "mtp_loss_scaling_factor": mh.mtp_weight,
}

ROUTING: dict[str, Handler] = {
    "num_experts": option("model.n_routed_experts"),
    "num_moe_experts": option("model.n_routed_experts"),
    "moe_ffn_hidden_size": of_experts(option("model.moe_intermediate_size")),
    "moe_shared_expert_intermediate_size": of_experts(mh.shared_expert),
    "moe_layer_freq": of_experts(mh.layers_with_experts),
    "moe_router_topk": of_experts(option("model.num_experts_per_tok")),
    "moe_router_num_groups": of_experts(option("model.n_group")),
    "moe_router_group_topk": of_experts(mh.groups),
    "moe_router_score_function": of_experts(option("model.scoring_func")),
    "moe_router_pre_softmax": of_experts(mh.score_before_choice),
    "moe_router_topk_scaling_factor": of_experts(option("model.routed_scaling_factor")),
    "moe_router_enable_expert_bias": of_experts(mh.expert_bias),
    "moe_router_bias_update_rate": of_experts(mh.bias_update_rate),
    "moe_router_load_balancing_type": of_experts(
        one_of(
            {
                "aux_loss": {"model.seq_aux": False},
                "global_aux_loss": {"model.seq_aux": False},
                "seq_aux_loss": {"model.seq_aux": True},
                "none": {"model.aux_loss_alpha": 0.0},
            },
            "experts are balanced by a loss, by the expert bias or by both here",
            "Set it to aux_loss or seq_aux_loss",
        )
    ),
    "moe_aux_loss_coeff": of_experts(option("model.aux_loss_alpha")),
    "moe_z_loss_coeff": of_experts(option("moe.router_z_loss_coef")),
    "moe_token_dispatcher_type": of_experts(
        one_of(
            {
                "alltoall": {"moe.dispatch": "all_to_all"},
                "alltoall_seq": {"moe.dispatch": "all_to_all"},
                "flex": {"moe.dispatch": "all_to_all"},
                "allgather": {"moe.dispatch": "all_gather"},
            },
            "there is no such dispatch here",
            "Set it to alltoall",
        )
    ),
    "moe_expert_capacity_factor": of_experts(mh.capacity),
    "moe_token_drop_policy": of_experts(mh.drop_policy),
    "moe_input_jitter_eps": refuse(
        "the router's input is not noised here", "Leave it out", (None, 0)
    ),
    "moe_router_topk_limited_devices": refuse(
        "experts are not limited to devices here", "Use groups"
    ),
    "moe_router_force_load_balancing": refuse("the router decides here", "Leave it out"),
    "moe_shared_expert_gate": refuse("shared experts are not gated here", "Leave it out"),
    "moe_latent_size": refuse("experts work on the residual stream here", "Leave it out"),
}

MODEL: dict[str, Handler] = {**BLOCKS, **ATTENTION, **ROUTING}


def padded_vocabulary(m: Migration, entry: Entry | None, size: int, multiple: int) -> None:
    """The rows of the embedding, which Megatron pads to a multiple for each tensor parallel rank."""
    step = max(multiple, 1) * max(whole(m, "tensor_model_parallel_size", 1), 1)
    rows = -(-size // step) * step
    if entry is None:
        m.default("model.vocab_size", rows)
    else:
        m.tell(entry, "model.vocab_size", rows)


def ask_vocabulary(m: Migration, multiple: int) -> None:
    """Where no file says how large the tokenizer is."""
    step = max(multiple, 1) * max(whole(m, "tensor_model_parallel_size", 1), 1)
    keys = ("tokenizer_model", "tokenizer.type", "tokenizer.model", "tokenizer_type")
    named = next((e.text for key in keys if (e := m.entry(key)) and e.value), "the tokenizer")
    why = f"how many ids {named} has, rounded up to a multiple of {step}"
    need(
        m, "model.vocab_size", f"{why}; a log of theirs says it: padded vocab ... new size", "SIZE"
    )


def finish_model(
    m: Migration, unasked: Sequence[tuple[str, str, str, str]], gated_third: bool = False
) -> None:
    """What follows from several keys together, and what the tool does where its files are silent.

    Args:
      unasked: (key, its value where files are silent, why that is not to be had, repair).
      gated_third: an MLP without a width has 8/3 of hidden_size, in 64s, and not 4 times that.

    Raises:
      UserError: a size is missing.
    """
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        if m.value(key) is None:
            raise UserError(
                f"{key} is in none of the files: the model has no size. Add the file that has it."
            )
    for key, value, why, repair in unasked:
        if m.value(key) is None:
            m.refuse_absent(key, value, why, repair)
    hidden, heads = whole(m, "hidden_size"), whole(m, "num_attention_heads")
    wide = int((4 * hidden * 2 / 3) / 64) * 64 if gated_third else 4 * hidden
    width = whole(m, "ffn_hidden_size", wide)
    m.default("model.intermediate_size", width)
    m.default("model.rms_norm_eps", 1e-5)
    m.default("model.initializer_range", 0.02)
    m.default("model.rope_theta", 10000.0)
    m.default("model.num_nextn_predict_layers", 0)
    if flag(m, "multi_latent_attention"):
        m.default("model.rope_interleave", True)
    else:
        m.default("model.rope_interleave", False)
        m.default("model.num_key_value_heads", heads)
        m.default("model.head_dim", hidden // heads)
    _finish_experts(m, width)


def _finish_experts(m: Migration, width: int) -> None:
    if not has_experts(m):
        m.default("model.first_k_dense_replace", whole(m, "num_layers"))
        m.default("model.aux_loss_alpha", 0.0)
        return
    grouped = whole(m, "moe_router_num_groups", 1) > 1
    m.default("model.moe_intermediate_size", width)
    m.default("model.n_shared_experts", 0)
    m.default("model.first_k_dense_replace", 0)
    m.default("model.num_experts_per_tok", 2)
    m.default("model.topk_method", "group_limited_greedy" if grouped else "greedy")
    m.default("model.scoring_func", "softmax")
    m.default("model.norm_topk_prob", True)
    m.default("model.routed_scaling_factor", 1.0)
    m.default("model.aux_loss_alpha", 0.0)
    m.default("model.seq_aux", False)
    m.default("moe.router_z_loss_coef", 0.0)
    m.default("moe.bias_update_rate", 1e-3 if flag(m, "moe_router_enable_expert_bias") else 0.0)
