"""Expert-specialised fine-tuning: the table, the scores that make it, and training the experts of a table.

Scores are compared with the router of transformers, training with a program that differentiates everything
and takes the gradients of other experts out.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax import objectives
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import (
    Config,
    EsftConfig,
    MeshConfig,
    MoeConfig,
    OffloadConfig,
    OptimizerConfig,
    ShardingConfig,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.esft import __main__ as command
from deepseek_jax.esft import scores
from deepseek_jax.inference.loaded import load
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import resume
from deepseek_jax.train import expert_table, state, step
from deepseek_jax.train.expert_table import ExpertTable
from deepseek_jax.train.optimizer import decay_mask, learning_rate
from tests.support import chat_folders, conversion, evaluation, invariance
from tests.support.small_runs import ADAMW, TINY, config_of, same, trainer

TABLE = {"experts": {"0": [2], "1": [3, 0]}}  # of TINY: two layers of four experts

# ------------------------------------------------------------------------------------------- the table


def write(folder: pathlib.Path, table: dict, name: str = "experts.json") -> str:
    path = folder / name
    path.write_text(json.dumps(table))
    return str(path)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "it has no object `experts`"),
        (
            {"experts": {"2": [0]}},
            "layer '2' has no routed experts: those of this model that have are 0 to 1",
        ),
        ({"experts": {"0": [4]}}, "layer 0 needs a list of different experts, numbers from 0 to 3"),
        ({"experts": {"0": [1, 1]}}, "layer 0 needs a list of different experts"),
        ({"experts": {"0": [True]}}, "layer 0 needs a list of different experts"),
        ({"experts": {"0": []}}, "nothing learns"),
        ({"experts": {"0": [1]}, "shared_expert": True}, "'shared_expert' is not known"),
        (
            {"experts": {"0": [1]}, "shared_experts": 1},
            "shared_experts is 1, and not true or false",
        ),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, table, said):
    with pytest.raises(UserError) as error:
        expert_table.read(write(tmp_path, table), TINY)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.esft.experts=.*missing"):
        expert_table.read(str(tmp_path / "nothing.json"), TINY)
    dense = dataclasses.replace(TINY, first_k_dense_replace=2)
    with pytest.raises(UserError, match="has no routed experts"):
        expert_table.read(write(tmp_path, TABLE), dense)


def test_layers_are_those_of_the_model(tmp_path):
    """One dense layer in front, a layer of multi-token prediction behind: keys are numbers of layers."""
    model = invariance.MODEL
    table = {"experts": {"1": [7, 2], "3": [0], "6": [5]}, "shared_experts": True}
    read = expert_table.read(write(tmp_path, table), model)
    assert read == ExpertTable({1: (7, 2), 3: (0,), 6: (5,)}, True, False)
    index = expert_table.indices(read, model)
    assert index.keys() == {"layers", "mtp_0"} and index["mtp_0"].tolist() == [5]
    assert index["layers"].tolist() == [[2, 7], [-1, -1], [0, -1], [-1, -1], [-1, -1]]
    path = str(tmp_path / "again.json")
    expert_table.write(path, read, {"top_p": 0.2})
    assert expert_table.read(path, model) == read


def test_experts_are_chosen_in_falling_score_until_top_p():
    one = np.asarray([0.1, 0.4, 0.05, 0.25, 0.2])
    assert scores.chosen(one, 0.4) == (1,)
    assert scores.chosen(one, 0.41) == (1, 3)
    assert scores.chosen(one, 0.85) == (1, 3, 4)
    assert scores.chosen(one, 1.0) == (1, 3, 4, 0, 2)
    assert scores.chosen(np.full(4, 0.25), 0.5) == (0, 1)  # of equal ones the first


def deepseeks(sums_LE: np.ndarray, top_p: float, axis: int) -> list[list[int]]:
    """generate_expert_config.py, in short; axis 0 is what it does."""
    share = sums_LE / sums_LE.sum(axis=axis, keepdims=True)
    out = []
    for layer in share:
        picked, total = [], 0.0
        for expert in sorted(range(len(layer)), key=lambda e: -layer[e]):
            if total >= top_p:
                break
            picked.append(expert)
            total += layer[expert]
        out.append(picked)
    return out


def test_deepseeks_script_normalises_over_layers():
    """With its axis corrected it chooses what is chosen here; as it is, it does not."""
    sums_LE = np.random.default_rng(0).gamma(0.5, size=(6, 16))
    used = scores.Usage(sums_LE, sums_LE)
    ours = [list(scores.chosen(s, 0.3)) for s in used.scores("gate")]
    np.testing.assert_allclose(used.scores("token").sum(axis=1), 1, rtol=1e-12)
    assert ours == deepseeks(sums_LE, 0.3, axis=1)
    assert ours != deepseeks(sums_LE, 0.3, axis=0)


# ------------------------------------------------------------------------------------------- the scores

TEXT = "hello world, be kind and sunny. " * 12


def theirs_of(model, rows: dict[str, np.ndarray]) -> np.ndarray:
    """float64 [2, E]: weights and choices of the one MoE layer, by transformers, document by document."""
    import torch

    out = np.zeros((2, 4))
    for tokens, segments in zip(rows["tokens"], rows["segment_ids"], strict=True):
        for document in range(1, segments.max() + 1):
            ids = torch.tensor(tokens[None, segments == document].astype(np.int64))
            with torch.no_grad():
                logits = model(ids, use_cache=False, output_router_logits=True).router_logits
            p = torch.softmax(logits[-1].double(), -1)
            weight, chosen = (a.numpy() for a in torch.topk(p, 2))
            np.add.at(out[0], chosen, weight)
            np.add.at(out[1], chosen, 1)
    return out


def test_scores_are_of_the_models_own_router(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    theirs = evaluation.write_model(folder)
    data = tmp_path / "task.jsonl"
    data.write_text(
        "".join(json.dumps({"text": TEXT[i : i + 90]}) + "\n" for i in range(0, 300, 30))
    )
    out = str(tmp_path / "experts.json")
    args = ["score", str(folder), f"--data={data}", f"--out={out}", "--dtype=float32"]
    usage, found = scores.usage, []

    def recorded(*args):
        found.append(usage(*args))
        return found[-1]

    monkeypatch.setattr(scores, "usage", recorded)
    assert command.main([*args, "--sequence-length=48", "--tokens=0", "--batch-size=3"]) == 0
    assert "experts" in capsys.readouterr().out
    table = json.loads(pathlib.Path(out).read_text())

    model = load(str(folder))
    tokenizer = load_tokenizer(tokenizer_folder.find(str(folder)))
    config = scores.data_config(model, str(data), tokenizer.name, 48)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokenizer=tokenizer_folder.find(str(folder)))
    )
    batches = list(scores.packed(config, tokenizer, 0, 2))
    weights, choices = sum(theirs_of(theirs, rows) for rows in batches)
    (used,) = found
    # norm_topk_prob is False there: weights are the probabilities themselves.
    np.testing.assert_allclose(used.weights_LE[0], weights, rtol=1e-5)
    np.testing.assert_array_equal(used.choices_LE[0], choices)
    assert used.tokens == table["tokens"] == sum((r["segment_ids"] > 0).sum() for r in batches)
    np.testing.assert_allclose(table["scores"]["1"], weights / weights.sum(), atol=1e-6)
    assert table["experts"] == {"1": list(scores.chosen(weights / weights.sum(), 0.2))}
    assert expert_table.read(out, model.config).experts.keys() == {1}

    with pytest.raises(UserError, match="--top-p=0.0 is not above 0"):
        command.main([*args, "--top-p=0"])


def test_chats_are_scored_as_fine_tuning_reads_them(tmp_path, capsys):
    """Rendered by the model's template, one token for a byte or a marker of a turn; every token counts."""
    folder = chat_folders.model(tmp_path / "model")
    data, out = chat_folders.chats(tmp_path / "chats.jsonl", 20), tmp_path / "experts.json"
    args = ["score", folder, f"--data={data}", f"--out={out}", "--score=token", "--tokens=0"]
    assert command.main([*args, "--sequence-length=64", "--non-expert-modules"]) == 0
    table = json.loads(out.read_text())
    chats = [json.loads(line)["messages"] for line in open(data, encoding="utf-8")]
    parts = [m for chat in chats for m in chat]
    assert table["tokens"] == sum(len(m["role"]) + len(m["content"]) + 4 for m in parts)
    assert table["non_expert_modules"] and not table["shared_experts"]
    for shares in table["scores"].values():
        assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert "of the score" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- the training


@functools.cache
def file_of(table: str) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as f:
        f.write(table)
    return f.name


def esft(
    table: dict = TABLE,
    optimizer: OptimizerConfig = ADAMW,
    mesh: MeshConfig | None = None,
    **others,
) -> Config:
    config = config_of(optimizer, mesh or MeshConfig(fsdp=1), **others)
    config = dataclasses.replace(config, esft=EsftConfig(file_of(json.dumps(table))))
    validate(config)
    return config


def by_path(params: nnx.State) -> dict[str, np.ndarray]:
    return {
        conversion.path_of(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(params)
    }


def learns(path: str, shape: tuple[int, ...], table: dict) -> np.ndarray:
    """bool [...], which numbers of a parameter of TINY learn by a table: written out."""
    if "/experts/" not in path:
        flag = "shared_experts" if "shared_experts" in path else "non_expert_modules"
        return np.full(shape, table.get(flag, False))
    out = np.zeros(shape, bool)
    for layer, experts in table["experts"].items():
        out[int(layer), experts] = True
    return out


@functools.cache
def run_of(config: Config, steps: int = 3):
    t = trainer(config)
    s, metrics = t.run(t.start(), steps)
    return (
        jax.device_get(s),
        np.asarray([float(m.loss) for m in metrics]),
        np.asarray([float(m.grad_norm) for m in metrics]),
    )


@functools.cache
def masked_run(table: str):
    """Three steps of a program that differentiates everything, with masks on gradients and updates."""
    config = config_of(ADAMW)
    if not json.loads(table).get("non_expert_modules"):  # a frozen router's selection bias stays
        config = dataclasses.replace(config, moe=MoeConfig(bias_update_rate=0.0))
    o = config.optimizer
    t = trainer(config)

    def masked(tree):
        return jax.tree_util.tree_map_with_path(
            lambda p, g: jnp.where(
                learns(conversion.path_of(p), g.shape, json.loads(table)), g, jnp.zeros_like(g)
            ),
            tree,
        )

    mask = optax.GradientTransformation(
        lambda _: optax.EmptyState(), lambda g, s, p=None: (masked(g), s)
    )
    adamw = optax.adamw(
        learning_rate(config), o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decay_mask
    )
    layout = t.layout._replace(
        optimizer=optax.chain(mask, optax.clip_by_global_norm(o.grad_clip), adamw, mask)
    )
    losses = []
    with jax.set_mesh(t.mesh):
        program = jax.jit(step.make_train_step(config, layout, objectives.make(config)))
        s = t.start()
        s = s._replace(opt_state=jax.jit(layout.optimizer.init)(s.params))
        for i in range(3):
            s, m = program(s, t.batch(i))
            losses.append(float(m.loss))
    return by_path(s.params), np.asarray(losses)


def check(config: Config, table: dict) -> None:
    """Losses to 1e-6; what learns to float32's rounding through Adam; the rest bit for bit."""
    s, losses, _ = run_of(config)
    theirs, their_losses = masked_run(json.dumps(table))
    np.testing.assert_allclose(losses, their_losses, rtol=1e-6)
    ours, start = by_path(s.weights().params), by_path(invariance.initial_state(TINY).params)
    assert ours.keys() == theirs.keys() == start.keys()
    bias_moved = not same(s.bias, invariance.initial_state(TINY).bias)
    assert bias_moved == table.get("non_expert_modules", False)
    for path, a in ours.items():
        mask = learns(path, a.shape, table)
        np.testing.assert_array_equal(a[~mask], start[path][~mask])
        if mask.any():
            moved = np.abs(theirs[path] - start[path]).max()
            assert moved > 0
            np.testing.assert_allclose(a, theirs[path], atol=1e-3 * moved + 1e-7, rtol=1e-6)


MESH = MeshConfig(fsdp=2, expert=4)


@pytest.mark.slow
def test_training_is_that_of_masked_gradients():
    """On two by four devices: each has one expert, and the stack of those that learn lies over all."""
    config = esft(mesh=MESH)
    check(config, TABLE)
    layout = trainer(config).layout
    rows = layout.abstract.params["layers"]["mlp"]["experts"]["gate_up_proj"].get_value()
    assert rows.shape == (2, 2, TINY.hidden_size, 2, TINY.moe_intermediate_size)
    where = layout.shardings.params["layers"]["mlp"]["experts"]["gate_up_proj"].get_value()
    assert where.shard_shape(rows.shape)[2] == TINY.hidden_size // 8


ALL = TABLE | {"shared_experts": True, "non_expert_modules": True}


@pytest.mark.slow
@pytest.mark.parametrize("table", [TABLE, ALL], ids=["experts", "all"])
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(mesh=MeshConfig(fsdp=2, expert=2, tensor=2), accumulation=2),
        dict(mesh=MeshConfig(stage=2, expert=2, fsdp=2), accumulation=2),
        dict(mesh=MeshConfig(fsdp=4, expert=2), sharding=ShardingConfig("shard_grad_op", 0)),
        dict(mesh=MeshConfig(fsdp=4, expert=2), sharding=ShardingConfig("zero1", 0)),
        dict(mesh=MeshConfig(data=2, expert=2), sharding=ShardingConfig("no_shard", 0)),
        dict(remat="full", offload=OffloadConfig(optimizer_state=True)),
    ],
)
def test_every_layout_computes_the_same(case, table):
    check(esft(table, **case), table)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["all_gather", "ring"])
def test_every_dispatch_computes_the_same(method):
    config = esft(mesh=MESH)
    check(dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch=method)), TABLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_other_optimizers_leave_other_experts(name):
    config = esft(optimizer=dataclasses.replace(ADAMW, name=name, learning_rate=1e-3))
    s, losses, _ = run_of(config)
    start = by_path(invariance.initial_state(TINY).params)
    assert np.isfinite(losses).all()
    for path, a in by_path(s.weights().params).items():
        mask = learns(path, a.shape, TABLE)
        np.testing.assert_array_equal(a[~mask], start[path][~mask])
        assert not mask.any() or not np.array_equal(a[mask], start[path][mask])


@pytest.mark.slow
def test_compressed_gradients():
    sharding = ShardingConfig("hybrid_shard", 0, gradient_compression="bfloat16")
    s, losses, _ = run_of(esft(mesh=MeshConfig(data=2, expert=2), sharding=sharding))
    np.testing.assert_allclose(losses, masked_run(json.dumps(TABLE))[1], rtol=1e-2)


def test_memory_and_the_table_at_the_start():
    """Gradients and moments of three of eight experts, in stacks of the two that one layer has."""
    t, everything = trainer(esft()), trainer(config_of(ADAMW))
    held, all_of_it = (x.layout.bytes_per_device(x.mesh) for x in (t, everything))
    experts = sum(
        a.nbytes
        for p, a in by_path(invariance.initial_state(TINY).params).items()
        if "/experts/" in p
    )
    assert held["frozen_parameters"] == all_of_it["parameters"]
    assert held["parameters"] == held["gradients"] == experts // 2
    assert held["optimizer"] < experts // 2 * 2 + 16
    said = t.layout.multipliers.table()[-1]
    share = experts * 3 / 8 / all_of_it["parameters"]
    assert f"({share:.1%}); 1 to 2 experts of a layer, 1.5 on average" in said


def test_factors_of_the_learning_rate_go_with_a_table(tmp_path):
    config = esft(ALL, dataclasses.replace(ADAMW, lr_multipliers="down_proj=0.1,norm=0"))
    with jax.set_mesh(trainer(esft()).mesh):
        found = state.make_layout(config, trainer(esft()).mesh).multipliers
    assert found.of(("layers", "mlp", "experts", "down_proj")) == 0.1
    assert found.of(("norm", "weight")) == 0 and found.of(("lm_head", "kernel")) == 1
    config = esft(TABLE, dataclasses.replace(ADAMW, lr_multipliers="norm=0.1"))
    with pytest.raises(UserError, match="'norm' matches only weights that config.esft.experts="):
        state.make_layout(config, trainer(esft()).mesh)
    with pytest.raises(UserError, match="config.offload.parameters=True and config.esft.experts="):
        esft(offload=OffloadConfig(parameters=True), remat="full")


def test_a_checkpoint_has_whole_experts_and_resumes_bit_for_bit(tmp_path, capsys):
    config = esft(mesh=MESH)
    t, everything = trainer(config), trainer(config_of(ADAMW, MESH))
    s, _ = t.run(t.start(), 2)
    tree = state.to_tree(s)
    assert jax.tree.structure(tree["params"]) == jax.tree.structure(
        state.to_tree(everything.layout.abstract)["params"]
    )
    with jax.set_mesh(t.mesh):
        checkpoints = Checkpointer(str(tmp_path))
        checkpoints.save(2, tree, {})
        checkpoints.wait()
        # What every reader of a run restores.
        wanted = t.layout.model.abstract_sharded()
        read = checkpoints.restore_params(state.to_tree(wanted))
        assert same(state.from_tree(read, wanted), s.weights())
        again, _ = resume.restore(checkpoints, t.layout)
        assert same(again, s) and not capsys.readouterr().out

        # The same number of other experts: their moments are not in there.
        other = {"experts": {"0": [1], "1": [3, 1]}}
        elsewhere = state.make_layout(esft(other, mesh=MESH), t.mesh)
        begun, _ = resume.restore(checkpoints, elsewhere)
        assert "begins anew" in capsys.readouterr().out
        assert same(begun.weights(), s.weights())
        assert not any(np.asarray(a).any() for a in jax.tree.leaves(begun.opt_state) if a.ndim)
        whole, _ = resume.restore(checkpoints, everything.layout)
        assert "begins anew" in capsys.readouterr().out and same(whole.weights(), s.weights())
        checkpoints.close()
    a, first = t.run(s, 2, first=2)
    b, second = t.run(again, 2, first=2)
    assert same(a, b) and same(first, second)


def test_a_model_with_multi_token_prediction_trains_its_experts_too():
    """The stack of a layer of multi-token prediction has no axis of layers. What `begin` takes out of all
    experts on two by two devices is what is there, negative zeros too."""
    table = {"experts": {"2": [7], "6": [5, 1]}}
    config = dataclasses.replace(
        invariance.variant(fsdp=2, expert=2), esft=EsftConfig(file_of(json.dumps(table)))
    )
    mesh = make_mesh(config, jax.devices()[:4])
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        whole = jax.tree.map(
            lambda a: np.round(rng.standard_normal(a.shape)).astype(np.float32) * np.float32(-1),
            layout.model.abstract.params,
        )
        params, frozen = layout.begin(jax.device_put(whole, layout.model.shardings.params))
    assert same(frozen, whole)
    for path, of_layer, experts in (
        (("layers", "mlp"), 1, [7]),
        (("mtp", 0, "layer", "mlp"), ..., [1, 5]),
    ):
        found, there = params, whole
        for key in (*path, "experts", "down_proj"):
            found, there = found[key], there[key]
        found, there = np.asarray(found.get_value()), there.get_value()
        assert found.shape == (*there.shape[: there.ndim - 3], len(experts), *there.shape[-2:])
        assert found[of_layer].tobytes() == there[of_layer][experts].tobytes()
        assert path[0] != "layers" or not found[[0, 2, 3, 4]].any()
