"""Which experts a token goes to, and with which weights. Shape letters: layers.py.

Sources: DeepSeek-V3 (arXiv:2412.19437) sections 2.1.2 and its inference code; DeepSeek-V2
(arXiv:2405.04434) section 2.2.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config.options import ModelConfig


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    expert_TK: jax.Array  # int32: chosen experts
    weight_TK: jax.Array  # float32: their weights, normalised and scaled as the model asks
    score_TE: jax.Array  # float32: sigmoid or softmax scores, without the selection bias
    logit_TE: jax.Array  # float32


@jax.named_scope("route")
def route(x_TD: jax.Array, kernel_DE: jax.Array, bias_E: jax.Array, config: ModelConfig) -> Routing:
    """Scores, selection and weights, all in float32.

    The bias takes part only in choosing (auxiliary-loss-free balancing): weights come from the
    unbiased scores. Of equal scores the expert with the lower index is chosen, on every mesh.

    Args:
      x_TD: tokens, any float dtype.
      kernel_DE: float32, the router's weight.
      bias_E: float32, `e_score_correction_bias`; zeros where the method has none.
      config: the model's options.
    """
    chex.assert_rank([x_TD, kernel_DE, bias_E], [2, 2, 1])
    chex.assert_type([kernel_DE, bias_E], jnp.float32)
    logit_TE = jnp.matmul(x_TD.astype(jnp.float32), kernel_DE, precision=jax.lax.Precision.HIGHEST)
    if config.scoring_func == "sigmoid":
        score_TE = jax.nn.sigmoid(logit_TE)
    else:
        score_TE = jax.nn.softmax(logit_TE, axis=-1)
    choice_TE = jax.lax.stop_gradient(score_TE) + bias_E
    if config.topk_method != "greedy" and config.topk_group < config.n_group:
        choice_TE = _limit_to_groups(choice_TE, config)
    _, expert_TK = jax.lax.top_k(choice_TE, config.num_experts_per_tok)
    # Saved with the rows that were exchanged for these choices: scores recomputed in the backward
    # pass may differ in their last bit, and choose other experts.
    expert_TK = checkpoint_name(expert_TK, "exchange")
    weight_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
    if config.norm_topk_prob:
        weight_TK = weight_TK / (jnp.sum(weight_TK, axis=-1, keepdims=True) + 1e-20)
    return Routing(expert_TK, weight_TK * config.routed_scaling_factor, score_TE, logit_TE)


def _limit_to_groups(choice_TE: jax.Array, config: ModelConfig) -> jax.Array:
    """Puts -inf on experts outside each token's best `topk_group` groups.

    A group's score is the sum of its two best biased scores (V3) or its best score (V2).
    """
    tokens, experts = choice_TE.shape
    choice_TGE = choice_TE.reshape(tokens, config.n_group, experts // config.n_group)
    group_TG = jnp.max(choice_TGE, axis=-1)
    # Maxima and comparisons rather than top_k, which on a CPU sorts each of these short rows, with
    # one thread.
    if config.topk_method == "noaux_tc":
        best_TG1 = jnp.argmax(choice_TGE, axis=-1, keepdims=True)
        is_best_TGE = jnp.arange(choice_TGE.shape[2]) == best_TG1
        group_TG += jnp.max(jnp.where(is_best_TGE, -jnp.inf, choice_TGE), axis=-1)
    mine_TG1 = group_TG[:, :, None]
    other_T1G = group_TG[:, None]
    group_G = jnp.arange(config.n_group)
    better_TGG = (other_T1G > mine_TG1) | ((other_T1G == mine_TG1) & (group_G < group_G[:, None]))
    allowed_TG = jnp.sum(better_TGG, axis=-1) < config.topk_group
    return jnp.where(allowed_TG[:, :, None], choice_TGE, -jnp.inf).reshape(tokens, experts)
