"""Every config in configs/: valid, consistent with the hardware that its docstring names, of the published
size.
"""

import ast
import importlib.util
import math
import re

import pytest
import transformers

from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.model.count import count
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.train.optimizer import learning_rate, sequences_at
from tests.support import ROOT

CONFIGS = ROOT / "configs"
NAMES = sorted(p.stem for p in CONFIGS.glob("*.py"))
YARN = ["v2_lite", "v2", "v3", "kimi_k2"]

# name: (published total, whether it includes embedding and head; published active, how many of the two it
# includes; tolerance). Active figures of DeepSeek leave out the embedding, which is looked up and not
# multiplied.
PUBLISHED = {
    "base": None,  # the guides publish no size of these two
    "distributed": None,
    "deepseek_7b": (7.0e9, False, None, 0, 0.01),  # the FSDP guide: 4 x ~1.75B of blocks
    "v2_lite": (15.7e9, True, 2.4e9, 1, 0.025),
    "v2": (236e9, True, 21e9, 1, 0.01),
    "v3": (
        671e9,
        True,
        36.6e9,
        1,
        0.002,
    ),  # README_WEIGHTS.md, "including 0.9B for the output head"; elsewhere rounded to 37B
    "moonlight": (
        15.29e9,
        False,
        2.24e9,
        0,
        0.002,
    ),  # arXiv:2502.16982, table of sizes; elsewhere 16B and 3B
    "kimi_k2": (
        1.04e12,
        True,
        32.6e9,
        2,
        0.015,
    ),  # the report's figures; the released shapes give 1.026T
}


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    out = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(out)
    return out


def load(name: str, arg: str = "") -> Config:
    get_config = module(name).get_config
    return from_config_dict(get_config(arg) if arg else get_config())


def analytic_count(model: ModelConfig) -> tuple[int, int]:
    """(total, active) parameters of the main model by arithmetic alone, independent of the model's code.

    Both include the embedding and the output head; MTP layers are in neither (`analytic_mtp`). The selection
    bias is not a parameter here. Active leaves out the experts that a token is not sent to, and nothing else.
    """
    m, d, heads = model, model.hidden_size, model.num_attention_heads
    head = m.qk_nope_head_dim + m.qk_rope_head_dim
    query = (
        d * m.q_lora_rank + m.q_lora_rank + m.q_lora_rank * heads * head
        if m.q_lora_rank
        else d * heads * head
    )
    latent = d * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank
    attention = (
        query
        + latent
        + m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
        + heads * m.v_head_dim * d
    )
    layer = attention + 2 * d  # and its two norms
    expert = 3 * d * m.moe_intermediate_size
    router = d * m.n_routed_experts
    dense_layers = m.first_k_dense_replace * (layer + 3 * d * m.intermediate_size)
    moe_layers = m.num_hidden_layers - m.first_k_dense_replace
    vocabulary = m.vocab_size * d * (1 if m.tie_word_embeddings else 2)
    rest = (
        vocabulary + d + dense_layers + moe_layers * (layer + router + m.n_shared_experts * expert)
    )
    return (
        rest + moe_layers * m.n_routed_experts * expert,
        rest + moe_layers * m.num_experts_per_tok * expert,
    )


def analytic_mtp(model: ModelConfig) -> int:
    """Parameters of the MTP layers, which share embedding and head with the main model: one decoder layer,
    the projection of the joined inputs, and the norms of the two inputs and of the output.
    """
    deeper = ModelConfig(**{**model.__dict__, "num_hidden_layers": model.num_hidden_layers + 1})
    one_layer = analytic_count(deeper)[0] - analytic_count(model)[0]
    return model.num_nextn_predict_layers * (
        one_layer + 2 * model.hidden_size * model.hidden_size + 3 * model.hidden_size
    )


def test_every_config_is_here():
    """A config without a line in the tables below would go unchecked."""
    assert set(NAMES) - {"tiny"} == set(PUBLISHED)


@pytest.mark.parametrize("name", [n for n, p in PUBLISHED.items() if p])
def test_size_is_the_published_one(name):
    model = load(name).model
    total, active = analytic_count(model)
    embedding = model.vocab_size * model.hidden_size
    want_total, with_vocabulary, want_active, tables, tolerance = PUBLISHED[name]
    assert total - (0 if with_vocabulary else 2 * embedding) == pytest.approx(
        want_total, rel=tolerance
    )
    if want_active:
        assert active - (2 - tables) * embedding == pytest.approx(want_active, rel=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_these_parameters(name):
    """The arithmetic above against the shapes of the model itself, which nothing allocates."""
    c = load(name)
    counted = count(c.model, abstract_model(c)[1], c.train.sequence_length)
    assert (counted.total, counted.active) == analytic_count(c.model)
    assert counted.mtp == analytic_mtp(c.model)


def test_rounded_sizes():
    """The names that people know the models by."""
    billions = {
        n: [round(x / 1e9) for x in analytic_count(load(n).model)]
        for n in ("v2", "v3", "moonlight")
    }
    assert billions == {"v2": [236, 21], "v3": [671, 38], "moonlight": [16, 3]}
    assert analytic_mtp(load("v3").model) == pytest.approx(11.5e9, rel=0.01)  # README_WEIGHTS.md
    assert all(analytic_mtp(load(n).model) == 0 for n in NAMES if n != "v3")


def test_sizes_in_the_docstrings_are_right():
    for name in PUBLISHED:
        model, text = load(name).model, module(name).__doc__
        total, active = analytic_count(model)
        for n in (total, active):
            figures = {f"{n / 1e9:,.{digits}f}B" for digits in (1, 2)}
            assert any(f in text for f in figures), (name, figures)


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_and_refuses_an_unknown_arg(name):
    validate(load(name))
    with pytest.raises(UserError, match="the argument 'nonsense' of this config is not known"):
        module(name).get_config("nonsense")
    if name in YARN:
        validate(load(name, "yarn"))


@pytest.mark.parametrize("name", YARN)
def test_yarn_changes_the_long_context_setting_only(name):
    plain, yarn = load(name), load(name, "yarn")
    assert (
        plain.model.rope_scaling.type == "default"
        and plain.model.max_position_embeddings == plain.train.sequence_length
    )
    scaling = yarn.model.rope_scaling
    assert scaling.type == "yarn"
    assert (
        scaling.factor * scaling.original_max_position_embeddings
        == yarn.model.max_position_embeddings
    )
    differences = {k for k, v in plain.model.__dict__.items() if v != getattr(yarn.model, k)}
    assert differences == {"rope_scaling", "max_position_embeddings"}
    assert {k for k, v in plain.__dict__.items() if v != getattr(yarn, k)} == {"model"}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_docstring_and_hardware_agree_with_the_options(name):
    """The docstring names a command and its hardware; mesh, batch, ramp and memory must fit that hardware."""
    text, c = module(name).__doc__, load(name)
    assert f"python train.py --config=configs/{name}.py" in text
    for heading in ("Hardware:", "Source:", "Parameters:", "As published:"):
        assert heading in text
    found = re.search(r"Hardware: ([\d,]+) GPUs? of (\d+) GB", text)
    gpus, gigabytes = int(found.group(1).replace(",", "")), int(found.group(2))

    axes = {a: getattr(c.mesh, a) for a in ("data", "fsdp", "expert")}
    free = [a for a, n in axes.items() if n == -1]
    assert len(free) == 1
    axes[free[0]] = gpus // math.prod(n for n in axes.values() if n != -1)
    assert math.prod(axes.values()) == gpus
    assert (c.sharding.strategy == "hybrid_shard") == (axes["data"] > 1 or free == ["data"])

    shards, m = axes["fsdp"] * axes["expert"], c.model
    assert m.n_routed_experts % axes["expert"] == 0
    widths = [m.hidden_size, m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)]
    if m.q_lora_rank:
        widths.append(m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim))
    assert all(width % shards == 0 for width in widths)
    assert c.micro_batch % gpus == 0
    if c.train.batch_ramp_start:
        end = c.train.batch_ramp_steps
        sizes = [sequences_at(c, s) for s in (*range(0, end, 100), end)]
        assert (
            sizes[0] == c.train.batch_ramp_start
            and sizes[-1] == c.train.batch_size
            and sizes == sorted(sizes)
        )

    # float32 parameters, gradients and two moments; at least 40% of the memory is left for everything else.
    state = 16 * (analytic_count(m)[0] + analytic_mtp(m)) / shards
    assert state < 0.6 * gigabytes * 1e9, f"{state / 1e9:.1f} GB of state per GPU"


def test_distributed_has_the_numbers_of_the_guides_file():
    """deepseek_v3_distributed.yaml of the NeMo guide, with what it inherits of deepseek_v3_base.yaml; the
    vocabulary is the guide's own. The rates by NeMo's CosineAnnealing.
    """
    c = load("distributed")
    m, t, o = c.model, c.train, c.optimizer
    assert (m.vocab_size, m.hidden_size, m.num_hidden_layers) == (50257, 1024, 24)
    assert (m.num_attention_heads, t.sequence_length) == (16, 2048)
    assert (m.n_routed_experts, m.num_experts_per_tok, m.moe_intermediate_size) == (16, 2, 4096)
    assert (m.aux_loss_alpha, c.moe.router_z_loss_coef, c.mesh.expert) == (0.01, 0.001, 4)
    micro, devices = 2, 4
    assert (t.batch_size, t.accumulation) == (32, 32 // (micro * devices))
    assert (t.steps, t.dtype, t.remat) == (10_000, "bfloat16", "full")
    assert (o.name, o.b1, o.b2, o.weight_decay, o.grad_clip) == ("adamw", 0.9, 0.95, 0.1, 1.0)
    assert (c.eval.every_steps, c.eval.batches, c.log.every_steps) == (500, 50, 50)
    assert (c.checkpoint.keep_best, c.data.eval_fraction, c.data.document_mask) == (5, 0.01, False)
    rate = learning_rate(c)
    middle = 1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi * 3500 / 7000))
    expected = {0: 0, 1000: 5e-5, 2000: 1e-4, 5500: middle, 9000: 1e-5, 9999: 1e-5}
    for step, wanted in expected.items():
        assert float(rate(step)) == pytest.approx(wanted, abs=1e-10), step


@pytest.mark.parametrize(
    "name, trillions",
    [("v2_lite", 5.7), ("v2", 8.1), ("v3", 14.8), ("moonlight", 5.2), ("kimi_k2", 15.5)],
)
def test_steps_are_the_published_tokens(name, trillions):
    c = load(name)
    t, ramp = c.train, sum(sequences_at(c, s) for s in range(c.train.batch_ramp_steps))
    tokens = (ramp + (t.steps - t.batch_ramp_steps) * t.batch_size) * t.sequence_length
    assert tokens == pytest.approx(trillions * 1e12, rel=0.002)


@pytest.mark.parametrize("name, billions", [("v2", 225), ("v3", 469), ("moonlight", 200)])
def test_ramp_is_the_published_tokens(name, billions):
    c = load(name)
    ramp = (
        sum(sequences_at(c, s) for s in range(c.train.batch_ramp_steps)) * c.train.sequence_length
    )
    assert ramp == pytest.approx(billions * 1e9, rel=0.002)


@pytest.mark.parametrize("name", NAMES)
def test_one_key_per_line(name):
    """`grep 'hidden_size = 7168' configs/` finds the configs that have it."""
    text = (CONFIGS / f"{name}.py").read_text(encoding="utf-8")
    body = ast.parse(text).body[-1].body
    for statement in body:
        if isinstance(statement, ast.Assign):
            assert len(statement.targets) == 1 and isinstance(
                statement.targets[0], (ast.Attribute, ast.Name)
            )
    assert re.search(r"(?m)^    m\.hidden_size = \d+$", text)
    headings = re.findall(r"(?m)^\n    # ([A-Z][\w ]+)$", text)
    assert headings[0] == "Model" and {"Training", "Optimizer"} <= set(headings)


def test_v3_has_the_shape_that_transformers_knows():
    config = transformers.DeepseekV3Config()
    model = load("v3").model
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "first_k_dense_replace",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(model, key) == getattr(config, key), key
