"""compress prune, layers and width: what is written, what stays bit for bit, and what is refused."""

import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from deepseek_jax import hf
from deepseek_jax.compress import calibration, prune, scores
from deepseek_jax.compress.scores import SUMS, Scores
from deepseek_jax.compress.source import open_source
from deepseek_jax.errors import UserError
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.hf import compression_map, exporter
from deepseek_jax.hf.reader import open_source as open_checkpoint
from deepseek_jax.run import importer
from tests.support import chat_folders, compression, conversion, runs
from tests.support import reference as ref
from tests.support.compression import GROUPED, SIGMOID, SOFTMAX

QUICK = ("--sequence-length=24", "--batch-size=3", "--dtype=float32")


@pytest.fixture(scope="module")
def sigmoid(tmp_path_factory):
    return compression.folder(tmp_path_factory.mktemp("sigmoid") / "model", SIGMOID)


def config_of(folder) -> dict:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        return json.load(f)


def operation_of(folder) -> dict:
    return compression_map.read_document(str(folder)).operations[-1]


def expert_tensors(weights, layer, expert):
    prefix = f"model.layers.{layer}.mlp.experts.{expert}."
    return {n.removeprefix(prefix): a for n, a in weights.items() if n.startswith(prefix)}


def check_kept(before, after, mapped, model):
    """Kept experts, their rows of the router and selection biases are those of the source, bit for bit."""
    rows = compression_map.expert_rows(model)
    for row, layer in zip(mapped.expert_map, rows, strict=True):
        kept = [e for (e,) in row]
        assert kept == sorted(kept)
        for new, old in enumerate(kept):
            a, b = expert_tensors(after, layer, new), expert_tensors(before, layer, old)
            assert a.keys() == b.keys() and len(a) == 3
            for name, value in a.items():
                np.testing.assert_array_equal(value, b[name])
        for name in ("gate.weight", "gate.e_score_correction_bias"):
            name = f"model.layers.{layer}.mlp.{name}"
            if name in before:
                np.testing.assert_array_equal(after[name], before[name][kept])


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_keeping_all_experts_is_bit_identical(tmp_path, dtype):
    folder = compression.folder(tmp_path / "model", GROUPED, dtype=dtype)
    out = tmp_path / "out"
    compression.run("prune", folder, out, "--method=random", "--experts=8")
    before, after = compression.tensors(folder), compression.tensors(out)
    copies = after.keys() - before.keys()
    assert before.keys() <= after.keys()
    assert all(re.search(r"layers\.4\.(embed_tokens|shared_head\.head)\.weight", n) for n in copies)
    for name, a in before.items():
        assert a.dtype == after[name].dtype, name
        np.testing.assert_array_equal(a.view(np.uint8), after[name].view(np.uint8), err_msg=name)
    assert compression_map.read(str(out)) == compression_map.unchanged(GROUPED)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).exists()


@pytest.mark.slow
def test_experts_are_pruned_by_reap(tmp_path, capsys):
    """Of every group the best, in ascending order; multi-token prediction by scores of its own."""
    folder = compression.folder(tmp_path / "model", GROUPED)
    text, out = compression.text(tmp_path / "text.jsonl"), tmp_path / "out"
    file = tmp_path / "scores.safetensors"
    compression.run("score", folder, file, f"--text={text}", *QUICK)
    capsys.readouterr()
    with pytest.raises(UserError, match="every group keeps as many, 2 or more"):
        compression.run("prune", folder, out, "--experts=4", f"--text={text}")
    model = dataclasses.replace(GROUPED, n_group=2, topk_group=1)
    assert config_of(folder)["n_group"] == 4

    two = compression.folder(tmp_path / "two", model)
    compression.run("prune", two, out, "--experts=6", f"--text={text}", *QUICK)
    said = capsys.readouterr().out
    assert "output error" in said and "6 of 8" in said
    config = config_of(out)
    assert config["n_routed_experts"] == 6 and config["n_group"] == 2
    assert config["num_nextn_predict_layers"] == 1
    mapped, done = compression_map.read(str(out)), operation_of(out)
    for row, score in zip(mapped.expert_map, done["scores"].values(), strict=True):
        kept = [e for (e,) in row]
        best = [g * 4 + i for g in (0, 1) for i in sorted(ref.top(score[g * 4 : g * 4 + 4], 3))]
        assert kept == best
    check_kept(compression.tensors(two), compression.tensors(out), mapped, model)
    assert len(done["layer_errors"]) == 4 and 0 < done["layer_errors"][3] < 2
    assert done["layer_errors"][0] == 0  # a dense layer in front
    assert done["calibration"]["tokens"] > 100
    assert (out / "compression.svg").read_text().count("<circle") == 4 * 8

    again = tmp_path / "again"  # maps compose, and scores may come from a file
    compression.run("score", out, file, f"--text={text}", *QUICK)
    compression.run("prune", out, again, "--experts=4", f"--scores={file}", "--mtp=drop")
    document = compression_map.read_document(str(again))
    assert [o["experts"] if "experts" in o else o["num_experts"] for o in document.operations] == [
        6,
        4,
    ]
    assert document.operations[-1]["layer_errors"] is None
    assert config_of(again)["num_nextn_predict_layers"] == 0
    assert not [n for n in compression.tensors(again) if ".layers.4." in n]
    model = dataclasses.replace(model, num_nextn_predict_layers=0)
    check_kept(compression.tensors(two), compression.tensors(again), document.map, model)
    assert document.source == open_source(two).identity()
    hf.load(str(again))([[1, 2, 3]])


@pytest.mark.slow
def test_errors_are_those_of_the_reference(tmp_path):
    """Hidden states of both models in NumPy, over the same tokens."""
    weights = conversion.random_weights(SIGMOID, 5)
    folder = compression.folder(tmp_path / "model", SIGMOID, weights=weights)
    text, out = compression.text(tmp_path / "text.jsonl", 3), tmp_path / "out"
    compression.run("prune", folder, out, "--experts=4", f"--text={text}", *QUICK)
    args = compression.args_of(
        "prune", folder, "x", "--experts=4", f"--text={text}", *QUICK, "--tokens=0"
    )
    opened = calibration.open_for(args)
    batch = calibration.read(opened, args).batches[0]
    after, model = compression.tensors(out), open_checkpoint(str(out))[1]

    def hidden(weights, model):
        found = [[] for _ in range(model.num_hidden_layers)]
        for ids, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            x = ref.float64(weights)["model.embed_tokens.weight"][ids]
            for n in range(model.num_hidden_layers):
                w = ref.layer_weights(ref.float64(weights), n)
                dense = n < model.first_k_dense_replace
                positions = ref.segment_positions(segments)
                x, _ = ref.decoder_layer(x, w, model, dense, positions, segments)
                found[n].append(x[segments > 0])
        return [np.concatenate(rows) for rows in found]

    pairs = zip(hidden(after, model), hidden(weights, SIGMOID), strict=True)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
    # float32 and its rounding to eight digits
    np.testing.assert_allclose(operation_of(out)["layer_errors"], errors, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_softmax_router_can_be_scaled(tmp_path, capsys):
    """Without renormalisation weights of kept experts rise by what the others had, on average."""
    folder = compression.folder(tmp_path / "model", SOFTMAX)
    text = compression.text(tmp_path / "text.jsonl")
    args = ["--experts=4", "--method=frequency", f"--text={text}", *QUICK]
    compression.run("prune", folder, tmp_path / "plain", *args)
    assert "--scale divides it out" in capsys.readouterr().out
    compression.run("prune", folder, tmp_path / "scaled", *args, "--scale")
    plain, scaled = (compression.tensors(tmp_path / n) for n in ("plain", "scaled"))
    factors = operation_of(tmp_path / "scaled")["scale"]
    assert len(factors) == 3 and all(0 < f < 1 for f in factors)
    for name, a in plain.items():
        expected = a
        if re.search(r"mlp\.experts\.\d+\.down_proj", name):
            layer = int(re.search(r"layers\.(\d+)", name)[1])
            expected = a * np.float32(factors[layer - 1])
        np.testing.assert_allclose(scaled[name], expected, rtol=1e-6, err_msg=name)
    other = compression.folder(tmp_path / "sigmoid", SIGMOID)
    with pytest.raises(UserError, match="--scale is of softmax routers"):
        compression.run("prune", other, tmp_path / "x", *args, "--scale")


@pytest.mark.slow
def test_layers_of_least_influence_are_dropped(tmp_path, capsys):
    folder = compression.folder(tmp_path / "model", GROUPED)
    text, out = compression.text(tmp_path / "text.jsonl"), tmp_path / "out"
    compression.run("layers", folder, out, "--drop=1", f"--text={text}", *QUICK)
    assert "dropped" in capsys.readouterr().out
    done, config = operation_of(out), config_of(out)
    assert config["num_hidden_layers"] == 3 and config["first_k_dense_replace"] == 1
    gone = 1 + int(np.argmin(done["scores"][1:]))  # never the dense one in front
    assert done["dropped"] == [gone]
    kept = [n for n in range(4) if n != gone]
    mapped = compression_map.read(str(out))
    assert mapped.layer_map == tuple(kept) and len(mapped.expert_map) == 3
    before, after = compression.tensors(folder), compression.tensors(out)
    for new, old in enumerate([*kept, 4]):  # multi-token prediction comes after the last
        prefix = f"model.layers.{old}."
        names = [n for n in before if n.startswith(prefix)]
        assert names
        for name in names:
            moved = name.replace(prefix, f"model.layers.{new}.")
            np.testing.assert_array_equal(after[moved], before[name])
    if gone > 1:
        assert done["layer_errors"][0] == 0
    hf.load(str(out))([[1, 2, 3]])

    with pytest.raises(UserError, match="--drop=3 is not between 0 and 2"):
        compression.run("layers", folder, tmp_path / "x", "--drop=3", f"--text={text}")
    compression.run(
        "layers", folder, tmp_path / "dense", "--drop=3", "--dense", f"--text={text}", *QUICK
    )
    config = config_of(tmp_path / "dense")
    assert config["num_hidden_layers"] == 1 and config["first_k_dense_replace"] == 0


@pytest.mark.slow
def test_experts_are_made_narrower(tmp_path):
    folder = compression.folder(tmp_path / "model", GROUPED)
    text, out = compression.text(tmp_path / "text.jsonl"), tmp_path / "out"
    compression.run("width", folder, out, "--moe-intermediate=8", f"--text={text}", *QUICK)
    assert config_of(out)["moe_intermediate_size"] == 8
    assert compression_map.read(str(out)) == compression_map.unchanged(GROUPED)
    before, after = compression.tensors(folder), compression.tensors(out)
    for name, a in after.items():
        if "mlp.experts." not in name and "shared_experts" not in name:
            if name in before:
                np.testing.assert_array_equal(a, before[name])
            continue
        axis = 1 if "down_proj" in name else 0
        rows, old = np.moveaxis(a, axis, 0), np.moveaxis(before[name], axis, 0)
        where = [int(np.flatnonzero((old == row).all(1))[0]) for row in rows]
        assert where == sorted(where) and len(rows) == (16 if "shared" in name else 8)
        # the three matrices of an expert keep the same units
        for part in ("gate", "up", "down"):
            other = re.sub(r"(gate|up|down)_proj", f"{part}_proj", name)
            expected = np.take(before[other], where, axis=1 if part == "down" else 0)
            np.testing.assert_array_equal(after[other], expected)
    hf.load(str(out))([[1, 2, 3]])
    for width, said in ((12, "is not divisible by 8"), (24, "is above the model's")):
        with pytest.raises(UserError, match=said):
            compression.run(
                "width", folder, tmp_path / "x", f"--moe-intermediate={width}", f"--text={text}"
            )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--experts=1"], "--experts=1 is below num_experts_per_tok=2"),
        (["--experts=9"], "--experts=9 is above the model's 8 experts"),
        (["--experts=4"], "--method=reap needs to see what experts do"),
        (["--experts=4", "--method=random", "--keep-super"], "needs to see"),
        (["--experts=4", "--text=none.jsonl"], "none.jsonl"),
        (["--experts=4", "--scores=none.safetensors"], "--scores=none.safetensors cannot be read"),
        (["--experts=4", "--method=best"], "invalid choice"),
        (["--experts=4", "--seed=-1"], "--seed: '-1' is not a whole number of 0 or more"),
        (["--experts=4", "--batch-size=0"], "--batch-size: '0' is not a whole number of 1 or more"),
        (["--experts=4", "--sequence-length=0"], "--sequence-length: '0' is not a whole number of"),
        (["--experts=4", "--step=-1"], "--step: '-1' is not a whole number of 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, sigmoid, args, said):
    with pytest.raises(UserError) as error:
        compression.run("prune", sigmoid, tmp_path / "out", *args)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path):
    folder = compression.folder(tmp_path / "model", SIGMOID)
    with pytest.raises(UserError, match="exists already"):
        compression.run("prune", folder, folder, "--experts=4", "--method=random")
    with pytest.raises(UserError, match="there is no folder"):
        compression.run("prune", folder, tmp_path / "a" / "b", "--experts=4", "--method=random")
    dense = dataclasses.replace(SIGMOID, first_k_dense_replace=4)
    other = compression.folder(tmp_path / "dense", dense)
    with pytest.raises(UserError, match="has no routed experts"):
        compression.run("prune", other, tmp_path / "out", "--experts=4", "--method=random")


def test_super_experts_are_kept():
    arrays = {name: np.zeros((4, 8)) for name in SUMS}
    arrays["max_activation"][:] = 1.0
    arrays["max_activation"][1, 6] = 100.0
    arrays["frequency"][:] = np.arange(8, 0, -1)
    found = Scores(arrays, np.zeros(5), (1, 2, 3, 4), 1, {})
    args = compression.args_of("prune", "m", "o", "--experts=2", "--method=frequency")
    assert prune.chosen(found, SIGMOID, args) == [(0, 1)] * 4
    args.keep_super = True
    assert prune.chosen(found, SIGMOID, args) == [(0, 1), (0, 6), (0, 1), (0, 1)]
    assert scores.METHODS[0] == "reap"


KILLED = """
import os, signal, sys
from deepseek_jax.compress import errors_of_layers
from deepseek_jax.compress.__main__ import main
from deepseek_jax.hf import exporter

if sys.argv[1] == "weights":
    write, count = exporter.write_leaf, [0]
    def dying(*args):
        count[0] += 1
        if count[0] == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)
    exporter.write_leaf = dying
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_output(tmp_path):
    folder, out = compression.folder(tmp_path / "model", SIGMOID), tmp_path / "out"
    args = ["prune", folder, str(out), "--experts=4", "--method=random"]
    command = [sys.executable, "-c", KILLED, "weights", *args]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    compression.run(*args)
    assert out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.slow
def test_runs_are_compressed_like_their_exports(tmp_path):
    """Of train.py and of import: the same tensors as from the checkpoint that export writes of them."""
    workdir, text = str(tmp_path / "run"), compression.text(tmp_path / "text.jsonl", 400)
    done = runs.run(runs.command(workdir, text, "--config.train.steps=2"))
    assert done.returncode == 0, done.stderr
    commands.export(workdir, str(tmp_path / "exported"))
    importer.import_(str(tmp_path / "exported"), str(tmp_path / "imported"))
    found = []
    for name in ("run", "exported", "imported"):
        out = tmp_path / f"{name}-out"
        compression.run("prune", tmp_path / name, out, "--experts=4", "--method=router_norm")
        found.append((compression.tensors(out), compression_map.read_document(str(out))))
    for weights, document in found[1:]:
        assert document == found[0][1]
        assert weights.keys() == found[0][0].keys()
        for name, a in weights.items():
            np.testing.assert_array_equal(a, found[0][0][name], err_msg=name)
    # What is trained from a compressed model keeps the map: import and export carry it on.
    importer.import_(str(tmp_path / "run-out"), str(tmp_path / "next"))
    compression.run("prune", tmp_path / "next", tmp_path / "last", "--experts=4", "--method=random")
    assert len(compression_map.read_document(str(tmp_path / "last")).operations) == 2


@pytest.mark.slow
def test_one_model_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """When weights are written the model that was scored is gone from the devices."""
    folder = compression.folder(tmp_path / "model", SIGMOID)
    text, held = compression.text(tmp_path / "text.jsonl", 3), []
    export = exporter.export

    def watched(*args):
        gc.collect()
        held.append(sum(a.nbytes for a in jax.live_arrays()))
        return export(*args)

    monkeypatch.setattr(exporter, "export", watched)
    gc.collect()
    before = sum(a.nbytes for a in jax.live_arrays())
    args = ["--experts=4", f"--text={text}", *QUICK]
    compression.run("prune", folder, tmp_path / "out", *args)
    weights = sum(a.nbytes for a in compression.tensors(folder).values())
    assert held[0] - before < weights / 10


@pytest.mark.slow
def test_chats_are_calibration_text(tmp_path, capsys):
    """By the model's template, as fine-tuning reads them; every token counts."""
    folder = chat_folders.model(tmp_path / "model")
    data = chat_folders.chats(tmp_path / "chats.jsonl", 10)
    compression.run(
        "prune", folder, tmp_path / "out", "--experts=2", f"--text={data}", "--tokens=0"
    )
    chats = [json.loads(line)["messages"] for line in open(data, encoding="utf-8")]
    parts = [m for chat in chats for m in chat]
    read = operation_of(tmp_path / "out")["calibration"]
    assert read["tokens"] == sum(len(m["role"]) + len(m["content"]) + 4 for m in parts)
    assert read["files"][0]["name"] == "chats.jsonl" and len(read["files"][0]["sha256"]) == 64
    with open(tmp_path / "out" / "tokenizer_config.json", encoding="utf-8") as f:
        assert json.load(f)["chat_template"] == chat_folders.TEMPLATE
