"""compress merge: clusters against scipy and NumPy, averages, maps, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from scipy.cluster import hierarchy

from deepseek_jax import hf
from deepseek_jax.compress import clusters, merged_experts
from deepseek_jax.compress.parts import DOWN, GATE_UP
from deepseek_jax.errors import UserError
from deepseek_jax.hf import compression_map
from deepseek_jax.objectives.forward import run_model
from deepseek_jax.parallel.mesh import BATCH_AXES
from tests.support import compression, conversion, evaluation

IDS = np.random.default_rng(0).integers(0, 256, (2, 16))


# ------------------------------------------------------------------------------ clusters


def test_average_linkage_is_scipys_cut():
    rng = np.random.default_rng(0)
    for count in (1, 3, 7, 12):
        points = rng.standard_normal((12, 5))
        found = clusters.average_linkage(points, np.arange(12), count)
        tree = hierarchy.linkage(points, "average")
        label = hierarchy.cut_tree(tree, n_clusters=count)[:, 0]
        assert {frozenset(c) for c in found} == {
            frozenset(np.flatnonzero(label == k).tolist()) for k in range(count)
        }
        assert all(c[0] == max(c) for c in found)  # the largest of what orders them
        assert [c[0] for c in found] == sorted(c[0] for c in found)


def test_equal_experts_make_as_many_clusters_as_asked_for():
    found = clusters.average_linkage(np.zeros((6, 3)), np.zeros(6), 4)
    assert len(found) == 4 and sorted(e for c in found for e in c) == list(range(6))


def test_nearest_joins_the_most_similar_of_the_best():
    order = np.array([1.0, 5.0, 3.0, 4.0, 2.0])
    alike = np.zeros((5, 5))
    alike[0, 3], alike[2, 1], alike[4, 3] = 1, 1, 1
    assert clusters.nearest(alike, order, 2) == [(1, 2), (3, 0, 4)]
    assert clusters.nearest(alike, order, 5) == [(e,) for e in range(5)]


def test_groups_keep_as_many_each():
    points = np.arange(8.0)[:, None] ** 2

    def split(group, count):
        return clusters.average_linkage(points[group], np.zeros(4), count)

    found = clusters.in_groups(split, 8, 2, 4)
    assert [c[0] // 4 for c in found] == [0, 0, 1, 1]
    assert all(len({e // 4 for e in c}) == 1 for c in found)


def test_alignment_finds_the_order_again():
    rng = np.random.default_rng(0)
    gate_up, down = rng.standard_normal((6, 2, 9)), rng.standard_normal((9, 6))
    order = rng.permutation(9)
    found = merged_experts.order_of_units(gate_up, down, gate_up[..., order], down[order])
    for rest, array in ((GATE_UP, gate_up), (DOWN, down)):
        moved = merged_experts.reordered(rest, array, order)
        np.testing.assert_array_equal(merged_experts.reordered(rest, moved, found), array)


# ------------------------------------------------------------------------------ models


def duplicated(model, folder):
    """A checkpoint whose second half of experts are copies of the first, that no token chooses."""
    half = dataclasses.replace(model, n_routed_experts=model.n_routed_experts // 2)
    weights = conversion.random_weights(half, 0)
    out = {}
    for name, a in weights.items():
        out[name] = a
        if ".mlp.experts." in name:
            before, _, after = name.partition(".experts.")
            e, _, last = after.partition(".")
            out[f"{before}.experts.{int(e) + half.n_routed_experts}.{last}"] = a
        elif name.endswith("mlp.gate.weight"):
            out[name] = np.concatenate(
                [a, np.zeros_like(a)]
            )  # the score of a half, before the bias
        elif name.endswith("e_score_correction_bias"):
            out[name] = np.concatenate([a, np.full_like(a, -9.0)])
    return compression.folder(folder, model, weights=out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hc-smoe", "ream", "m-smoe"])
def test_copies_merge_without_loss(method, tmp_path):
    """The sigmoid router scores each expert alone: what no token chooses can go."""
    model = dataclasses.replace(compression.SIGMOID, norm_topk_prob=True)
    folder = duplicated(model, tmp_path / "model")
    out = tmp_path / "out"
    # Copies are never chosen, and their rows are all alike: m-smoe joins them with any expert, so that
    # alignment cannot help. Averages by frequency leave each expert as it is all the same.
    compression.run(
        "merge",
        folder,
        out,
        f"--method={method}",
        "--experts=4",
        f"--text={compression.text(tmp_path / 'text.txt')}",
        "--dtype=float32",
    )
    before, after = hf.load(folder), hf.load(str(out))
    assert after.config.n_routed_experts == 4
    conversion.assert_close(after(IDS), before(IDS), 1e-6, "logits")
    rows = compression_map.read(str(out)).expert_map
    assert all(sorted(e for group in row for e in group) == list(range(8)) for row in rows)
    if method != "m-smoe":
        assert all(
            {frozenset(g) for g in row} == {frozenset((e, e + 4)) for e in range(4)} for row in rows
        )


@pytest.mark.parametrize(
    "model, argv",
    [
        (dataclasses.replace(compression.GROUPED, n_group=2, topk_group=1), ["--method=hc-smoe"]),
        (compression.SOFTMAX, ["--method=ream", "--align"]),
    ],
    ids=["hc-smoe", "ream"],
)
@pytest.mark.slow
def test_merged_weights_are_the_averages(model, argv, tmp_path):
    """By the written clusters and a NumPy count of choices; transformers gives our logits."""
    folder = compression.folder(tmp_path / "model", model)
    text = compression.text(tmp_path / "text.txt")
    scores = tmp_path / "scores.safetensors"
    compression.run("score", folder, scores, f"--text={text}", "--dtype=float32")
    out = tmp_path / "out"
    compression.run("merge", folder, out, "--experts=4", f"--text={text}", "--dtype=float32", *argv)
    count_LE = safetensors.numpy.load_file(scores)["frequency"]
    (operation,) = compression_map.read_document(str(out)).operations
    before, after = (safetensors.numpy.load_file(f"{d}/model.safetensors") for d in (folder, out))
    for row, (layer, found) in enumerate(operation["clusters"].items()):
        assert len(found) == 4
        for new, cluster in enumerate(found):
            stem = f"model.layers.{layer}.mlp"
            for name in ("gate.weight", "gate.e_score_correction_bias"):
                if f"{stem}.{name}" in before:
                    kept = before[f"{stem}.{name}"][cluster[0]]
                    np.testing.assert_array_equal(after[f"{stem}.{name}"][new], kept)
            if "--align" in argv and len(cluster) > 1:
                continue
            share = count_LE[row][cluster] / max(count_LE[row][cluster].sum(), 1)
            share = share if share.sum() else np.full(len(cluster), 1 / len(cluster))
            for name in ("gate_proj", "up_proj", "down_proj"):
                each = [before[f"{stem}.experts.{e}.{name}.weight"] for e in cluster]
                wanted = sum(s * a.astype(np.float64) for s, a in zip(share, each, strict=True))
                got = after[f"{stem}.experts.{new}.{name}.weight"]
                np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-8)
                if len(cluster) == 1:
                    np.testing.assert_array_equal(got, each[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", experts_implementation="eager"
    )
    ours = hf.load(str(out))
    with torch.no_grad():
        logits = theirs(input_ids=torch.as_tensor(IDS), use_cache=False).logits.numpy()
    conversion.assert_close(ours(IDS), logits, 1e-4, "logits")


@pytest.mark.slow
def test_mean_outputs_are_those_of_every_expert_on_every_token(tmp_path):
    """Against transformers' input of the layer and a loop over experts in float64, on one device and on a
    mesh; padding counts for nothing."""
    theirs = evaluation.write_model(tmp_path)
    ids = np.random.default_rng(0).integers(0, 300, (4, 12)).astype(np.int32)
    valid = np.broadcast_to(np.arange(12) < 9, ids.shape)
    batch = {
        "tokens": ids,
        "segment_ids": valid.astype(np.int32),
        "positions": np.arange(12, dtype=np.int32)[None].repeat(4, 0),
    }
    block, seen = theirs.model.layers[1].mlp, []
    with block.register_forward_pre_hook(lambda _, given: seen.append(given[0])), torch.no_grad():
        theirs(input_ids=torch.as_tensor(ids), use_cache=False)
    h = seen[0].double().numpy()[valid]
    wanted = []
    for both, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
        gate, up = np.split(h @ both.detach().double().numpy().T, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up @ down.detach().double().numpy().T
        wanted.append(y.sum(0))
    for mesh in (None, jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"))):
        model = hf.load(str(tmp_path), mesh=mesh)

        def taps(params, bias, batch, model=model):
            net = model.layout.merge_for_inference(params, bias)
            return run_model(net, batch, ("expert_outputs",)).taps["expert_outputs"]

        with jax.set_mesh(model.mesh):
            placed = {k: jax.device_put(a, jax.P(BATCH_AXES)) for k, a in batch.items()}
            found = np.asarray(jax.jit(taps)(model.params, model.bias, placed))
        conversion.assert_close(found[0], np.stack(wanted), 1e-5, str(mesh))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """(a model's folder, text)."""
    folder = tmp_path_factory.mktemp("grouped")
    return compression.folder(folder / "model", compression.GROUPED), compression.text(folder / "t")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--experts=4"], "merge needs calibration text"),
        (["--experts=9", "--text=TEXT"], "--experts=9 is above the model's 8 experts"),
        (["--experts=1", "--text=TEXT"], "--experts=1 is below num_experts_per_tok=2"),
        (["--experts=6", "--text=TEXT"], "--experts=6 does not fit n_group=4"),
        (["--experts=4", "--text=gone"], "gone"),
    ],
)
def test_bad_options_are_refused(argv, said, grouped, tmp_path):
    folder, text = grouped
    argv = [a.replace("TEXT", text) for a in argv]
    with pytest.raises(UserError, match=said):
        compression.run("merge", folder, tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_outputs_of_no_token_are_refused(tmp_path):
    folder = compression.folder(tmp_path / "model", compression.SIGMOID)
    with pytest.raises(UserError, match="--output-tokens=0"):
        compression.run("merge", folder, tmp_path / "out", "--experts=2", "--output-tokens=0")
    assert not (tmp_path / "out").exists()
