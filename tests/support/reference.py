"""The model and its losses in straight-line NumPy float64: what every faster implementation is
tested against.

Nothing here is batched, fused, sharded or clever; the loops over tokens, heads and experts are
intended. There is no JAX. `test_reference.py` checks this file against Hugging Face transformers, so
that it is itself a tested reference.

Conventions
- Sizes in names: B sequences, S positions of one sequence, T tokens, D hidden_size, H heads, R
  qk_rope_head_dim, E routed experts, k experts per token, V vocabulary.
- Weights: a dict of arrays under the names and in the orientation [out, in] of a Hugging Face
  checkpoint, one entry per expert. The functions of a whole model take full names
  (`model.layers.0.self_attn.o_proj.weight`); the functions of one layer take names below the layer
  (`self_attn.o_proj.weight`, `mlp.gate.weight`), which `layer_weights(weights, i)` gives.
- Model: `deepseek_jax.config.options.ModelConfig`.
- Segment ids: positions attend only within their own segment; 0 is padding, whose rows are
  don't-care (but finite).
- Input of any float dtype is taken to float64 first.

The usual way in:

    out = batch(tokens_BS, weights, model)
    out.logits, out.routing[j].chosen, out.mtp[d - 1].logits
"""

import math
from typing import NamedTuple

import numpy as np

IGNORE = -100  # a target that does not count
# of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says (Hugging Face and DeepSeek's own
# code)
INNER_EPS = 1e-6


class Routing(NamedTuple):
    """What one MoE layer decided. Arrays are [T, .], or [B, S, .] from `batch`; k in falling order
    of the selection score."""

    logits: np.ndarray  # [T, E] router logits
    scores: np.ndarray  # [T, E] sigmoid or softmax of them, without selection bias
    chosen: np.ndarray  # [T, k] int, chosen experts
    weights: np.ndarray  # [T, k] their combine weights


class MtpOutput(NamedTuple):
    """One depth of multi-token prediction. Rows where `valid` is False are don't-care."""

    hidden: (
        np.ndarray
    )  # [S, D] after shared_head.norm: what the head reads and what the next depth is fed
    logits: np.ndarray  # [S, V] row i predicts token i + 1 + depth
    valid: np.ndarray  # [S] bool: token i + depth exists and is in the segment of token i
    routing: Routing


class Output(NamedTuple):
    """A whole forward pass of one sequence, or of a batch with a leading B."""

    hidden: np.ndarray  # [S, D] after the final norm
    logits: np.ndarray  # [S, V]
    routing: list  # one Routing a MoE layer of the main model, first to last (the dense layers have none)
    mtp: list  # one MtpOutput a depth, num_nextn_predict_layers of them


# -------------------------------------------------------------------------------------- small parts


def float64(weights):
    """The dict with every array in float64."""
    return {name: np.asarray(w, np.float64) for name, w in weights.items()}


def layer_weights(weights, layer):
    """The entries of `model.layers.{layer}.`, without that prefix. MTP depth d is layer
    num_hidden_layers + d - 1."""
    prefix = f"model.layers.{layer}."
    found = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
    assert found, f"no weights under {prefix}"
    return found


def linear(x, weight):
    """x [..., in], weight [out, in] -> [..., out]."""
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


def rms_norm(x, w, eps):
    """x [..., D] / root mean square of x over D (eps inside the root), times w [D]."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(w, np.float64)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def logsumexp(x):
    """Over the last axis."""
    m = np.max(x, axis=-1)
    return m + np.log(np.sum(np.exp(x - m[..., None]), axis=-1))


# --------------------------------------------------------------------------------- rotary embedding


def yarn_mscale(factor, mscale):
    """DeepSeek's and Hugging Face's yarn_get_mscale."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(model):
    """-> (radians per position of each pair [R/2], factor on cos and sin).

    YaRN (arXiv:2309.00071) as in Hugging Face: frequencies that turn more than beta_fast times over
    the original context stay, those that turn less than beta_slow times are divided by `factor`,
    with a linear ramp over the pair index in between. The factor on cos and sin is m(mscale) /
    m(mscale_all_dim) if both are given (not 0), and otherwise m(1). (DeepSeek's own code agrees
    when both or neither are given; with only one of them, which no released model has, it would
    divide m(mscale) by m(mscale_all_dim) with the defaults 1 and 0.)
    """
    width, base, r = model.qk_rope_head_dim, model.rope_theta, model.rope_scaling
    kept = np.array([base ** (-2.0 * j / width) for j in range(width // 2)])
    if r.type == "default":
        return kept, 1.0
    assert r.type == "yarn", r.type

    def pair_that_turns(
        times,
    ):  # pair index (a real number) that makes so many turns over the original context
        return (
            width
            * math.log(r.original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(base))
        )

    low = max(math.floor(pair_that_turns(r.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(r.beta_slow)), width - 1)
    if low == high:
        high += 0.001
    frequencies = np.empty(width // 2)
    for j in range(width // 2):
        divided = min(max((j - low) / (high - low), 0.0), 1.0)
        frequencies[j] = (1.0 - divided) * kept[j] + divided * kept[j] / r.factor
    if r.mscale and r.mscale_all_dim:
        scale = yarn_mscale(r.factor, r.mscale) / yarn_mscale(r.factor, r.mscale_all_dim)
    else:
        scale = yarn_mscale(r.factor, 1.0)
    return frequencies, scale


def rope_tables(model, positions):
    """positions [S] -> cos, sin [S, R/2], YaRN's factor included."""
    frequencies, scale = rope_frequencies(model)
    angle = np.asarray(positions, np.float64)[:, None] * frequencies[None, :]
    return np.cos(angle) * scale, np.sin(angle) * scale


def apply_rope(x, cos, sin, interleave):
    """Rotates pair j of x [S, ..., R] by the angles of cos, sin [S, R/2].

    Pair j is (x[2j], x[2j+1]) if `interleave`, else (x[j], x[j + R/2]). The result stays in the
    places of the input. (Hugging Face's deepseek_v3 puts interleaved pairs out as halves instead:
    another order of the same numbers for q and for k, so that no dot product changes. An
    implementation may do either; compare scores or sort before comparing rotated q or k.)
    """
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    shape = (cos.shape[0],) + (1,) * (x.ndim - 2) + (half,)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., :half], x[..., half:])
    a, b = first * cos - second * sin, second * cos + first * sin
    out = np.empty_like(x)
    if interleave:
        out[..., 0::2], out[..., 1::2] = a, b
    else:
        out[..., :half], out[..., half:] = a, b
    return out


def softmax_scale(model):
    """What q . k is multiplied by: 1/sqrt(nope + rope width), times m(mscale_all_dim)^2 under YaRN
    if that is given."""
    scale = (model.qk_nope_head_dim + model.qk_rope_head_dim) ** -0.5
    r = model.rope_scaling
    if r.type == "yarn" and r.mscale_all_dim:
        scale *= yarn_mscale(r.factor, r.mscale_all_dim) ** 2
    return scale


# ---------------------------------------------------------------------------------------- attention


def mla(x_SD, weights, model, positions_S=None, segment_ids_S=None):
    """Multi-head latent attention of one sequence: x [S, D] -> [S, D]. `weights` has `self_attn.*` names.

    Position i attends to j <= i of its own segment. positions_S defaults to 0 .. S-1, segment_ids_S
    to one segment.
    """
    x_SD = np.asarray(x_SD, np.float64)
    S = x_SD.shape[0]
    positions_S = np.arange(S) if positions_S is None else np.asarray(positions_S)
    segment_ids_S = np.ones(S, int) if segment_ids_S is None else np.asarray(segment_ids_S)
    H, nope, rope, width = (
        model.num_attention_heads,
        model.qk_nope_head_dim,
        model.qk_rope_head_dim,
        model.v_head_dim,
    )

    def w(name):
        return weights[f"self_attn.{name}.weight"]

    if model.q_lora_rank is None:
        q = linear(x_SD, w("q_proj"))
    else:
        q = linear(
            rms_norm(linear(x_SD, w("q_a_proj")), w("q_a_layernorm"), INNER_EPS), w("q_b_proj")
        )
    q = q.reshape(S, H, nope + rope)
    compressed = linear(x_SD, w("kv_a_proj_with_mqa"))
    latent, k_rope = compressed[:, : model.kv_lora_rank], compressed[:, model.kv_lora_rank :]
    kv = linear(rms_norm(latent, w("kv_a_layernorm"), INNER_EPS), w("kv_b_proj")).reshape(
        S, H, nope + width
    )
    k_nope, v = kv[:, :, :nope], kv[:, :, nope:]

    cos, sin = rope_tables(model, positions_S)
    q_nope, q_rope = q[:, :, :nope], apply_rope(q[:, :, nope:], cos, sin, model.rope_interleave)
    k_rope = apply_rope(k_rope, cos, sin, model.rope_interleave)  # [S, R], shared by the heads

    out = np.zeros((S, H, width))
    for i in range(S):
        seen = [j for j in range(i + 1) if segment_ids_S[j] == segment_ids_S[i]]
        for h in range(H):
            logits = k_nope[seen, h] @ q_nope[i, h] + k_rope[seen] @ q_rope[i, h]
            out[i, h] = softmax(logits * softmax_scale(model)) @ v[seen, h]
    return linear(out.reshape(S, H * width), w("o_proj"))


# ------------------------------------------------------------------------------- experts and router


def top(values, count):
    """Indices of the `count` largest values, largest first; of equal ones the first."""
    return np.argsort(-np.asarray(values), kind="stable")[:count]


def route(x_TD, gate_weight, bias_E, model):
    """x [T, D], gate_weight [E, D], bias_E [E] or None -> (scores [T, E], chosen [T, k], weights [T, k]).

    topk_method
    - greedy: the k largest scores; groups and bias play no part.
    - group_limited_greedy (V2): from the topk_group groups with the largest maximum; the bias plays no part.
    - noaux_tc (V3): by score + bias, from the topk_group groups with the largest sum of their two
      best; experts of other groups are out (minus infinity). The weights are of the scores without
      bias.
    weights = chosen scores, divided by their sum + 1e-20 if norm_topk_prob, then times
    routed_scaling_factor always. (DeepSeek-V2's own code leaves that factor out when norm_topk_prob
    is True; no released V2 sets it. Hugging Face's deepseek_v2 ignores norm_topk_prob.)
    """
    logits = linear(x_TD, gate_weight)
    T, E, k = logits.shape[0], logits.shape[1], model.num_experts_per_tok
    scores = sigmoid(logits) if model.scoring_func == "sigmoid" else softmax(logits)
    chosen, weights = np.zeros((T, k), int), np.zeros((T, k))
    for t in range(T):
        selection = scores[t].copy()
        if model.topk_method == "noaux_tc" and bias_E is not None:
            selection = selection + np.asarray(bias_E, np.float64)
        if model.topk_method != "greedy":
            members = np.arange(E).reshape(model.n_group, E // model.n_group)
            if model.topk_method == "noaux_tc":
                group_scores = [np.sort(selection[m])[-2:].sum() for m in members]
            else:
                group_scores = [selection[m].max() for m in members]
            allowed = members[top(group_scores, model.topk_group)].reshape(-1)
            for e in range(E):
                if e not in allowed:
                    selection[e] = -np.inf
        chosen[t] = top(selection, k)
        weights[t] = scores[t, chosen[t]]
        if model.norm_topk_prob:
            weights[t] /= weights[t].sum() + 1e-20
    return scores, chosen, weights * model.routed_scaling_factor


def routing_margin(x_TD, gate_weight, bias_E, model):
    """How far every decision of `route` is from a tie -> [T]: the smaller of the margins of experts
    and of groups."""
    scores, chosen, _ = route(x_TD, gate_weight, bias_E, model)
    T, E = scores.shape
    biased = model.topk_method == "noaux_tc" and bias_E is not None
    out = np.full(T, np.inf)
    for t in range(T):
        selection = scores[t] + (np.asarray(bias_E, np.float64) if biased else 0.0)
        allowed = np.ones(E, bool)
        if model.topk_method != "greedy" and model.topk_group < model.n_group:
            groups = selection.reshape(model.n_group, -1)
            best = (
                np.sort(groups, axis=1)[:, -2:].sum(1)
                if model.topk_method == "noaux_tc"
                else groups.max(1)
            )
            order = top(best, model.n_group)
            out[t] = best[order[model.topk_group - 1]] - best[order[model.topk_group]]
            allowed = np.repeat(
                np.isin(np.arange(model.n_group), order[: model.topk_group]), E // model.n_group
            )
        rejected = allowed & ~np.isin(np.arange(E), chosen[t])
        if rejected.any():
            out[t] = min(out[t], selection[chosen[t]].min() - selection[rejected].max())
    return out


def mlp(x, weights, prefix="mlp."):
    """SwiGLU: x [..., D] -> [..., D], weights `{prefix}{gate,up,down}_proj.weight`."""
    gate, up = (
        linear(x, weights[f"{prefix}gate_proj.weight"]),
        linear(x, weights[f"{prefix}up_proj.weight"]),
    )
    return linear(silu(gate) * up, weights[f"{prefix}down_proj.weight"])


def moe(x_TD, weights, model):
    """A mixture-of-experts layer -> (y [T, D], counts [E] of assignments, Routing). `weights` has
    `mlp.*` names.

    The shared experts are one SwiGLU of n_shared_experts times the width of an expert, for every token.
    """
    x_TD = np.asarray(x_TD, np.float64)
    gate, bias = weights["mlp.gate.weight"], weights.get("mlp.gate.e_score_correction_bias")
    scores, chosen, combine = route(x_TD, gate, bias, model)
    y, counts = np.zeros_like(x_TD), np.zeros(model.n_routed_experts, int)
    for t in range(x_TD.shape[0]):
        for e, weight in zip(chosen[t], combine[t], strict=True):
            y[t] += weight * mlp(x_TD[t], weights, f"mlp.experts.{e}.")
            counts[e] += 1
    if model.n_shared_experts:
        y += mlp(x_TD, weights, "mlp.shared_experts.")
    return y, counts, Routing(linear(x_TD, gate), scores, chosen, combine)


# ---------------------------------------------------------------------------------------- the model


def decoder_layer(x_SD, weights, model, dense, positions_S=None, segment_ids_S=None):
    """One pre-norm block: x [S, D] -> (x [S, D], Routing or None). `weights` has names below the
    layer; `dense`: no experts."""
    eps = model.rms_norm_eps
    x_SD = np.asarray(x_SD, np.float64)
    x_SD = x_SD + mla(
        rms_norm(x_SD, weights["input_layernorm.weight"], eps),
        weights,
        model,
        positions_S,
        segment_ids_S,
    )
    h = rms_norm(x_SD, weights["post_attention_layernorm.weight"], eps)
    if dense:
        return x_SD + mlp(h, weights), None
    y, _, routing = moe(h, weights, model)
    return x_SD + y, routing


def head(hidden, weights, model):
    """hidden [..., D], normed -> logits [..., V]."""
    return linear(
        hidden,
        weights["model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"],
    )


def transformer(tokens_S, weights, model, positions_S=None, segment_ids_S=None):
    """One sequence through the model and all its MTP depths -> Output. `weights` has full names."""
    weights = float64(weights)
    x = weights["model.embed_tokens.weight"][np.asarray(tokens_S)]
    routings = []
    for i in range(model.num_hidden_layers):
        dense = i < model.first_k_dense_replace
        x, routing = decoder_layer(
            x, layer_weights(weights, i), model, dense, positions_S, segment_ids_S
        )
        if not dense:
            routings.append(routing)
    hidden = rms_norm(x, weights["model.norm.weight"], model.rms_norm_eps)
    depths, fed = [], hidden
    for depth in range(1, model.num_nextn_predict_layers + 1):
        depths.append(mtp(fed, tokens_S, weights, model, depth, positions_S, segment_ids_S))
        fed = depths[-1].hidden
    return Output(hidden, head(hidden, weights, model), routings, depths)


def mtp(hidden_SD, tokens_S, weights, model, depth, positions_S=None, segment_ids_S=None):
    """Depth 1, 2, ... of multi-token prediction (DeepSeek-V3 report, section 2.2) -> MtpOutput.
    `weights` has full names.

        h'_i = eh_proj [ enorm(Emb(t_{i+depth})) ; hnorm(hidden_i) ]   embedding first
        hidden_i, fed to the next depth = shared_head.norm(decoder layer (always MoE) of h')
        logits_i = the main model's output head of that, predicting t_{i+1+depth}

    WHAT `hidden_SD` IS: at depth 1 the main model's output AFTER its final norm (`model.norm`); at
    depth d the output of depth d - 1 AFTER its shared_head.norm. So hnorm normalises a second time.
    The report's formulas leave this open; the public code:
    - main model to depth 1: after `model.norm` everywhere. transformers `MtpModel` is given
      `hidden_states[-1]`, the final norm's output; vLLM and SGLang hand over what the model's
      forward returns, which ends with `self.norm`; Megatron-LM's TransformerBlock applies its
      final_layernorm before the MTP block (has_final_layernorm_in_this_stage).
    - depth to depth: after `shared_head.norm` in Megatron-LM (`_postprocess` ends every layer),
      transformers (`post_norm`), SGLang (`deepseek_nextn.py`) and vLLM since PR 45895 / 47448; vLLM
      before that recycled the state before that norm. The released V3 has one depth only, so its
      weights do not decide this one.
    - order of the concatenation: embedding first in all four, against the report's formula; the
      released weights have this order (Megatron-LM issue 1588).
    - vLLM alone sets the embedding to zero where the position is 0; nobody else does, and neither does this.

    The block's layer index in the checkpoint is num_hidden_layers + depth - 1: enorm, hnorm,
    eh_proj, shared_head.norm and the decoder layer. Embedding and output head are the main model's
    own. Positions are those of token i; taking those of token i + depth (transformers) changes
    nothing, as rotation is relative. The last `depth` positions of every segment have no token i +
    depth of their own: they are not valid, and being last they influence no valid one.
    """
    weights, eps, S = float64(weights), model.rms_norm_eps, len(tokens_S)
    segments = np.ones(S, int) if segment_ids_S is None else np.asarray(segment_ids_S)
    w = layer_weights(weights, model.num_hidden_layers + depth - 1)
    embedded = np.zeros((S, model.hidden_size))
    valid = np.zeros(S, bool)
    for i in range(S - depth):
        embedded[i] = weights["model.embed_tokens.weight"][tokens_S[i + depth]]
        valid[i] = segments[i] != 0 and segments[i + depth] == segments[i]
    both = [rms_norm(embedded, w["enorm.weight"], eps), rms_norm(hidden_SD, w["hnorm.weight"], eps)]
    x = linear(np.concatenate(both, axis=-1), w["eh_proj.weight"])
    x, routing = decoder_layer(x, w, model, False, positions_S, segment_ids_S)
    hidden = rms_norm(x, w["shared_head.norm.weight"], eps)
    return MtpOutput(hidden, head(hidden, weights, model), valid, routing)


def batch(tokens_BS, weights, model, positions_BS=None, segment_ids_BS=None):
    """`transformer` of every sequence, with every array of its Output stacked to a leading B."""
    B = len(tokens_BS)
    rows = [
        transformer(
            tokens_BS[b],
            weights,
            model,
            None if positions_BS is None else positions_BS[b],
            None if segment_ids_BS is None else segment_ids_BS[b],
        )
        for b in range(B)
    ]

    def stack(items):
        if isinstance(items[0], np.ndarray):
            return np.stack(items)
        if isinstance(items[0], list):
            return [stack(group) for group in zip(*items, strict=True)]
        return type(items[0])(*[stack(group) for group in zip(*items, strict=True)])

    return stack(rows)


def segment_positions(segment_ids):
    """segment ids [..., S] -> positions [..., S] that start at 0 in every run of equal ids."""
    ids = np.asarray(segment_ids)
    out = np.zeros_like(ids)
    for i in range(1, ids.shape[-1]):
        out[..., i] = np.where(ids[..., i] == ids[..., i - 1], out[..., i - 1] + 1, 0)
    return out


# ------------------------------------------------------------------------------------------- losses


def targets_ahead(tokens_BS, ahead=1, segment_ids_BS=None):
    """tokens [..., S] -> targets [..., S]: token i + ahead, or -100 where there is none in the
    segment of token i.

    ahead = 1 for the main model, 1 + depth for MTP.
    """
    tokens = np.asarray(tokens_BS)
    segments = np.ones_like(tokens) if segment_ids_BS is None else np.asarray(segment_ids_BS)
    out = np.full(tokens.shape, IGNORE)
    for i in range(tokens.shape[-1] - ahead):
        same = (segments[..., i] != 0) & (segments[..., i] == segments[..., i + ahead])
        out[..., i] = np.where(same, tokens[..., i + ahead], IGNORE)
    return out


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits [..., V])[target] over the targets [...] that are not -100; 0 if
    there is none."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    losses = [
        logsumexp(row) - row[target]
        for row, target in zip(logits, targets, strict=True)
        if target != IGNORE
    ]
    return float(np.mean(losses)) if losses else 0.0


def expert_counts(chosen, mask, n_routed_experts):
    """Assignments [E] of the tokens that `mask` [...] marks; chosen [..., k]."""
    counts = np.zeros(n_routed_experts, int)
    for experts in np.asarray(chosen)[np.asarray(mask, bool)]:
        for e in experts:
            counts[e] += 1
    return counts


def _balance(scores_TE, chosen_Tk, model):
    """Sum over experts of f_e P_e of T tokens: f_e = E / (k T) x assignments, P_e = mean of score_e
    / sum of a token's scores."""
    T, E = scores_TE.shape
    f = expert_counts(chosen_Tk, np.ones(T, bool), E) * E / (model.num_experts_per_tok * T)
    p = np.mean(scores_TE / scores_TE.sum(axis=-1, keepdims=True), axis=0)
    return float(np.sum(f * p))


def sequence_balance_loss(scores_BSE, chosen_BSk, mask_BS, model):
    """V3's sequence-wise balance loss (report, equations 17-20) of one layer, times aux_loss_alpha.

    The mean, over the sequences that have any, of `_balance` of each sequence's tokens with mask
    True. The assignments carry no gradient; the scores (without bias) do.
    """
    scores, chosen, mask = (
        np.asarray(scores_BSE, np.float64),
        np.asarray(chosen_BSk),
        np.asarray(mask_BS, bool),
    )
    per_sequence = [
        _balance(scores[b][mask[b]], chosen[b][mask[b]], model)
        for b in range(len(scores))
        if mask[b].any()
    ]
    return model.aux_loss_alpha * float(np.mean(per_sequence or [0.0]))


def batch_balance_loss(scores_BSE, chosen_BSk, mask_BS, model):
    """V2's expert-level balance loss (report, equations 23-25) of one layer: the same sum once over
    all tokens of the batch."""
    scores, chosen, mask = (
        np.asarray(scores_BSE, np.float64),
        np.asarray(chosen_BSk),
        np.asarray(mask_BS, bool),
    )
    return model.aux_loss_alpha * (
        _balance(scores[mask], chosen[mask], model) if mask.any() else 0.0
    )


def router_z_loss(logits, mask):
    """Mean over the tokens with mask [...] True of logsumexp(router logits [..., E])^2, without
    coefficient; 0 if none."""
    logits, mask = np.asarray(logits, np.float64), np.asarray(mask, bool)
    return float(np.mean(logsumexp(logits[mask]) ** 2)) if mask.any() else 0.0


def bias_update(bias, counts, rate, centre):
    """The selection bias [E] after one step: up by `rate` for experts below the mean load, down
    above it, unchanged at it.

    With `centre` its mean is then subtracted.
    """
    bias, counts = np.asarray(bias, np.float64), np.asarray(counts, np.float64)
    bias = bias + rate * np.sign(counts.mean() - counts)
    return bias - bias.mean() if centre else bias


def directional_derivative(f, weights, direction, eps=1e-6):
    """d f(weights + a direction) / d a at a = 0 by central differences; equals sum of gradient x direction.

    For gradients that Hugging Face has no loss for. f takes a dict of weights and gives a number;
    `direction` is a dict with some of the names. Only where no routing decision is within reach of
    `eps` from a tie.
    """

    def at(a):
        return f(
            {
                name: w + a * direction[name] if name in direction else w
                for name, w in weights.items()
            }
        )

    weights, direction = float64(weights), float64(direction)
    return (at(eps) - at(-eps)) / (2 * eps)
