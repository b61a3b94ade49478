"""make distil: its stages, its figures and its picture, with commands that are noted and answered."""

import json
import re

import pytest

from benchmarks.learning import distil_demo, distil_figures
from benchmarks.learning.stages import CommandFailed
from benchmarks.repository import blocks, figures
from deepseek_jax.errors import UserError

LOSSES = {"cross-entropy": 1.5, "distilled": 1.4, "distilled-router": 1.39}
STEPS = 20


class Recorded(distil_demo.Demo):
    """Each run ends at the loss that LOSSES has, a little lower for later seeds."""

    commands: list = []
    fails = ""

    def write_calibration(self):
        pass

    def is_teacher(self, workdir):
        return (workdir / "finished").exists()

    def command(self, *words, grows=None, lines=0):
        self.commands.append(words)
        if self.fails and self.fails in " ".join(words):
            raise CommandFailed("it failed", 3)
        if "prune" in words:
            folder = self.folder / "pruned"
            folder.mkdir()
            (folder / "config.json").touch()
            return
        options = dict(word.split("=", 1) for word in words if "=" in word)
        workdir = self.folder / options["--workdir"].rpartition("/")[2]
        workdir.mkdir(parents=True)
        if workdir.name == "teacher":
            (workdir / "finished").touch()
            return
        steps, rows = int(options["--config.train.steps"]), []
        if workdir.name == "before":
            rows.append({"step": 1, "eval_loss": 2.5, "eval_teacher_loss": 1.3})
        else:
            way, _, seed = workdir.name.rpartition("-")
            every = int(options["--config.eval.every_steps"])
            for step in range(every, steps + 1, every):
                loss = 2.5 - (2.5 - LOSSES[way]) * step / steps - int(seed) / 1000
                rows += [{"step": step, "loss": loss}, {"step": step, "eval_loss": loss}]
            if rows[-1]["step"] != steps:
                rows.append({"step": steps, "eval_loss": LOSSES[way] - int(seed) / 1000})
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def demo(folder, seeds=2, teacher=""):
    return Recorded(folder, STEPS, seeds, 1.0, teacher)


def test_the_stages_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(distil_demo, "ROOT", tmp_path)  # no run of `make train`
    Recorded.commands, Recorded.fails = [], "distilled-router-1"
    with pytest.raises(CommandFailed) as failed:
        demo(tmp_path / "run").run()
    assert failed.value.ended_with == 3
    done = len(Recorded.commands)
    Recorded.fails = ""
    result = demo(tmp_path / "run").run()
    again = [words[2].rpartition("/")[2] for words in Recorded.commands[done:]]
    assert again == ["distilled-router-1", "distilled-router-2"]
    assert (result["teacher"], result["pruned"]) == (1.3, 2.5)
    ways = result["ways"]
    assert ways["cross-entropy"]["gain"] == 0
    assert ways["distilled"]["gain"] == pytest.approx(0.1)
    assert ways["distilled, router"]["loss"] == pytest.approx(1.3885)
    assert all(c[0] == [0, 2.5] and c[-1][0] == STEPS for w in result["curves"].values() for c in w)
    json.dumps(result)
    with pytest.raises(UserError, match="begun with --steps=20 --seeds=2"):
        demo(tmp_path / "run", seeds=3).run()
    svg = distil_figures.drawn(result)
    assert svg.count("<polyline") == 3 * 2 + 2 * 2  # losses of every seed, and what two ways win
    assert "+0.1000" in distil_figures.text(result)
    assert blocks.distil_demo_table(result, "[a](b)").count("\n| ") == 6
    assert "wins by 0.110" in figures.distil_demo(result)


def test_runs_differ_in_their_objective_and_seed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(distil_demo, "ROOT", tmp_path)
    Recorded.commands, Recorded.fails = [], ""
    demo(tmp_path / "run", seeds=1).run()
    runs = {
        words[2].rpartition("/")[2]: {w for w in words[3:] if "config.distill" not in w}
        for words in Recorded.commands
        if words[0] == "train.py" and "before" not in words[2] and "teacher" not in words[2]
    }
    ours, theirs = runs["distilled-router-1"], runs["cross-entropy-1"]
    assert ours ^ theirs == {"--config.objective=distill", "--config.objective=pretrain"}
    assert runs["distilled-1"] == ours


def test_the_teacher_is_a_finished_run_of_the_tiny_config(tmp_path, monkeypatch):
    monkeypatch.setattr(distil_demo, "ROOT", tmp_path)
    made = tmp_path / distil_demo.MADE_BY_TRAIN
    tiny = distil_demo.config_of(f"--config={distil_demo.TINY}")
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    row = {"step": tiny.train.steps, "eval_loss": 1.3}
    (made / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(distil_demo.workdirs, "read_config", lambda _: tiny)
    monkeypatch.setattr(distil_demo, "from_config_dict", lambda found: found)
    own = tmp_path / "run" / "teacher"

    def chosen(named="", scale=1.0):
        return distil_demo.Demo(tmp_path / "run", STEPS, 1, scale, named)._teacher

    assert chosen() == made and chosen(scale=0.5) == own
    with pytest.raises(UserError, match="not a finished run"):
        chosen(str(tmp_path))
    (made / "metrics.jsonl").write_text(json.dumps(row | {"step": 500}) + "\n")
    assert chosen() == own


def test_what_is_not_as_stated_is_named():
    stated = (
        "teacher 1.30, pruned 2.50, by cross-entropy 1.50,\n  distilled 1.40, with the router too 1.39, each "
        "within 0.05. Distillation wins by at\n  least 0.05."
    )
    ways = {"cross-entropy": 1.5, "distilled": 1.4, "distilled, router": 1.39}
    result = {"teacher": 1.3, "pruned": 2.52}
    result["ways"] = {w: {"loss": loss, "gain": 1.5 - loss} for w, loss in ways.items()}
    assert distil_figures.differences(result, stated) == []
    result["ways"]["distilled"] = {"loss": 1.46, "gain": 0.04}
    wrong = distil_figures.differences(result, stated)
    assert len(wrong) == 2 and re.search("1.4600, stated 1.4", wrong[0]) and "wins by" in wrong[1]
    (missing,) = distil_figures.differences(result, "nothing")
    result["ways"]["distilled"] = {"loss": 1.4, "gain": 0.1}
    assert "no losses are stated" in missing
    assert distil_figures.differences(result, distil_figures.sentence(result)) == []
