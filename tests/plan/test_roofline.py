"""`plan --roofline`: FLOPs of compiled steps beside the model's own, what it says, what it refuses."""

import functools
import json
import lzma
import unittest.mock
from collections.abc import Callable

import jax
import pytest

from benchmarks.gpu import aot, costs, facts
from deepseek_jax.errors import UserError
from deepseek_jax.model.count import count
from deepseek_jax.plan import __main__ as plan
from deepseek_jax.plan import exchange, options, rates, roofline, topology
from tests.support import ROOT, quick

TINY = f"--config={ROOT}/configs/tiny.py"
ON_CPU = ("--roofline", "--hardware=cpu", "--rates=f32=1e9,memory=1e9")
TWO = (
    "--devices=2",
    "--config.mesh.fsdp=1",
    "--config.mesh.expert=2",
    "--config.train.accumulation=1",
    "--config.train.sequence_length=64",  # one block of queries: attention meets all keys
)
# One stack: the stored program has the dense one as well.
MOE_ALONE = "--config.model.first_k_dense_replace=0"


LIMIT = "jax_traceback_in_locations_limit"
COMPILED: dict[str, topology.PlannedStep] = {}


@pytest.fixture(autouse=True)
def compiled_quickly(monkeypatch):
    """As in test_plan.py; each config once. Its instructions name their Python lines, which conftest.py
    leaves out."""
    before, compile_step = getattr(jax.config, LIMIT), topology.compile_step
    roofline.keep_source_lines()

    def compile_(config, mesh, layout, options=None):
        if (key := str(config)) not in COMPILED:
            quickly = options or quick.older_loops()
            COMPILED[key] = compile_step(config, mesh, layout, quickly)
        return COMPILED[key]

    monkeypatch.setattr(topology, "compile_step", compile_)
    yield
    jax.config.update(LIMIT, before)


def run(capsys, *argv: str) -> str:
    assert plan.main([TINY, *argv]) == 0
    return capsys.readouterr().out


@functools.cache
def of_tiny(*argv: str) -> roofline.Planned:
    """configs/tiny.py on two devices, laid out."""
    _, config = options.read(options.Parser(), [TINY, *argv])
    return roofline.Planned(config, *topology.lay_out(config, jax.devices()[:2]))


def expected_flops(planned: roofline.Planned) -> dict[str, float]:
    """Of a device's step by part, from shapes alone: a product forward, two backward, and with remat=full
    forward again, but for what ends a layer. Attention meets all keys, not the causal half."""
    config, mesh, layout, _ = planned
    m, t = config.model, config.train
    again = t.remat == "full"
    tokens = t.batch_size * t.sequence_length / 2
    weights = {"attention": 0, "mlp": 0, "experts": 0}
    mlp_down = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(layout.model.abstract.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" in name or "gate/" in name or not name.startswith(("layers", "dense_layers")):
            continue
        part = "attention" if "self_attn" in name else "experts" if "/experts/" in name else "mlp"
        weights[part] += leaf.size
        mlp_down += leaf.size if part == "mlp" and "down_proj" in name else 0
    pairs = t.batch_size / 2 * m.num_attention_heads * t.sequence_length**2
    scores = pairs * m.qk_head_dim  # recomputed and made again by backward: XLA makes them once
    heads = scores + pairs * m.value_head_dim
    backward = pairs * (3 * m.qk_head_dim + 2 * m.value_head_dim)
    # Every row of an expert's capacity, filled or not, meets the matrices of one expert in each layer.
    rows = exchange.buffers(config, dict(mesh.shape)).expert_rows
    experts = weights["experts"] / m.n_routed_experts * rows
    moe_layers = m.num_hidden_layers - m.first_k_dense_replace
    router = moe_layers * m.hidden_size * m.n_routed_experts * tokens
    return {
        "attention": 2 * weights["attention"] * tokens * (3 + again)
        + 2 * m.num_hidden_layers * (heads * (1 + again) + backward - again * scores),
        "mlp": 2 * weights["mlp"] * tokens * (3 + again) - again * 2 * mlp_down * tokens,
        "experts": 2 * experts * (3 + again * 2 / 3),
        "loss": 6 * m.vocab_size * m.hidden_size * tokens,
        "route": 2 * router * (3 + again),
    }


def check_flops(found: dict, planned: roofline.Planned, tolerance: float) -> None:
    """Elementwise work is in no product, so that the numbers are the same."""
    expected = expected_flops(planned)
    for part, flops in expected.items():
        assert found["flops_of_parts"][part] == pytest.approx(flops, rel=tolerance), part
    assert set(found["flops_of_parts"]) - set(expected) <= {"embed"}
    t = planned.config.train
    params = planned.layout.model.abstract.params
    model = count(planned.config.model, params, t.sequence_length).flops_per_token
    assert found["model_flops_per_device"] == model * t.batch_size * t.sequence_length / 2
    assert sum(expected.values()) > found["model_flops_per_device"]


@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.slow)])
def test_flops_of_a_step_are_the_models_and_what_is_known_to_come_on_top(remat, capsys):
    argv = (*TWO[1:], MOE_ALONE, f"--config.train.remat={remat}")
    found = json.loads(run(capsys, *ON_CPU, "--skew=0", "--json", "--devices=2", *argv))
    check_flops(found["roofline"], of_tiny(*argv), 1e-9)


@pytest.fixture(scope="module")
def for_two_h200s() -> tuple[str, roofline.Planned]:
    """The step of configs/tiny.py in bfloat16 that XLA made for two H200s (files/SOURCES.md)."""
    text = lzma.decompress((ROOT / "tests/files/hlo/tiny_2_h200.hlo.xz").read_bytes()).decode()
    return text, of_tiny(*TWO[1:], "--config.train.dtype=bfloat16", "--config.train.remat=full")


@pytest.fixture(scope="module")
def predicted(for_two_h200s) -> Callable[[str], dict]:
    """Of a skew, for the stored program. Its devices are no CPUs, which the mesh here is made of."""
    text, planned = for_two_h200s

    @functools.cache
    def of(skew: str) -> dict:
        with unittest.mock.patch.object(roofline, "is_gpu", lambda mesh: True):
            return roofline.predict(text, planned, rates.speed_of("h200", ""), skew)

    return of


def test_a_program_for_gpus(for_two_h200s, predicted):
    found = predicted("0")
    # XLA pads one product of attention from 80 columns to 96: 0.6% of the part.
    check_flops(found, for_two_h200s[1], 1e-2)
    assert not found["not_known"]["kernels"] and not found["not_known"]["loops_counted_once"]
    assert found["rounds"]["in_the_program"] and found["derated"]["rounds"] == 1
    for kind in ("ideal", "derated"):
        r = found[kind]
        parts = sum(s for phases in r["parts"].values() for s in phases.values())
        assert parts == pytest.approx(r["step_s"])
        c = r["communication"]
        assert 0 < c["exposed_s"] <= c["busy_s"] and c["hidden_s"] == c["busy_s"] - c["exposed_s"]
    assert found["ideal"]["step_s"] < found["derated"]["step_s"]
    assert len(found["largest"]) == roofline.LARGEST
    sources = [c["source"] for c in found["largest"]]
    assert all((ROOT / "deepseek_jax" / s.split(":")[0]).is_file() for s in sources), sources


def test_a_further_round_makes_the_experts_products_again(for_two_h200s, predicted):
    """Forward once, and backward with what it needs of forward: 3 + 2 + 6 of the 11 matrices' products."""
    one, three = (predicted(skew) for skew in ("0", "1.6"))
    assert three["derated"]["rounds"] == 2 and three["at_one_round"]["derated"] == one["derated"]
    more = {
        part: flops - one["flops_of_parts"][part]
        for part, flops in three["flops_of_parts"].items()
        if flops != one["flops_of_parts"][part]
    }
    forward = expected_flops(for_two_h200s[1])["experts"] / (3 + 2 / 3)
    assert more == {"experts": pytest.approx(forward * (1 + 2 / 3 + 2))}


def test_what_it_says(capsys):
    """Also where the environment has turned the lines of programs off."""
    jax.config.update(LIMIT, 0)
    text = run(capsys, *ON_CPU, *TWO, MOE_ALONE, "--skew=1.6", "--config.train.remat=auto")
    for said in (
        "remat auto: full, as on CPUs",
        "2 rounds of the dispatch at --skew=1.6: largest load 2.60 x the mean",
        "with one round ",
        "part, ms derated",
        "collectives, exposed",
        "largest costs, derated:",
        "assumed: a kernel takes the sum of",
        "given by --rates",
    ):
        assert said in text, said
    assert getattr(jax.config, LIMIT) == roofline.FRAMES


MISTAKES = [
    (["--skew=zipf"], "--skew=zipf is of the prediction. Add --roofline."),
    (["--rates=bf16=1e12"], "--rates=bf16=1e12 is of the prediction. Add --roofline."),
    (["--roofline"], "--roofline reads the compiled step, and JAX's GPU compiler is missing."),
    (["--roofline", "--hardware=cpu"], "--hardware=cpu has no rates of its own for --roofline"),
    ([*ON_CPU, "--skew=much"], "--skew=much is no skew. Set it to zipf, or to a max_violation"),
    (["--roofline", "--rates=speed=1"], "names 'speed', which is no rate and no file of them"),
]


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_mistakes(argv, message, monkeypatch):
    """Said in one line before anything is compiled."""
    monkeypatch.setattr(topology, "has_gpu_compiler", lambda: False)
    monkeypatch.setattr(topology, "compile_step", None)
    with pytest.raises(UserError) as error:
        plan.main([TINY, "--devices=1", *argv])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_gpu_aot_counts(for_two_h200s, capsys):
    """In the stored program: what is to come fails nothing, and everything else is a check."""
    text, planned = for_two_h200s
    found = facts.of(text, planned.config, dict(planned.mesh.shape))
    assert found["further_rounds"] and not found["grouped"] and found["batched"]["forward"] > 0
    # XLA joins the embedding's gather, the only one in float32, and those of the first layer.
    assert not found["wide_gathers"]["layers"] and len(found["wide_gathers"]["embedding"]) == 1
    check = aot.Checks()
    aot.check_facts(check, found, lambda name: f"full_shard: {name}")
    assert not check.failed and capsys.readouterr().out.count("to do ") == 3
    assert "no further rounds in the program: holds in 0 of 1 programs" in check.summary()
    aot.check_facts(check, found | {"wide_gathers": {"layers": ["f32[9] x"], "embedding": []}}, str)
    assert check.failed == ["no float32 gather of a layer's weight"]
    check("x: no further rounds in the program", True, "none")
    assert "no further rounds in the program: holds in 1 of 3 programs" in check.summary()


def test_beside_a_measured_step_stands_the_same_prediction(for_two_h200s, predicted):
    """What gpu_bench prints of a card whose rates are known, at the rounds that it took."""
    text, planned = for_two_h200s
    shape = dict(planned.mesh.shape)
    row = costs.predicted(text, shape, "NVIDIA H200", 512.0, 2)
    found = predicted("1.6")
    assert row == {
        f"predicted_{kind}_s": pytest.approx(found[kind]["step_s"]) for kind in ("ideal", "derated")
    }
    assert costs.predicted(text, shape, "cpu", 512.0, 2) == {}
    assert list(costs.predicted("no program", shape, "NVIDIA H200", 512.0, 2)) == ["not_predicted"]
