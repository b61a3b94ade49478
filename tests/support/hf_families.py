"""Tiny models of Hugging Face transformers in the families beyond DeepSeek's (those:
hf_variants.py), in folders as on the hub.

theirs = build("qwen3", seed=0)                  # transformers model, float32
config = hub_config("qwen3")                     # config.json in the keys of checkpoints on the hub
choices, logits, loss, grads = run(theirs, ids)
    # {layer: sorted experts [B*S, K]}, [B, S, V], float, {hub name: gradient}
"""

import json
import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import safetensors.numpy
import torch
import transformers

from tests.support import hf_variants

transformers.utils.logging.disable_progress_bar()

# Heads are 20 wide where head_dim is given and 12 where it follows; ranks and widths all differ.
SHAPES = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act="silu",
    max_position_embeddings=128,
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    attention_dropout=0.0,
    use_cache=True,
    tie_word_embeddings=False,
    torch_dtype="float32",
    bos_token_id=0,
    eos_token_id=1,
    transformers_version="4.44.0",
)
EXPERTS = dict(num_experts_per_tok=3, moe_intermediate_size=28)
GLM = dict(
    model_type="glm4_moe",
    architectures=["Glm4MoeForCausalLM"],
    head_dim=20,
    partial_rotary_factor=0.4,
    use_qk_norm=False,
    attention_bias=True,
    n_routed_experts=8,
    n_shared_experts=1,
    norm_topk_prob=True,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.5,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    rms_norm_eps=1e-5,
    **EXPERTS,
)
QWEN3_MOE = dict(
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    head_dim=20,
    num_experts=8,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[0],
    router_aux_loss_coef=0.001,
    output_router_logits=False,
    use_sliding_window=False,
    sliding_window=None,
    attention_bias=False,
    **EXPERTS,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
DOTS1 = dict(
    model_type="dots1",
    architectures=["Dots1ForCausalLM"],
    n_routed_experts=8,
    n_shared_experts=1,
    norm_topk_prob=True,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
    first_k_dense_replace=1,
    attention_bias=True,
    sliding_window=None,
    **EXPERTS,
)
SOLAR = dict(
    model_type="solar_open",
    architectures=["SolarOpenForCausalLM"],
    head_dim=20,
    n_routed_experts=8,
    n_shared_experts=1,
    norm_topk_prob=True,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.5,
    attention_bias=True,
    rope_scaling=YARN,
    **EXPERTS,
)
YOUTU = dict(
    model_type="youtu",
    architectures=["YoutuForCausalLM"],
    num_key_value_heads=4,
    q_lora_rank=40,
    kv_lora_rank=32,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    rope_interleave=True,
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
)

# name -> the keys of config.json beyond SHAPES
VARIANTS = {
    "glm4_moe": GLM,
    "glm4_moe-qknorm-group": dict(GLM, use_qk_norm=True, n_group=4, topk_group=2),
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe-nonorm": dict(QWEN3_MOE, norm_topk_prob=False, rope_scaling=YARN),
    "mixtral": dict(
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        output_router_logits=False,
        sliding_window=None,
        rope_theta=1e6,
        intermediate_size=28,
    ),
    "qwen2-tied": dict(
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        use_sliding_window=False,
        sliding_window=None,
        tie_word_embeddings=True,
        rope_scaling=dict(type="linear", factor=2.0),
    ),
    "qwen3": dict(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        head_dim=20,
        attention_bias=False,
        use_sliding_window=False,
        sliding_window=None,
    ),
    "llama": dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        attention_bias=True,
        mlp_bias=False,
        pretraining_tp=1,
        rope_scaling=LLAMA3,
    ),
    "mistral": dict(
        model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None, head_dim=20
    ),
    "seed_oss": dict(
        model_type="seed_oss",
        architectures=["SeedOssForCausalLM"],
        head_dim=20,
        attention_bias=True,
        attention_out_bias=True,
        residual_dropout=0.1,
        attention_dropout=0.1,
        mlp_bias=False,
    ),
    "youtu": YOUTU,
    "solar_open": SOLAR,
    "dots1": DOTS1,
}


def hub_config(variant):
    """config.json of the variant, as a checkpoint on the hub has it."""
    return SHAPES | VARIANTS[variant]


def save(variant, folder):
    """Writes the checkpoint of a variant of this file or of hf_variants, with config.json as on the
    hub -> its transformers model."""
    if variant in VARIANTS:
        theirs, config = build(variant), hub_config(variant)
        theirs.save_pretrained(folder)
    else:
        theirs, _, tensors = hf_variants.build(variant)
        config = hf_variants.hub_config(variant)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


def build(variant, seed=0):
    """The transformers model, with weights so large that every term matters."""
    keys = {
        k: v
        for k, v in hub_config(variant).items()
        if k not in ("model_type", "architectures", "torch_dtype", "transformers_version")
    }
    config = transformers.AutoConfig.for_model(VARIANTS[variant]["model_type"], **keys)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    hf_variants.randomise(model, seed)
    return model.eval()


def hub_names(model, named):
    """{hub name: float32 array} of (name, array) pairs with fused experts."""
    out = hf_variants._hub(named)
    if model.config.model_type != "mixtral":
        return out
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def new(name):
        return re.sub(
            r"(experts\.\d+\.)(\w+)",
            lambda m: m[1] + parts[m[2]],
            name.replace(".mlp.", ".block_sparse_moe."),
        )

    return {new(name): a for name, a in out.items()}


def run(model, ids):
    """(sorted experts of every token, by layer; logits; mean cross entropy of the next token; gradients)."""
    seen, hooks = {}, []
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):

            def keep(_, __, out, i=i):
                return seen.__setitem__(i, np.sort(out[2].detach().numpy(), axis=-1))

            hooks.append(layer.mlp.gate.register_forward_hook(keep))
    model.zero_grad(set_to_none=True)
    out = model(input_ids=torch.as_tensor(ids), labels=torch.as_tensor(ids), use_cache=False)
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    tied = model.config.tie_word_embeddings
    named = [
        (n, (torch.zeros_like(p) if p.grad is None else p.grad).numpy())
        for n, p in model.named_parameters()
    ]
    named = [(n, g) for n, g in named if not (tied and n == "lm_head.weight")]
    return seen, out.logits.detach().numpy(), out.loss.item(), hub_names(model, named)


def pick_ids(model, batch=2, seq=24, seed=0, candidates=64):
    """Token ids int64 [batch, seq]: the sequences whose choices of experts are furthest from a tie."""
    ids = torch.randint(
        0,
        model.config.vocab_size,
        (candidates, seq),
        generator=torch.Generator().manual_seed(seed + 5),
    ).numpy()
    margins = np.full(candidates, np.inf)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]

    def note(gate, _, out):
        nonlocal margins
        scores = out[0].detach().double()
        bias = getattr(gate, "e_score_correction_bias", None)
        scores = scores.softmax(-1) if bias is None else scores.sigmoid() + bias
        groups = getattr(gate, "num_group", 1)
        if (
            groups > 1
        ):  # the groups' own choice, and every difference of two scores: more than needed
            best = (
                scores.view(len(scores), groups, -1)
                .topk(2, -1)
                .values.sum(-1)
                .sort(-1, descending=True)
                .values
            )
            margins = np.minimum(
                margins,
                (best[:, gate.topk_group - 1] - best[:, gate.topk_group])
                .view(candidates, -1)
                .min(-1)
                .values.numpy(),
            )
            order = scores.sort(-1).values
            margin = (order[:, 1:] - order[:, :-1]).min(-1).values
        else:
            order = scores.sort(-1, descending=True).values
            margin = order[:, gate.top_k - 1] - order[:, gate.top_k]
        margins = np.minimum(margins, margin.view(candidates, -1).min(-1).values.numpy())

    hooks = [gate.register_forward_hook(note) for gate in gates]
    with torch.no_grad():
        model.model(input_ids=torch.as_tensor(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    return ids[np.argsort(-margins, kind="stable")[:batch]]
