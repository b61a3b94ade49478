"""What follows for the model and its routing."""

import json
import os

from deepseek_jax.migrate.migration import Migration


def _of_checkpoint(m: Migration) -> dict[str, int]:
    """The whole numbers of the model's config.json, where its folder is here."""
    folder = os.path.expanduser(str(m.fact("init_from", "")))
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if type(v) is int} if isinstance(found, dict) else {}


def settle(m: Migration) -> None:
    """Sets the balance loss."""
    coefficient = m.fact("hf_aux_coef")
    if coefficient is None:
        return
    if not coefficient:
        m.set("model.aux_loss_alpha", 0.0, "hf_aux_coef")
        return
    here = _of_checkpoint(m)
    layers = m.fact("model.num_hidden_layers") or here.get("num_hidden_layers")
    per_token = m.fact("experts_per_token") or m.fact("model.num_experts_per_tok")
    per_token = per_token or here.get("num_experts_per_tok")
    if not layers or not per_token:
        m.refuse_fact(
            "hf_aux_coef",
            "transformers counts experts over all layers at once: config.model.aux_loss_alpha is this x "
            "experts per token / MoE layers, which the model's config.json has, and that is not here",
            "Download the model as the last lines say, and migrate again",
        )
        return
    dense = m.fact("model.first_k_dense_replace") or here.get("first_k_dense_replace", 0)
    moe_layers = int(layers) - int(dense)
    alpha = float(coefficient) * int(per_token) / max(moe_layers, 1)
    m.set(
        "model.aux_loss_alpha",
        alpha,
        "hf_aux_coef",
        how=f"{coefficient:g} x {per_token} per token / {moe_layers} layers",
    )
    m.set("model.seq_aux", False, "hf_aux_coef")
    m.note(
        "The balance loss of transformers is a product over the counts of all layers; here it is a sum over "
        "layers, of the same value where the load is even."
    )
