"""Parts of name tables: from a variable of a layer (model/transformer.py) to its tensors.

The names of tensors are those below `model.layers.N.`.

Where checkpoints differ there are alternatives: the first is what the hub has and what export writes. Routed
experts are one tensor each on the hub, with `{e}` in the name, or all in one tensor. An alternative of two
names is the pair of gate and up projections.
"""

Alternatives = tuple[tuple[str, ...], ...]
NameTable = dict[str, Alternatives]


def one_name(name: str) -> Alternatives:
    """The tensor has this name in every checkpoint."""
    return ((name,),)


NORMS: NameTable = {
    "input_layernorm/weight": one_name("input_layernorm.weight"),
    "post_attention_layernorm/weight": one_name("post_attention_layernorm.weight"),
}
MLA: NameTable = {
    "self_attn/q_proj/kernel": one_name("self_attn.q_proj.weight"),
    "self_attn/q_a_proj/kernel": one_name("self_attn.q_a_proj.weight"),
    "self_attn/q_a_layernorm/weight": one_name("self_attn.q_a_layernorm.weight"),
    "self_attn/q_b_proj/kernel": one_name("self_attn.q_b_proj.weight"),
    "self_attn/kv_a_proj_with_mqa/kernel": one_name("self_attn.kv_a_proj_with_mqa.weight"),
    "self_attn/kv_a_layernorm/weight": one_name("self_attn.kv_a_layernorm.weight"),
    "self_attn/kv_b_proj/kernel": one_name("self_attn.kv_b_proj.weight"),
    "self_attn/o_proj/kernel": one_name("self_attn.o_proj.weight"),
}
GROUPED_QUERY: NameTable = {
    "self_attn/q_proj/kernel": one_name("self_attn.q_proj.weight"),
    "self_attn/q_proj/bias": one_name("self_attn.q_proj.bias"),
    "self_attn/k_proj/kernel": one_name("self_attn.k_proj.weight"),
    "self_attn/k_proj/bias": one_name("self_attn.k_proj.bias"),
    "self_attn/v_proj/kernel": one_name("self_attn.v_proj.weight"),
    "self_attn/v_proj/bias": one_name("self_attn.v_proj.bias"),
    "self_attn/q_norm/weight": one_name("self_attn.q_norm.weight"),
    "self_attn/k_norm/weight": one_name("self_attn.k_norm.weight"),
    "self_attn/o_proj/kernel": one_name("self_attn.o_proj.weight"),
    "self_attn/o_proj/bias": one_name("self_attn.o_proj.bias"),
}
DENSE: NameTable = {
    "mlp/gate_proj/kernel": one_name("mlp.gate_proj.weight"),
    "mlp/up_proj/kernel": one_name("mlp.up_proj.weight"),
    "mlp/down_proj/kernel": one_name("mlp.down_proj.weight"),
}


def shared_core(block: str) -> NameTable:
    """Experts around a shared core (model/shared_core.py), as MoE_Factorize_Compress names them.

    Args:
      block: what the names of a layer's routed experts begin with, "mlp.experts".
    """
    cores = [f"{projection}_shared_core" for projection in ("gate", "up", "down")]
    out = {f"mlp/experts/{core}/core": one_name(f"{block}.{core}.core") for core in cores}
    return out | {
        f"mlp/experts/{core}/{wrapper}/{factor}": one_name(
            f"{block}.{core}.experts.{{e}}.{wrapper}.{factor}"
        )
        for core in cores
        for wrapper in ("input_wrapper", "output_wrapper")
        for factor in "UV"
    }


EXPERTS: NameTable = shared_core("mlp.experts") | {
    "mlp/gate/kernel": one_name("mlp.gate.weight"),
    "mlp/experts/gate_up_proj": (
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        ("mlp.experts.gate_up_proj",),
    ),
    "mlp/experts/down_proj": (("mlp.experts.{e}.down_proj.weight",), ("mlp.experts.down_proj",)),
}
DEEPSEEK_EXPERTS: NameTable = EXPERTS | {
    "mlp/gate/e_score_correction_bias": one_name("mlp.gate.e_score_correction_bias"),
    "mlp/shared_experts/gate_proj/kernel": one_name("mlp.shared_experts.gate_proj.weight"),
    "mlp/shared_experts/up_proj/kernel": one_name("mlp.shared_experts.up_proj.weight"),
    "mlp/shared_experts/down_proj/kernel": one_name("mlp.shared_experts.down_proj.weight"),
}
# Multi-token prediction: layers after the last, without `layer/` in the path.
MTP: NameTable = {
    "enorm/weight": one_name("enorm.weight"),
    "hnorm/weight": one_name("hnorm.weight"),
    "eh_proj/kernel": one_name("eh_proj.weight"),
    "norm/weight": one_name("shared_head.norm.weight"),
}
