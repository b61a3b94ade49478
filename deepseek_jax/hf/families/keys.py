"""Keys of config.json that several families share: options, keys that change nothing, keys with one value.

Defaults are those of transformers' config classes (tests/hf/test_hf_defaults.py compares all of them), which
for DeepSeek-V3 and Kimi-K2 are those of DeepSeek's own class too. A size that every checkpoint states has
none: it is refused by name where it is missing.
"""

from typing import Any

# Keys of every family that change nothing in what a trained model computes, with those that begin with "_"
# (transformers' notes to itself) or end with "_token_id" (which generation reads). `router_aux_loss_coef` is
# a term of transformers' training loss; ours is aux_loss_alpha. config_checks.py looks at the values of
# sliding_window, layer_types and quantization_config.
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

COMMON_OPTIONS = (
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
MLA_OPTIONS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
GROUPED_QUERY_OPTIONS = ("num_key_value_heads", "head_dim")
DEEPSEEK_EXPERT_OPTIONS = (
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

COMMON_DEFAULTS: dict[str, Any] = dict(
    initializer_range=0.02,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    partial_rotary_factor=1.0,
)
EXPERT_DEFAULTS: dict[str, Any] = dict(
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    n_shared_experts=1,
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.0,
    seq_aux=True,
)
SIGMOID_ROUTING: dict[str, Any] = dict(scoring_func="sigmoid", topk_method="noaux_tc")
SOFTMAX_ROUTING: dict[str, Any] = dict(
    scoring_func="softmax",
    topk_method="greedy",
    n_shared_experts=0,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.0,
    seq_aux=True,
)
ONLY_SIGMOID: dict[str, tuple] = dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",))
# A file of an MLA model may have these, and they say nothing of it.
UNUSED_BY_MLA = ("num_key_value_heads", "head_dim")
