"""Tiny DeepSeek models of Hugging Face transformers with the `ModelConfig` that must give the same numbers.

    model, config, state = build("deepseek_v3", seed=0)
    # transformers model (float32, CPU), ModelConfig, {hub name: float32 array}
    ids = pick_ids(model, batch=2, seq=24, seed=0)          # int64 [B, S], clear of routing ties
    logits, loss, grads = hf_logits_loss_grads(model, ids)
    # float32 [B, S, V], float, {hub name: float32 array}

Names are those of the checkpoints on the hub, one entry per expert
(`model.layers.1.mlp.experts.3.gate_proj.weight`), although transformers keeps experts fused in
memory. Gradients have no entry for `e_score_correction_bias`, which is no parameter.

Where transformers departs from DeepSeek's own code, the variants stay where both agree:
- deepseek_v2 ignores norm_topk_prob (so every V2 variant has False), scoring_func (always softmax)
  and rope_interleave (always on).
- deepseek_v2 takes experts of excluded groups out with the score 0.0 instead of minus infinity.
  With softmax scores, which are above 0, and at least k experts in the allowed groups both choose
  the same. (deepseek_v3 of transformers 5.23 uses minus infinity; older ones 0.0, which can differ
  when a biased score is negative.)
- q_a_layernorm and kv_a_layernorm use eps 1e-6 whatever rms_norm_eps is. `deepseek_v3-eps` shows it;
  `moonlight`, with its true 1e-5, hardly does.
- YaRN with only one of mscale and mscale_all_dim given differs from DeepSeek's code; the variants
  give both or neither.
- the deepseek_v3 model class has no MTP layers, whatever num_nextn_predict_layers says:
  `modeling_layers.MtpModel` has them.
"""

import math
import os
import re
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_jax.config.options import ModelConfig, RopeScaling

torch.set_num_threads(1)

# The head widths and ranks all differ, so that mixing two of them up cannot go unseen.
SHAPES = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    max_position_embeddings=128,
)

V2 = dict(
    q_lora_rank=40,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    norm_topk_prob=False,
    routed_scaling_factor=2.5,
)
V3 = dict(
    q_lora_rank=40,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)


def _yarn(mscale, mscale_all_dim):
    return dict(
        rope_scaling=RopeScaling(
            type="yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            mscale=mscale,
            mscale_all_dim=mscale_all_dim,
        )
    )


# name -> (transformers model_type, options of Model beyond SHAPES)
VARIANTS = {
    "deepseek_v2": ("deepseek_v2", V2),
    "deepseek_v2-lite": (
        "deepseek_v2",
        dict(
            V2,
            q_lora_rank=None,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            n_shared_experts=2,
            routed_scaling_factor=1.0,
            **_yarn(0.707, 0.707),
        ),
    ),
    "deepseek_v2-group": (
        "deepseek_v2",
        dict(V2, n_shared_experts=2, routed_scaling_factor=16.0, **_yarn(0.707, 0.707)),
    ),
    "deepseek_v3": ("deepseek_v3", V3),
    "deepseek_v3-noqlora": ("deepseek_v3", dict(V3, q_lora_rank=None)),
    "deepseek_v3-yarn": ("deepseek_v3", dict(V3, **_yarn(1.0, 1.0))),
    "deepseek_v3-yarn-mscale": ("deepseek_v3", dict(V3, norm_topk_prob=False, **_yarn(1.3, 0.6))),
    "deepseek_v3-yarn-plain": ("deepseek_v3", dict(V3, **_yarn(0.0, 0.0))),
    "deepseek_v3-nonorm": ("deepseek_v3", dict(V3, norm_topk_prob=False)),
    "deepseek_v3-halfrope": ("deepseek_v3", dict(V3, rope_interleave=False)),
    "deepseek_v3-tied": ("deepseek_v3", dict(V3, tie_word_embeddings=True)),
    "moonlight": (
        "deepseek_v3",
        dict(
            V3,
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            n_shared_experts=2,
            routed_scaling_factor=2.446,
            rope_theta=50000.0,
            rms_norm_eps=1e-5,
        ),
    ),
    "deepseek_v3-eps": (
        "deepseek_v3",
        dict(V3, rms_norm_eps=0.03),
    ),  # the inner norms of MLA keep 1e-6
    "deepseek_v3-mtp": ("deepseek_v3", dict(V3, num_nextn_predict_layers=2)),
}


def hub_config(variant):
    """config.json of the variant as a checkpoint on the hub writes it (model_type and architectures
    included)."""
    model_type, options = VARIANTS[variant]
    m = ModelConfig(**{**SHAPES, **options})
    not_deepseeks = (
        "head_dim",
        "attention_out_bias",
        "use_qk_norm",
        "partial_rotary_factor",
        "shared_core_rank",
    )
    skip = ("rope_scaling", "rope_interleave", *not_deepseeks)
    c = {name: getattr(m, name) for name in m.__dataclass_fields__ if name not in skip}
    c.update(
        model_type=model_type,
        architectures=[f"Deepseek{model_type[-2:].upper()}ForCausalLM"],
        num_key_value_heads=m.num_attention_heads,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        moe_layer_freq=1,
        use_cache=True,
        bos_token_id=0,
        eos_token_id=1,
        torch_dtype="float32",
    )
    if not m.rope_interleave:
        c["rope_interleave"] = False
    r = m.rope_scaling
    if r.type != "default":
        c["rope_scaling"] = dict(
            type=r.type,
            factor=r.factor,
            beta_fast=r.beta_fast,
            beta_slow=r.beta_slow,
            original_max_position_embeddings=r.original_max_position_embeddings,
        )
        c["rope_scaling"].update(
            {key: getattr(r, key) for key in ("mscale", "mscale_all_dim") if getattr(r, key)}
        )
    return c


def build(variant_name, seed=0):
    """-> (transformers model, deepseek_jax Model, {hub name: float32 array},
    e_score_correction_bias included).

    A variant with MTP has `model.mtp`, a transformers MtpModel that shares the embedding, the head
    and the rotary tables; its weights are in the dict as `model.layers.{num_hidden_layers + depth -
    1}.*`, without the copies of embedding and head that V3's files have there. A tied variant has
    no `lm_head.weight`.
    """
    c = hub_config(variant_name)
    options = {
        k: v for k, v in c.items() if k not in ("model_type", "architectures", "torch_dtype")
    }
    kernels = dict(attn_implementation="eager", experts_implementation="eager")
    hf_config = AutoConfig.for_model(c["model_type"], **options)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, **kernels).eval()
    randomise(model, seed)
    config = ModelConfig(**{**SHAPES, **VARIANTS[variant_name][1]})
    if config.num_nextn_predict_layers:
        from transformers.modeling_layers import MtpModel

        mtp = MtpModel(model, config.num_nextn_predict_layers).eval()
        randomise(mtp.layers, seed + 1)
        model.__dict__["mtp"] = (
            mtp  # not a submodule: the model's own parameters and state stay what they are
        )
    return model, config, hub_state(model)


@torch.no_grad()
def randomise(module, seed):
    """Weights large enough that every term matters; transformers' own (norms 1, biases 0, std 0.02)
    would hide mistakes."""
    tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
    for name, p in list(module.named_parameters()) + list(module.named_buffers()):
        if "inv_freq" in name:
            continue
        g = torch.Generator().manual_seed((seed * 1000003 + zlib.crc32(name.encode())) % 2**63)
        if name.endswith("e_score_correction_bias"):
            p.copy_(torch.randn(p.shape, generator=g) * 0.15)
        elif p.ndim == 1:
            p.copy_(0.5 + torch.rand(p.shape, generator=g))
        elif "embed_tokens" in name and not tied:
            p.copy_(torch.randn(p.shape, generator=g))
        else:
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(p.shape[-1]))
    if hasattr(module, "tie_weights"):
        module.tie_weights()


def _named(model, parameters_only):
    """(hub name, tensor) of all that a checkpoint holds, experts still fused."""

    def of(module):
        return (
            module.named_parameters()
            if parameters_only
            else module.state_dict(keep_vars=True).items()
        )

    for name, t in of(model):
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield name, t
    if "mtp" in model.__dict__:
        first = model.config.num_hidden_layers
        for depth, layer in enumerate(model.mtp.layers):
            for name, t in of(layer):
                name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
                yield f"model.layers.{first + depth}.{name}", t


def _hub(named):
    """{hub name: float32 array} of (name, array) pairs with fused experts."""
    out = {}
    for name, a in named:
        fused = re.match(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$", name)
        if not fused:
            out[name] = np.array(a, np.float32)
            continue
        for e in range(a.shape[0]):
            if fused[2] == "down_proj":
                out[f"{fused[1]}.{e}.down_proj.weight"] = np.array(a[e], np.float32)
            else:
                gate, up = np.split(np.array(a[e], np.float32), 2, axis=0)
                out[f"{fused[1]}.{e}.gate_proj.weight"], out[f"{fused[1]}.{e}.up_proj.weight"] = (
                    gate.copy(),
                    up.copy(),
                )
    return out


def hub_state(model):
    """All weights of a model of `build` (MTP included) as {hub name: float32 array}."""
    return _hub((name, t.detach().numpy()) for name, t in _named(model, False))


# --------------------------------------------------------------------------------------- running it


def _gates(model):
    layers = list(model.model.layers) + (
        [layer.mtp_block for layer in model.mtp.layers] if "mtp" in model.__dict__ else []
    )
    return [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]


def _margins(gate, logits, config):
    """How far each token's choice of groups and experts is from a tie: [tokens]."""
    k, groups, kept = config.num_experts_per_tok, config.n_group, config.topk_group
    v3 = hasattr(gate, "e_score_correction_bias")
    s = (
        logits.double().sigmoid() + gate.e_score_correction_bias.double()
        if v3
        else logits.double().softmax(-1)
    )
    margin = torch.full(s.shape[:1], float("inf"), dtype=torch.float64)
    if kept < groups and (v3 or config.topk_method == "group_limited_greedy"):
        g = s.view(len(s), groups, -1)
        best = g.topk(2, -1).values.sum(-1) if v3 else g.max(-1).values
        order = best.sort(-1, descending=True)
        margin = order.values[:, kept - 1] - order.values[:, kept]
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(
            1, order.indices[:, :kept], True
        )
        s = s.masked_fill(~allowed.repeat_interleave(g.shape[-1], 1), float("-inf"))
    order = s.sort(-1, descending=True).values
    return torch.minimum(margin, order[:, k - 1] - order[:, k])


@torch.no_grad()
def routing_margins(model, ids):
    """Smallest margin of all routing decisions of each sequence, MTP depths included: float64 [B]."""
    ids = torch.as_tensor(ids)
    seen, hooks = (
        [],
        [
            gate.register_forward_hook(lambda g, _, out: seen.append((g, out[0])))
            for gate in _gates(model)
        ],
    )
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    if "mtp" in model.__dict__:
        _mtp_logits(model, ids, hidden)
    for hook in hooks:
        hook.remove()
    worst = torch.full((len(ids),), float("inf"), dtype=torch.float64)
    for gate, logits in seen:
        worst = torch.minimum(
            worst, _margins(gate, logits, model.config).view(len(ids), -1).min(-1).values
        )
    return worst.numpy()


def pick_ids(model, batch=2, seq=24, seed=0, candidates=256):
    """Token ids int64 [batch, seq]: of many random sequences those whose routing decisions are
    furthest from a tie.

    The margin is well above float32 rounding, so that another framework cannot choose other experts
    (`test_reference.py` asserts that it is above 1e-4 for the default arguments).
    """
    generator = torch.Generator().manual_seed(seed * 1000 + 77)
    ids = torch.randint(0, model.config.vocab_size, (candidates, seq), generator=generator).numpy()
    return ids[np.argsort(-routing_margins(model, ids), kind="stable")[:batch]]


def _mtp_logits(model, ids, hidden):
    """transformers' MTP layers over whole sequences: one [B, S - depth, V] a depth; row i predicts
    token i + 1 + depth."""
    from transformers.cache_utils import MtpCache

    cache, out = MtpCache(config=model.config.get_mtp_config()), []
    for depth in range(1, model.mtp.num_mtp_layers + 1):
        positions = torch.arange(depth, ids.shape[1])[None].expand(len(ids), -1)
        hidden = model.mtp.forward_layer(
            depth - 1, hidden[:, : ids.shape[1] - depth], positions, cache, input_ids=ids[:, depth:]
        )
        out.append(model.mtp.shared_head(hidden))
    return out


def hf_mtp_logits(model, ids):
    """[float32 [B, S - depth, V] for depth 1, 2, ...] of a variant with MTP; row i predicts token i
    + 1 + depth."""
    ids = torch.as_tensor(ids)
    with torch.no_grad():
        return [
            a.numpy()
            for a in _mtp_logits(
                model, ids, model.model(input_ids=ids, use_cache=False).last_hidden_state
            )
        ]


def hf_logits_loss_grads(model, ids, mtp_loss_weight=0.0):
    """ids int64 [B, S] -> (logits float32 [B, S, V], loss, {hub name: gradient}).

    loss = mean cross entropy of token i + 1 (each sequence's last position has no target), plus
    mtp_loss_weight x the mean over depths of the mean cross entropy of token i + 1 + depth.
    Parameters without a gradient have zeros; with mtp_loss_weight 0 so have MTP's.
    """
    ids = torch.as_tensor(ids)
    model.zero_grad(set_to_none=True)
    if "mtp" in model.__dict__:
        model.mtp.zero_grad(set_to_none=True)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)

    def loss_of(logits, ahead):
        return torch.nn.functional.cross_entropy(
            logits[:, : ids.shape[1] - ahead].flatten(0, 1), ids[:, ahead:].flatten()
        )

    loss = loss_of(logits, 1)
    if mtp_loss_weight:
        depths = _mtp_logits(model, ids, hidden)
        loss = loss + mtp_loss_weight * sum(loss_of(a, d + 2) for d, a in enumerate(depths)) / len(
            depths
        )
    loss.backward()
    grads = _hub(
        (name, (torch.zeros_like(p) if p.grad is None else p.grad).numpy())
        for name, p in _named(model, True)
    )
    return logits.detach().numpy(), loss.item(), grads
