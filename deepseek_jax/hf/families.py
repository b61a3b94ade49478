"""What each `model_type` means: which keys of config.json are options of ours, what they are where a file
leaves them out, and which others may stand there.

Defaults are those of transformers' config classes (tests/hf/test_hf_defaults.py compares all of them), which for
DeepSeek-V3 and Kimi-K2 are those of DeepSeek's own class too. A size that every checkpoint states has none:
it is refused by name where it is missing.
"""

from typing import Any, NamedTuple

# Keys of every family that change nothing in what a trained model computes, with those that begin with "_"
# (transformers' notes to itself) or end with "_token_id" (which generation reads). `router_aux_loss_coef` is
# a term of transformers' training loss; ours is aux_loss_alpha. configuration.py checks sliding_window,
# layer_types and quantization_config by their values.
HARMLESS = {
    "model_type",
    "architectures",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "name_or_path",
    "use_cache",
    "ep_size",
    "output_router_logits",
    "router_aux_loss_coef",
    "qk_head_dim",
    "num_mtp_layers",
    "is_llama_config",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "quantization_config",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    # Tensor parallelism of the pretraining: transformers 4 cut matrices by it and added the parts up,
    # transformers 5 ignores it.
    "pretraining_tp",
    # Of the container, of classification heads, of training.
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "use_bfloat16",
    "tf_legacy_loss",
    "gradient_checkpointing",
    "tokenizer_class",
    "prefix",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "classifier_dropout",
    "finetuning_task",
    "task_specific_params",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "unsloth_version",
    "unsloth_fixed",
    "model_name",
    "transformers.js_config",
    "transformers_weights",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "use_return_dict",
    "router_z_loss_coef",
    # Which kernels compute it.
    "attn_implementation",
    "use_flash_attn",
    "use_flash_attention",
    "use_flash_attention_2",
    "flash_attn",
    "use_sdpa",
    "use_fused_rms_norm",
    "use_fused_crossentropy",
    # Of the tokenizer.
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "model_max_length",
    "chat_template",
    "tokenizer_name",
    "tokenizer_path",
    # Of generation, which transformers 4 wrote into config.json.
    "max_length",
    "min_length",
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "penalty_alpha",
    "renormalize_logits",
    "low_memory",
    "stop_strings",
}
# Keys that must have one of these values: others would compute something else. None is always fine.
ONLY = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "router_jitter_noise": (0,),
    "use_mrope": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "residual_dropout": (0,),
    "hidden_dropout": (0,),
    "resid_pdrop": (0,),
    "embd_pdrop": (0,),
    "rope_interleaved": (False,),
    "num_nextn_predict_layers": (0,),
    "use_bias": (False,),
    "lm_head_bias": (False,),
}
# What null means, where it is not the same as a missing key: what transformers makes of it, or DeepSeek's
# code where transformers fails. It is the default for what only training and export read; other options must
# not be null.
NULL = {
    "q_lora_rank": None,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "rope_interleave": False,
    "attention_bias": False,
    "attention_out_bias": False,
    "use_qk_norm": False,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "num_nextn_predict_layers": 0,
}
NULL_IS_MISSING = ("initializer_range", "aux_loss_alpha", "seq_aux", "max_position_embeddings")

EVERY = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
)
OF_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
OF_GROUPED_QUERY = ("num_key_value_heads", "head_dim")
OF_DEEPSEEK_EXPERTS = (
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "aux_loss_alpha",
    "seq_aux",
)
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

_ALL = dict(
    initializer_range=0.02,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    partial_rotary_factor=1.0,
)
_EXPERTS = dict(
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    n_shared_experts=1,
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.0,
    seq_aux=True,
)
_SIGMOID = dict(scoring_func="sigmoid", topk_method="noaux_tc")
_SOFTMAX = dict(
    scoring_func="softmax",
    topk_method="greedy",
    n_shared_experts=0,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.0,
    seq_aux=True,
)
_ONLY_SIGMOID = dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",))
_MLA_KEYS = ("num_key_value_heads", "head_dim")  # that say nothing of an MLA model


class Window(NamedTuple):
    """Which layers of a family see sliding_window positions only."""

    size: int | None  # sliding_window where it is missing
    switched: bool = False  # only with use_sliding_window
    first: int | None = (
        None  # max_window_layers where it is missing: the first with it; None: all have it
    )


class Family(NamedTuple):
    """What a `model_type` means."""

    architecture: str
    options: tuple[str, ...]  # keys that are options of ours by the same name
    defaults: dict[str, Any]  # of keys that may be missing
    fixed: dict[str, Any]  # options of ours that the family has no key for
    renamed: dict[
        str, str
    ] = {}  # key -> option of ours; export writes those that are not options themselves
    only: dict[str, tuple] = {}  # as ONLY, of this family
    harmless: tuple[str, ...] = ()
    dense: bool = False  # no layer has experts
    out_bias: bool = False  # attention_bias is of the output projection as well
    window: Window | None = None  # None: the family has no sliding windows


FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        (*EVERY, *OF_MLA, *OF_DEEPSEEK_EXPERTS, "topk_method"),
        _ALL
        | _EXPERTS
        | dict(
            max_position_embeddings=2048,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            topk_method="greedy",
            n_shared_experts=2,
            n_routed_experts=64,
            moe_intermediate_size=1407,
            first_k_dense_replace=0,
        ),
        # transformers ignores norm_topk_prob here; DeepSeek's own code would not, and all of its releases
        # have it off.
        dict(scoring_func="softmax", rope_interleave=True, norm_topk_prob=False),
        renamed=dict(num_experts="n_routed_experts"),
        only=dict(scoring_func=("softmax",), attention_bias=(False,)),
        harmless=(*_MLA_KEYS, "num_local_experts"),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        (*EVERY, *OF_MLA, *OF_DEEPSEEK_EXPERTS, "rope_interleave", "num_nextn_predict_layers"),
        _ALL
        | _EXPERTS
        | dict(
            max_position_embeddings=4096,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_interleave=True,
            n_group=8,
            topk_group=4,
            n_routed_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=1,
        ),
        _SIGMOID,
        renamed=dict(
            num_mtp_layers="num_nextn_predict_layers", num_local_experts="n_routed_experts"
        ),
        only=_ONLY_SIGMOID | dict(attention_bias=(False,)),
        harmless=_MLA_KEYS,
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        (*EVERY, *OF_MLA, *OF_DEEPSEEK_EXPERTS, "rope_interleave", "num_nextn_predict_layers"),
        _ALL
        | _EXPERTS
        | dict(
            rms_norm_eps=1e-5,
            max_position_embeddings=202752,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=192,
            qk_rope_head_dim=64,
            v_head_dim=256,
            rope_interleave=True,
            n_routed_experts=64,
            num_experts_per_tok=4,
            moe_intermediate_size=1536,
            first_k_dense_replace=1,
            routed_scaling_factor=1.8,
            num_nextn_predict_layers=0,
        ),
        _SIGMOID,
        renamed=dict(num_local_experts="n_routed_experts", head_dim="qk_rope_head_dim"),
        only=_ONLY_SIGMOID | dict(attention_bias=(False,)),
        harmless=("num_key_value_heads", "mlp_layer_types"),
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        (
            *EVERY,
            *OF_GROUPED_QUERY,
            *OF_DEEPSEEK_EXPERTS,
            "attention_bias",
            "use_qk_norm",
            "num_nextn_predict_layers",
        ),
        _ALL
        | _EXPERTS
        | dict(
            rms_norm_eps=1e-5,
            max_position_embeddings=131072,
            partial_rotary_factor=0.5,
            num_key_value_heads=8,
            head_dim=None,
            attention_bias=False,
            use_qk_norm=False,
            n_routed_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            num_nextn_predict_layers=1,
        ),
        _SIGMOID | dict(rope_interleave=False),
        renamed=dict(
            num_mtp_layers="num_nextn_predict_layers", num_local_experts="n_routed_experts"
        ),
        only=_ONLY_SIGMOID,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (
            *EVERY,
            *OF_GROUPED_QUERY,
            "attention_bias",
            "moe_intermediate_size",
            "num_experts_per_tok",
            "norm_topk_prob",
        ),
        _ALL
        | dict(
            max_position_embeddings=32768,
            num_key_value_heads=4,
            head_dim=None,
            attention_bias=False,
            n_routed_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=False,
        ),
        _SOFTMAX | dict(use_qk_norm=True, rope_interleave=False),
        renamed=dict(num_experts="n_routed_experts", num_local_experts="n_routed_experts"),
        only=dict(qkv_bias=(False,), use_qk_norm=(True,), shared_expert_intermediate_size=(0,)),
        harmless=("mlp_only_layers", "decoder_sparse_step"),
        out_bias=True,
        window=Window(4096, switched=True),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        (*EVERY, *OF_GROUPED_QUERY, "num_experts_per_tok"),
        _ALL
        | dict(
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            max_position_embeddings=131072,
            num_key_value_heads=8,
            head_dim=None,
            n_routed_experts=8,
            num_experts_per_tok=2,
        ),
        _SOFTMAX | dict(norm_topk_prob=True, rope_interleave=False, first_k_dense_replace=0),
        renamed=dict(num_local_experts="n_routed_experts", num_experts="n_routed_experts"),
        only=dict(attention_bias=(False,)),
        window=Window(None),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        (*EVERY, *OF_GROUPED_QUERY),
        _ALL | dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=None),
        dict(attention_bias=True, rope_interleave=False),
        only=dict(attention_bias=(True,), qkv_bias=(True,)),
        dense=True,
        window=Window(4096, switched=True, first=28),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (*EVERY, *OF_GROUPED_QUERY, "attention_bias"),
        _ALL
        | dict(
            max_position_embeddings=32768,
            num_key_value_heads=32,
            head_dim=128,
            attention_bias=False,
        ),
        dict(use_qk_norm=True, rope_interleave=False),
        only=dict(qkv_bias=(False,), use_qk_norm=(True,)),
        dense=True,
        out_bias=True,
        window=Window(4096, switched=True, first=28),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        (*EVERY, *OF_GROUPED_QUERY, "attention_bias"),
        _ALL
        | dict(
            max_position_embeddings=2048,
            num_key_value_heads=None,
            head_dim=None,
            attention_bias=False,
        ),
        dict(rope_interleave=False),
        only=dict(qkv_bias=(False,)),
        dense=True,
        out_bias=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        (*EVERY, *OF_GROUPED_QUERY),
        _ALL | dict(max_position_embeddings=131072, num_key_value_heads=8, head_dim=None),
        dict(rope_interleave=False),
        only=dict(attention_bias=(False,)),
        dense=True,
        window=Window(4096),
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        (*EVERY, *OF_GROUPED_QUERY, "attention_bias", "attention_out_bias"),
        _ALL
        | dict(
            max_position_embeddings=524288,
            num_key_value_heads=8,
            head_dim=128,
            attention_bias=True,
            attention_out_bias=False,
        ),
        # Its releases name dropouts of 0.1, which act in training only, and which ours has none of.
        dict(rope_interleave=False),
        harmless=("attention_dropout", "residual_dropout"),
        dense=True,
    ),
    "youtu": Family(
        "YoutuForCausalLM",
        (*EVERY, *OF_MLA, "rope_interleave"),
        _ALL
        | dict(
            max_position_embeddings=131072,
            initializer_range=None,
            tie_word_embeddings=True,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_interleave=True,
        ),
        {},
        only=dict(attention_bias=(False,)),
        harmless=(*_MLA_KEYS, "embedding_initializer_range"),
        dense=True,
    ),
    "solar_open": Family(
        "SolarOpenForCausalLM",
        (
            *EVERY,
            *OF_GROUPED_QUERY,
            *(k for k in OF_DEEPSEEK_EXPERTS if k != "first_k_dense_replace"),
            "attention_bias",
        ),
        _ALL
        | _EXPERTS
        | dict(
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            max_position_embeddings=131072,
            num_key_value_heads=8,
            head_dim=128,
            attention_bias=False,
            n_routed_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1280,
        ),
        _SIGMOID | dict(rope_interleave=False, first_k_dense_replace=0),
        renamed=dict(num_local_experts="n_routed_experts"),
        only=_ONLY_SIGMOID | dict(first_k_dense_replace=(0,), use_qk_norm=(False,)),
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        (*EVERY, *OF_GROUPED_QUERY, *OF_DEEPSEEK_EXPERTS, "attention_bias"),
        {k: v for k, v in _EXPERTS.items() if k != "n_shared_experts"}
        | _ALL
        | dict(
            max_position_embeddings=2048,
            num_key_value_heads=32,
            head_dim=None,
            attention_bias=False,
            moe_intermediate_size=1408,
            first_k_dense_replace=0,
            norm_topk_prob=False,
        ),
        _SIGMOID | dict(use_qk_norm=True, rope_interleave=False),
        renamed=dict(num_local_experts="n_routed_experts"),
        # transformers has one way to choose, whatever these say; releases call it by either name in
        # scoring_func.
        only=dict(
            scoring_func=("sigmoid", "noaux_tc"), topk_method=("noaux_tc",), use_qk_norm=(True,)
        ),
        out_bias=True,
        window=Window(4096, first=62),
    ),
}
ALIASES = {"kimi_k2": "deepseek_v3"}  # the same model under another name
