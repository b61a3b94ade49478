"""`plan --roofline`: FLOPs of compiled steps beside the model's own, what it says, what it refuses."""

import json

import jax
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.model.count import count
from deepseek_jax.plan import __main__ as plan
from deepseek_jax.plan import exchange, options, topology
from tests.support import ROOT, conversion

TINY = f"--config={ROOT}/configs/tiny.py"
ON_CPU = ("--roofline", "--hardware=cpu", "--rates=f32=1e9,memory=1e9")
TWO = (
    "--devices=2",
    "--config.mesh.fsdp=1",
    "--config.mesh.expert=2",
    "--config.train.accumulation=1",
    "--config.train.sequence_length=64",  # one block of queries: attention meets all keys
)


@pytest.fixture(autouse=True)
def compiled_quickly(monkeypatch):
    """As in test_plan.py."""
    compile_step = topology.compile_step

    def quick(config, mesh, layout, options=None):
        return compile_step(config, mesh, layout, options or conversion.quick_options())

    monkeypatch.setattr(topology, "compile_step", quick)


def run(capsys, *argv: str) -> str:
    assert plan.main([TINY, *argv]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.slow)])
def test_flops_of_a_step_are_the_models_and_what_is_known_to_come_on_top(remat, capsys):
    """Of every part, from shapes alone, to a thousandth: elementwise work is in no product."""
    argv = (*TWO, f"--config.train.remat={remat}")
    found = json.loads(run(capsys, *ON_CPU, "--skew=0", "--json", *argv))["roofline"]
    _, config = options.read(options.Parser(), [TINY, *argv])
    mesh, layout = topology.lay_out(config, jax.devices()[:2])
    m, t = config.model, config.train
    model = count(m, layout.model.abstract.params, t.sequence_length)
    again = remat == "full"
    tokens = t.batch_size * t.sequence_length / 2
    assert found["model_flops_per_device"] == model.flops_per_token * tokens

    weights = {"attention": 0, "mlp": 0, "experts": 0}
    mlp_down = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(layout.model.abstract.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" in name or "gate/" in name or not name.startswith(("layers", "dense_layers")):
            continue
        part = "attention" if "self_attn" in name else "experts" if "/experts/" in name else "mlp"
        weights[part] += leaf.size
        mlp_down += leaf.size if part == "mlp" and "down_proj" in name else 0
    # A product forward, two backward, and forward again but for what ends a layer.
    pairs = (
        t.batch_size / 2 * m.num_attention_heads * t.sequence_length**2
    )  # all, not the causal half
    heads = pairs * (m.qk_head_dim + m.value_head_dim)
    backward = pairs * (3 * m.qk_head_dim + 2 * m.value_head_dim)
    layers = m.num_hidden_layers
    # Every row of an expert's capacity, filled or not, meets the matrices of one expert in each layer.
    rows = exchange.buffers(config, dict(mesh.shape)).expert_rows
    experts = weights["experts"] / m.n_routed_experts * rows
    moe_layers = layers - m.first_k_dense_replace
    router = moe_layers * m.hidden_size * m.n_routed_experts * tokens
    expected = {
        "attention": 2 * weights["attention"] * tokens * (3 + again)
        + 2 * layers * (heads * (1 + again) + backward),
        "mlp": 2 * weights["mlp"] * tokens * (3 + again) - again * 2 * mlp_down * tokens,
        "experts": 2 * experts * (3 + again * 2 / 3),
        "loss": 6 * m.vocab_size * m.hidden_size * tokens,
        "route": 2 * router * (3 + again),
    }
    for part, flops in expected.items():
        assert found["flops_of_parts"][part] == pytest.approx(flops, rel=1e-3), part
    assert set(found["flops_of_parts"]) - set(expected) <= {"embed"}


def test_what_it_says(capsys):
    text = run(capsys, *ON_CPU, *TWO, "--skew=1.6")
    for said in (
        "3 rounds of the dispatch at --skew=1.6: largest load 2.60 x the mean",
        "with one round ",
        "part, ms derated",
        "collectives, exposed",
        "largest costs, derated:",
        "assumed: a kernel takes the longest of",
        "given by --rates",
    ):
        assert said in text, said


MISTAKES = [
    (["--skew=zipf"], "--skew=zipf is of the prediction. Add --roofline."),
    (["--rates=bf16=1e12"], "--rates=bf16=1e12 is of the prediction. Add --roofline."),
    (["--roofline"], "--roofline reads the compiled step, and JAX's GPU compiler is missing."),
    (["--roofline", "--hardware=cpu"], "--hardware=cpu has no rates of its own for --roofline"),
    ([*ON_CPU, "--skew=much"], "--skew=much is no skew. Set it to zipf, or to a max_violation"),
    (["--roofline", "--rates=speed=1"], "names 'speed', which is no rate. Choose from: bf16"),
]


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_mistakes(argv, message, monkeypatch):
    """Said in one line before anything is compiled."""
    monkeypatch.setattr(topology, "has_gpu_compiler", lambda: False)
    monkeypatch.setattr(topology, "compile_step", None)
    with pytest.raises(UserError) as error:
        plan.main([TINY, "--devices=1", *argv])
    assert message in str(error.value) and "\n" not in str(error.value)
