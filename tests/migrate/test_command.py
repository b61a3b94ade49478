"""python -m deepseek_jax.migrate as a user calls it: what it prints and writes, and how it ends."""

import json

import pytest

from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError
from deepseek_jax.migrate import __main__ as command
from deepseek_jax.migrate.tools import shared
from deepseek_jax.run import commandline
from tests.support import ROOT

RECIPE = """\
model_name_or_path: org/model
dataset_name: org/chats
per_device_train_batch_size: 2
learning_rate: 5e-5
warmup_ratio: 0.1
num_train_epochs: 2
output_dir: out/run
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def call(*argv):
    return exit_code("migrate", lambda: command.main(list(argv)))


def test_the_config_is_printed_or_written(recipe, capsys, tmp_path):
    assert call("recipe.yaml", "--devices=4") == 0
    printed = capsys.readouterr().out
    assert "c.optimizer.learning_rate = 5e-05  # recipe.yaml:4 learning_rate=5e-05" in printed
    assert "c.optimizer.b2 = 0.999  # TRL 0.x by default" in printed
    assert call("recipe.yaml", "--devices=4", "--out=mine.py") == 0
    report = capsys.readouterr().out
    for part in (
        "Became: 7",
        "No effect here: 0",
        "Written out",
        "Batch and length",
        "Launch",
        "mine.py",
    ):
        assert part in report, report
    assert "a step has 8 sequences: 2 per device x 1 micro-batch x 4 data parallel GPUs" in report
    assert (tmp_path / "mine.py").read_text().replace("mine.py", "migrated.py") == printed.replace(
        "configs/migrated.py", "migrated.py"
    )
    given = commandline.parse(["train.py", "--config=mine.py", "--workdir=run"])
    assert given.config.train.batch_size == 8 and given.config.optimizer.warmup_fraction == 0.1
    left = {p.name for p in tmp_path.iterdir()} - {"__pycache__"}  # of the config, which was read
    assert sorted(left) == ["mine.py", "recipe.yaml"]


def test_lists_alone(recipe, capsys, tmp_path):
    assert call("recipe.yaml", "--devices=4", "--check", "--rows=1000") == 0
    out = capsys.readouterr().out
    assert "get_config" not in out and "of 1,000 rows: 250 steps" in out
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_refused_is_one_line_and_writes_nothing(recipe, capsys, tmp_path):
    recipe.write_text(f"{RECIPE}reward_funcs: [accuracy]\nnonsense: 1\n")
    assert call("recipe.yaml", "--devices=4", "--out=mine.py") == 2
    out, err = capsys.readouterr()
    assert (
        err.count("\n") == 1 and "reward_funcs" in err and "nonsense" in err and "--allow=" in err
    )
    assert "Refused: 2" in out and not (tmp_path / "mine.py").exists()
    assert (
        call("recipe.yaml", "--devices=4", "--out=mine.py", "--allow=reward_*", "--allow=nonsense")
        == 0
    )
    assert "left out on request" in capsys.readouterr().out and (tmp_path / "mine.py").exists()


def test_json(recipe, capsys):
    assert call("recipe.yaml", "--devices=4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {e["key"] for e in found["became"]} == {
        line.split(":")[0] for line in RECIPE.splitlines()
    }
    assert found["options"]["train.batch_size"]["value"] == 8 and found["launch"].startswith(
        "hf download"
    )


@pytest.mark.parametrize(
    "argv, named",
    [
        ([], "nothing to migrate"),
        (["missing.yaml", "--devices=4"], "missing.yaml: No such file"),
        (["train_ray.py", "--devices=4"], "is a program"),
        (["recipe.yaml"], "--devices"),
        (["recipe.yaml", "--devices=none"], "--devices"),
        (["recipe.yaml", "--devices=0"], "--devices"),
        (["recipe.yaml", "--devices=4", "--from=hf9"], "hf9"),
        (["recipe.yaml", "--devices=4", "--allow=learning_rate"], "--allow=learning_rate"),
        (["recipe.yaml", "--devices=4", "--out=recipe.yaml"], "--out"),
        (["recipe.yaml", "--devices=4", "--out=no/where.py"], "--out"),
        (["recipe.yaml", "--devices=4", "--command=torchrun 'x"], "--command"),
        (["other.yaml", "--devices=4"], "of no tool"),
    ],
)
def test_a_mistake_is_one_line(recipe, argv, named, capsys):
    (recipe.parent / "other.yaml").write_text("colour: blue\n")
    assert call(*argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and named in err
    assert recipe.read_text() == RECIPE


@pytest.mark.parametrize("name", ["recipe.yaml", "fsdp.yml", "ds.json"])
def test_train_py_says_to_migrate(name):
    with pytest.raises(UserError, match=f"python -m deepseek_jax.migrate {name} --devices=N"):
        commandline.parse(["train.py", f"--config={name}", "--workdir=run"])
    with pytest.raises(UserError, match=f"python -m deepseek_jax.migrate {name}"):
        commandline.parse(["train.py", "--config", name, "--workdir=run"])


def test_the_page_that_messages_name():
    page, _, heading = shared.BY_NAME.strip("()").partition(", ")
    assert f"\n## {heading}\n" in (ROOT / page).read_text(encoding="utf-8")
