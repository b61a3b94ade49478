"""What follows for the model and its routing."""

from deepseek_jax.migrate.migration import Migration


def settle(m: Migration) -> None:
    """Sets the balance loss."""
    coefficient = m.fact("hf_aux_coef")
    if coefficient is None:
        return
    if not coefficient:
        m.set("model.aux_loss_alpha", 0.0, "hf_aux_coef")
        return
    layers = m.fact("model.num_hidden_layers")
    per_token = m.fact("experts_per_token") or m.fact("model.num_experts_per_tok")
    if not layers or not per_token:
        m.refuse_fact(
            "hf_aux_coef",
            "transformers counts experts over all layers at once: config.model.aux_loss_alpha is about this "
            "x experts per token / MoE layers, which the model's config.json has",
            "Set config.model.aux_loss_alpha yourself",
        )
        return
    moe_layers = int(layers) - int(m.fact("model.first_k_dense_replace", 0))
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
