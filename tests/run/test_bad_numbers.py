"""Numbers that are not finite: skipped on all devices alike, counted, rolled back or stopped at.

And spikes of the loss, and the rows behind a step.
"""

import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import CheckpointConfig, EvalConfig, LogConfig, MeshConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.data.windows import Skipping, Windows
from deepseek_jax.errors import BadNumbers, UserError
from deepseek_jax.objectives import pretrain
from deepseek_jax.run.loop import Result
from deepseek_jax.run.progress import Progress
from deepseek_jax.run.report import Spikes
from deepseek_jax.train import state
from tests.support import ROOT, invariance
from tests.support.runs import command, run
from tests.support.small_loops import make_loop
from tests.support.small_runs import TINY, Trainer, config_of, same

B, S = invariance.SEQUENCES, invariance.LENGTH
POISON = TINY.vocab_size - 1  # a token whose loss is no number


def test_windows_against_a_list():
    rng = np.random.default_rng(0)
    for _ in range(200):
        kept, windows = (
            list(range(200)),
            Windows(),
        )  # the global order without what was skipped, by hand
        for _ in range(rng.integers(0, 4)):
            start, count = int(rng.integers(0, 60)), int(rng.integers(1, 12))
            windows = windows.without(start, count)
            kept = [row for row in kept if not kept[start] <= row <= kept[start + count - 1]]
        start, count = int(rng.integers(0, 60)), int(rng.integers(1, 20))
        ranges = windows.rows(start, count)
        assert [row for first, last in ranges for row in range(first, last)] == kept[
            start : start + count
        ]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "ranges that touch are one"
        assert Windows.of([list(w) for w in reversed(windows.skipped)]) == windows and all(
            a[1] < b[0] for a, b in itertools.pairwise(windows.skipped)
        )
        assert [windows.row(n) for n in range(start, start + count)] == kept[start : start + count]


def test_spikes_against_numpy():
    rng = np.random.default_rng(0)
    values = 3 + 0.1 * rng.standard_normal(400)
    values[[50, 51, 200, 399]] = [9, 8, 4.6, 20]
    values[10] = 50  # too early to tell
    values[300] = np.nan
    spikes, kept, found, expected = Spikes(10.0), [], {}, {}
    for i, v in enumerate(values):
        if hit := spikes.add(float(v)):
            found[i] = hit
        if np.isnan(v):
            continue
        window = np.asarray(kept[-100:])
        if len(window) >= 20:
            median = np.median(window)
            deviations = (v - median) / max(
                1.4826 * np.median(np.abs(window - median)), 1e-3 * median
            )
            if deviations > 10:
                expected[i] = (median, deviations)
                continue
        kept.append(v)
    assert sorted(found) == sorted(expected) == [50, 51, 200, 399]
    assert all(found[i] == pytest.approx(expected[i]) for i in found)
    assert not any(Spikes(0.0).add(v) for v in values)
    assert Spikes(10.0, values[150:199]).add(9.0)[0] == pytest.approx(
        statistics.median(values[150:199])
    )


class Texts:
    """Rows by their number in the global order, some of them poisoned."""

    def __init__(self, poisoned):
        self._poisoned = poisoned

    def train_rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        rows = [
            np.random.default_rng(i).integers(1, POISON, S) for i in range(start, start + count)
        ]
        tokens = np.stack(
            [np.full(S, POISON) if i in self._poisoned else r for i, r in enumerate(rows, start)]
        ).astype(np.int32)
        targets = np.concatenate([tokens[:, 1:], np.full((count, 1), -100, np.int32)], axis=1)
        positions = np.broadcast_to(np.arange(S, dtype=np.int32), tokens.shape)
        return {
            "tokens": tokens,
            "targets": targets,
            "next_tokens": np.maximum(targets, -1),
            "segment_ids": np.ones_like(tokens),
            "positions": positions,
        }


class Poisoned(pretrain.Pretraining):
    def loss(self, model, out, batch, totals, frozen_out):
        result = super().loss(model, out, batch, totals)
        poison = jnp.any(batch["tokens"] == POISON)
        return jax.tree.map(lambda x: jnp.where(poison, jnp.nan, x), result)


@pytest.fixture(scope="module")
def trainer():
    config = config_of(
        mesh=MeshConfig(fsdp=2, expert=2),
        steps=20,
        max_bad_steps=2,
        on_bad_steps="rollback",
        max_rollbacks=2,
        accumulation=2,
    )
    config = dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(every_steps=4, keep=0),
        log=LogConfig(every_steps=1, trackers=""),
        eval=EvalConfig(every_steps=0),
    )
    validate(config)
    return Trainer(config, Poisoned(config))


def train(t: Trainer, folder, texts, steps: int | None = None, **options) -> Result:
    """The loop of train.py, from the newest checkpoint in the folder if there is one."""
    config = dataclasses.replace(t.config, train=dataclasses.replace(t.config.train, **options))
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpointer(str(folder / "checkpoints"))

    def restore():
        if checkpoints.latest_step() is None:
            return t.start(), Progress()
        tree, extra = checkpoints.restore(state.to_tree(t.layout.abstract_sharded()))
        return state.from_tree(tree, t.layout.abstract), Progress.of_extra(extra)

    if steps:  # ends earlier, as by a signal
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    with jax.set_mesh(t.mesh):
        begins = restore()
        loop = make_loop(
            config, str(folder), t.mesh, t.compiled, texts, checkpoints, begins, restore=restore
        )
        try:
            return loop.run(*begins)
        finally:
            checkpoints.close()


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_rolls_back_and_skips_the_data(trainer, tmp_path):
    """Rows 96 to 99 of the data, in step 7, and 112 to 127, step 8, are bad.

    Afterwards all is as if rows 64 to 127 had never been there.
    """
    bad = range(98, 128)
    result = train(trainer, tmp_path / "a", Texts(bad))
    without = Skipping(Texts(bad), Windows(((4 * B, 8 * B),)))
    calm = train(trainer, tmp_path / "b", without)
    assert (
        same(result.state._replace(skipped_steps=0), calm.state._replace(skipped_steps=0))
        and int(result.state.skipped_steps) == 0
    )

    def of(folder):
        rows = [r for r in rows_of(folder) if "loss" in r]
        return [(r["step"], r["loss"], r["grad_norm"], r["tokens_seen"]) for r in rows]

    assert of(tmp_path / "a") == of(tmp_path / "b") and len(of(tmp_path / "a")) == 20
    (rollback,) = [r for r in rows_of(tmp_path / "a") if "rollback" in r]
    assert rollback == {
        "step": 5,
        "rollback": 1,
        "rolled_back_from": 8,
        "skipped_rows": [[4 * B, 8 * B]],
    }
    reader = Checkpointer(str(tmp_path / "a" / "checkpoints"), read_only=True)
    assert [reader.read_extra(step).get("skipped_rows") for step in (4, 8, 12, 20)] == [
        None
    ] + 3 * [[[4 * B, 8 * B]]]


@pytest.mark.slow
def test_resumes_exactly_after_a_rollback(trainer, tmp_path):
    """Ended after a rollback and resumed; and ended before the checkpoint that records the rollback."""
    bad = [
        *range(98, 128),
        *range(300, 320),
    ]  # two rollbacks: rows 64 to 127 are missing when step 15 comes to row 300
    whole = train(trainer, tmp_path / "whole", Texts(bad))
    assert [r["skipped_rows"] for r in rows_of(tmp_path / "whole") if "rollback" in r] == [
        [[64, 128]],
        [[64, 128], [256, 320]],
    ]
    train(trainer, tmp_path / "parts", Texts(bad), steps=10)
    again = train(trainer, tmp_path / "parts", Texts(bad))
    assert same(again.state, whole.state)

    def figures(folder):
        """Rows without times and memory."""
        return [
            {k: v for k, v in r.items() if not k.endswith(("_s", "_sec", "_gb", "_device"))}
            for r in rows_of(folder)
        ]

    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    before = figures(tmp_path / "whole")
    for step in (8, 12, 16, 20):
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / str(step), ignore_errors=True)
    assert (
        same(train(trainer, tmp_path / "whole", Texts(bad)).state, whole.state)
        and figures(tmp_path / "whole") == before
    )


def test_stops_after_too_many(trainer, tmp_path):
    with pytest.raises(
        BadNumbers,
        match=r"up to step 6 .*It was rolled back 2 times \(config.train.max_rollbacks\)",
    ):
        train(trainer, tmp_path / "a", Texts(range(98, 10_000)))
    with pytest.raises(
        BadNumbers,
        match=r"^2 updates in a row .* up to step 8 .* last good checkpoint is step 4 ",
    ):
        train(trainer, tmp_path / "b", Texts(range(98, 10_000)), on_bad_steps="stop")
    last = rows_of(tmp_path / "b")[-2:]
    assert [(r["skipped_steps"], r["rows"]) for r in last] == [
        (1, [[96, 112]]),
        (2, [[112, 128]]),
    ] and "loss" not in last[0]
    assert not (tmp_path / "b" / "checkpoints" / "8").exists()


def test_a_skipped_update_is_skipped_on_all_devices(trainer):
    """A row of one device is bad: parameters, moments and bias stay as they were on every device.

    Bit for bit, and so do the copies.
    """
    t = trainer
    with jax.set_mesh(t.mesh):
        from deepseek_jax.train.batch import put_batch

        def batch(texts):
            return put_batch(texts.train_rows(0, B), t.config.micro_batch, t.mesh)

        before, _ = t.compiled(t.start(), batch(Texts(range(0))))
        host = jax.tree.map(np.asarray, before)
        after, m = t.compiled(before, batch(Texts(range(5, 6))))
    assert int(m.bad_steps) == 1 == int(after.skipped_steps) and int(after.step) == 2
    assert same(
        (after.params, after.opt_state, after.bias), (host.params, host.opt_state, host.bias)
    )
    for leaf in jax.tree.leaves(after):
        by_index = {}
        for shard in leaf.addressable_shards:
            assert np.array_equal(
                by_index.setdefault(str(shard.index), np.asarray(shard.data)),
                np.asarray(shard.data),
                equal_nan=True,
            )


@pytest.mark.slow
def test_the_program_rolls_back_and_shows_its_data(corpus, tmp_path):
    """A learning rate that no data can help: two rollbacks, then exit code 3; and the documents of a step."""
    more = [
        "--config.train.steps=40",
        "--config.checkpoint.every_steps=2",
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.grad_clip=0.0",
        "--config.train.max_bad_steps=2",
        "--config.train.on_bad_steps=rollback",
        "--config.train.max_rollbacks=2",
        "--config.data.eval_fraction=0.0",
        "--config.mesh.fsdp=2",
    ]
    done = run(command(tmp_path, corpus, *more))
    assert (
        done.returncode == 3
        and "It was rolled back 2 times" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stdout + done.stderr
    assert "rollback 1 of 2" in done.stdout and "rollback 2 of 2" in done.stdout
    last = rows_of(tmp_path)[-1]
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepseek_jax.data",
            "show",
            f"--workdir={tmp_path}",
            f"--step={last['step']}",
            "--characters=0",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    rows = [
        int(line.split()[1].rstrip(":"))
        for line in shown.stdout.splitlines()
        if line.startswith("row ")
    ]
    assert sorted(set(rows)) == [row for first, stop in last["rows"] for row in range(first, stop)]
    texts = [p.read_text() for p in sorted(corpus.iterdir())]
    for piece in shown.stdout.split("\nrow ")[1:4]:
        header, text = piece.split("\n", 1)
        document, start = (
            int(header.split("document ")[1].split(",")[0]),
            int(header.rpartition(" ")[2]),
        )
        assert text.strip() and texts[document][start:].startswith(text.rstrip("\n"))


def test_origin_is_where_the_rows_come_from(tmp_path):
    """Two sources, mixed, over several passes: the pieces put together are the row."""
    from deepseek_jax.config.options import Config, DataConfig, TrainConfig
    from deepseek_jax.data.loader import Loader
    from deepseek_jax.data.tokenizer import load_tokenizer

    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"{i}.txt").write_text(
                name + "".join(rng.choice(list("xyz "), rng.integers(5, 90)))
            )
    config = Config(
        data=DataConfig(path=f"{tmp_path}/a,{tmp_path}/b", weights="0.3,0.7", eval_fraction=0.0),
        train=TrainConfig(batch_size=2, sequence_length=32),
    )
    loader = Loader(config, load_tokenizer("bytes"))
    for index in range(60):
        spans, row = loader.origin(index), loader.train_rows(index, 1)
        assert "".join(s.text for s in spans) == loader.tokenizer.decode(row["tokens"][0])
        assert [s.tokens for s in spans] == np.bincount(row["segment_ids"][0])[1:].tolist()
        for s in spans:
            text = (tmp_path / s.source[-1] / f"{s.document}.txt").read_text()
            assert s.text.startswith(text[s.first_token : s.first_token + s.tokens])


@pytest.mark.parametrize(
    "options, text",
    [
        (["--workdir=X", "--step=1", "--rows=1-2"], "--step and --rows: give one of them"),
        (["--workdir=X", "--step=0"], "--step=0 is not a step of this run"),
        (["--workdir=X", "--rows=5-3"], "--rows=5-3 is not FIRST-LAST"),
        (["--workdir=X/nowhere", "--step=1"], "holds no run"),
    ],
)
def test_show_says_what_is_wrong(options, text, tmp_path, capsys):
    from deepseek_jax.config.options import Config
    from deepseek_jax.data.__main__ import main

    (tmp_path / "config.json").write_text(json.dumps(Config().to_json()))
    assert main(["show", *(o.replace("X", str(tmp_path)) for o in options)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_options_without_effect_are_refused():
    with pytest.raises(
        UserError,
        match="config.train.max_rollbacks=2 has no effect with config.train.on_bad_steps=stop",
    ):
        validate(config_of(max_rollbacks=2))
    with pytest.raises(UserError, match="on_bad_steps='retry' is not known"):
        validate(config_of(on_bad_steps="retry"))
