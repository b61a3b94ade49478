"""What config.json leaves out: every option of every family is what transformers' config class makes of the
same file."""

import dataclasses
import importlib
import json
import os
import pathlib

import jax
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration, families, names
from deepseek_jax.hf.families import ALIASES, FAMILIES
from deepseek_jax.hf.families.keys import REQUIRED
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.model.layout import abstract_model
from tests.support import FILES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

# The smallest file: the sizes that every checkpoint states, and what the family has no default for.
SIZES = dict(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4
)
NEEDED = {
    "deepseek_v2": dict(num_experts_per_tok=4),
    "mistral": dict(sliding_window=None),
    "dots1": dict(n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4),
}
OF_TRAINING = {"aux_loss_alpha", "seq_aux"}  # DeepSeek's keys, which transformers does not read
NOT_THEIRS = {"glm4_moe_lite": {"num_nextn_predict_layers", "first_k_dense_replace"}}


def smallest(kind):
    return {"model_type": kind} | SIZES | NEEDED.get(kind, {})


def theirs(config):
    return transformers.AutoConfig.for_model(**config)


def meaning(kind, key, config):
    """What transformers' model does with the attribute that its class has."""
    value = getattr(config, key, None)
    if key == "head_dim":
        return value or config.hidden_size // config.num_attention_heads
    if key == "num_nextn_predict_layers" and kind == "glm4_moe_lite":
        return 0
    if key in ("n_group", "topk_group") and value is None:
        return 1  # deepseek_v2 does not look at groups under greedy
    return value


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_default(kind):
    config = smallest(kind)
    ours, class_ = configuration.to_model(config), theirs(config)
    compared = set(FAMILIES[kind].options) - OF_TRAINING - NOT_THEIRS.get(kind, set())
    for key in sorted(compared):
        assert hasattr(class_, key) or key == "head_dim", key
        assert getattr(ours, key) == meaning(kind, key, class_), key
    assert ours.rope_theta == class_.rope_parameters["rope_theta"]
    assert ours.rope_scaling.type == class_.rope_parameters["rope_type"]
    assert ours.partial_rotary_factor == class_.rope_parameters.get("partial_rotary_factor", 1.0)
    if kind == "glm4_moe_lite":
        assert ours.first_k_dense_replace == class_.mlp_layer_types.index("sparse")
    if (window := getattr(type(class_), "sliding_window", None)) is not None:
        long = {k: v for k, v in config.items() if k != "sliding_window"}
        long |= {
            "max_position_embeddings": window + 1,
            "max_window_layers": 0,
            "use_sliding_window": True,
        }
        with pytest.raises(
            UserError, match=f"sliding_window={window} .what {kind} has where it is missing"
        ):
            configuration.to_model(long)
    missing = [
        k
        for k in REQUIRED
        if k in compared and not (kind == "solar_open" and k == "intermediate_size")
    ]
    for key in {*missing, *NEEDED.get(kind, {})} - {"sliding_window"}:
        with pytest.raises(UserError, match=f"{key} is missing"):
            configuration.to_model({k: v for k, v in config.items() if k != key})


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_missing_key_changes_one_option(kind):
    """A file with every key but one: the others keep what it says."""
    small = configuration.to_model(smallest(kind))
    others = {f.name: _other(f.name, getattr(small, f.name)) for f in dataclasses.fields(small)}
    changes = {k: v for k, v in others.items() if v is not None}
    family = FAMILIES[kind]
    free = {
        k: v
        for k, v in changes.items()
        if k in family.options and k not in (*REQUIRED, *family.fixed)
    }
    if family.output_bias:
        free["attention_out_bias"] = free["attention_bias"]
    full = dataclasses.replace(small, **free)
    written = configuration.from_model(full, kind)
    assert configuration.to_model(written) == full
    skipped = {*REQUIRED, *NEEDED.get(kind, {}), *family.fixed, "first_k_dense_replace"}
    for key in set(family.options) - skipped:
        renamed = [k for k, option in family.renamed.items() if option == key]
        less = configuration.to_model(
            {k: v for k, v in written.items() if k not in (key, *renamed)}
        )
        expected = dataclasses.replace(full, **{key: getattr(small, key)})
        if key == "attention_bias" and family.output_bias:
            expected = dataclasses.replace(expected, attention_out_bias=small.attention_out_bias)
        assert less == expected, key


def _other(name, value):
    """Another value that the option could have."""
    if name in (
        "topk_method",
        "scoring_func",
        "num_key_value_heads",
        "num_nextn_predict_layers",
        "n_group",
        "topk_group",
        "n_routed_experts",
    ):
        return None
    if isinstance(value, bool):
        return not value
    return (
        value + 1
        if isinstance(value, int)
        else value * 2 + 0.5
        if isinstance(value, float)
        else None
    )


def test_deepseek_v3_without_groups_and_query_rank():
    """The file of the issue; Kimi-K2's and Moonlight's names for the model mean the same."""
    for kind in ("deepseek_v3", *(k for k, v in ALIASES.items() if v == "deepseek_v3")):
        model = configuration.to_model({"model_type": kind} | SIZES)
        assert (model.n_group, model.topk_group, model.q_lora_rank, model.num_experts_per_tok) == (
            8,
            4,
            1536,
            8,
        )
        # DeepSeek's own configuration_deepseek.py, which Kimi-K2 and Moonlight ship as well.
        assert (
            model.n_routed_experts,
            model.n_shared_experts,
            model.first_k_dense_replace,
            model.moe_intermediate_size,
        ) == (256, 1, 3, 2048)
        assert (
            model.routed_scaling_factor,
            model.kv_lora_rank,
            model.norm_topk_prob,
            model.num_nextn_predict_layers,
        ) == (2.5, 512, True, 1)


@pytest.mark.parametrize(
    "kind, key, expected",
    [
        ("deepseek_v3", "q_lora_rank", None),
        ("glm4_moe_lite", "q_lora_rank", None),
        ("deepseek_v3", "norm_topk_prob", False),
        ("deepseek_v3", "rope_interleave", False),
        ("dots1", "n_group", 1),
        ("dots1", "topk_group", 1),
        ("deepseek_v3", "n_shared_experts", 0),
        ("qwen3_moe", "attention_bias", False),
        ("llama", "num_key_value_heads", 4),
        ("llama", "head_dim", 12),
    ],
)
def test_null_is_not_a_missing_key(kind, key, expected):
    """What is made of null: by transformers, but for n_shared_experts and the groups, of which DeepSeek's
    code and vLLM say none."""
    assert getattr(configuration.to_model(smallest(kind) | {key: None}), key) == expected
    if key not in ("n_shared_experts", "n_group", "topk_group", "attention_bias"):
        assert (meaning(kind, key, theirs(smallest(kind) | {key: None})) or None) == (
            expected or None
        )


def test_attn_factor_in_transformers():
    """It knows attention_factor only: it scales the release by 1.139, and by 1 what an export makes of it
    (test_hf_configs.py says why)."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    with open(
        os.path.join(FILES, "hf_configs", "real--DeepSeek-R1-0528-Qwen3-8B.json"), encoding="utf-8"
    ) as f:
        release = json.load(f)
    assert Qwen3RotaryEmbedding(theirs(release)).attention_scaling == pytest.approx(
        1.1386294361119891
    )
    exported = configuration.from_model(configuration.to_model(release), "qwen3")
    assert Qwen3RotaryEmbedding(theirs(exported)).attention_scaling == pytest.approx(1.0)


# transformers 4's PretrainedConfig wrote these into every config.json, with generation's settings; the rest
# is what training tools add.
BOOKKEEPING = dict(
    tf_legacy_loss=False,
    torchscript=True,
    use_bfloat16=False,
    num_beams=4,
    num_beam_groups=1,
    diversity_penalty=0.0,
    early_stopping=False,
    min_length=3,
    typical_p=1.0,
    length_penalty=1.0,
    no_repeat_ngram_size=0,
    encoder_no_repeat_ngram_size=0,
    bad_words_ids=[[1]],
    num_return_sequences=1,
    output_scores=False,
    return_dict_in_generate=False,
    forced_bos_token_id=1,
    forced_eos_token_id=1,
    remove_invalid_values=False,
    exponential_decay_length_penalty=[1, 1.1],
    suppress_tokens=[3],
    begin_suppress_tokens=[3],
    finetuning_task="x",
    prefix=" ",
    sep_token_id=1,
    decoder_start_token_id=1,
    task_specific_params={},
    problem_type="regression",
    num_labels=2,
    use_flash_attn=True,
    use_flash_attention_2=True,
    attn_implementation="sdpa",
    _attn_implementation="eager",
    _commit_hash="x",
    pad_token="x",
    bos_token="x",
    eos_token="y",
    model_max_length=4096,
    max_sequence_length=2048,
    gradient_checkpointing=True,
    pretraining_tp=8,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=2,
    classifier_dropout=0.1,
    layer_types=["full_attention"] * 4,
)


@pytest.mark.parametrize("kind", FAMILIES)
def test_bookkeeping_changes_nothing(kind):
    assert configuration.to_model(smallest(kind) | BOOKKEEPING) == configuration.to_model(
        smallest(kind)
    )


def test_a_record_is_all_that_a_family_needs():
    """Every record in families/ counts, and names the tensors of all variables that its models have."""
    folder = pathlib.Path(families.__file__).parent
    records = [
        value
        for path in folder.glob("*.py")
        for value in vars(importlib.import_module(f"{families.__name__}.{path.stem}")).values()
        if isinstance(value, families.Family) and path.stem != "__init__"
    ]
    assert {record.model_type for record in records} == set(FAMILIES)
    assert len(records) == len(FAMILIES)
    for kind in FAMILIES:
        model = configuration.to_model(
            smallest(kind) | dict(num_attention_heads=32, hidden_size=128)
        )
        with jax.set_mesh(config_for(model, None)[1]):
            _, params, bias = abstract_model(config_for(model, None)[0])
        for state in (params, bias):
            assert len(names.leaves(state, kind, model)) == len(jax.tree.leaves(state))
