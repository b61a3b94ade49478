"""W&B, MLflow, Trackio and ClearML, by stand-ins for their packages: what they are told, and what they cannot
do to a run. test_tracker_packages.py has the packages.
"""

import dataclasses
import functools
import json
import pathlib
import subprocess
import time

import jax
import pytest

from deepseek_jax.config import from_config_dict, suggestions
from deepseek_jax.config.options import Config, LogConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.run.trackers import child, every, names
from deepseek_jax.run.trackers.destination import Run
from deepseek_jax.run.trackers.every import Trackers
from deepseek_jax.run.trackers.outside import Outside
from deepseek_jax.train import workdir as workdirs

STAND_INS = pathlib.Path(__file__).parents[1] / "support" / "stand_ins"
ROW = {"loss": 2.5, "lr": 1e-3, "tokens_seen": 64, "received_by_device": [1, 2]}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stand-ins for the packages; () -> what they were called with so far."""
    path = tmp_path / "calls.jsonl"
    path.touch()
    monkeypatch.syspath_prepend(str(STAND_INS))
    monkeypatch.setenv("STAND_IN_CALLS", str(path))
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_RUN_ID", "CLEARML_PROJECT"):
        monkeypatch.delenv(variable, raising=False)

    def read(name: str = "") -> list[dict]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [c for c in found if c["call"].startswith(name)]

    return read


def opened(folder: pathlib.Path, trackers: str, step: int = 0, **log) -> Trackers:
    folder.mkdir(exist_ok=True)
    return Trackers(str(folder), Config(log=LogConfig(trackers=trackers, **log)), step)


def test_rows_arrive_and_a_resumed_run_goes_on(tmp_path, calls):
    tools = "wandb,mlflow,trackio,clearml"
    writer = opened(tmp_path / "my run", tools, project="p")
    writer.write({"step": 1, **ROW})
    writer.write({"step": 2, "eval_loss": 3.0})
    writer.close()
    assert calls("wandb.log") == [
        {"call": "wandb.log", "step": None, "data": data}
        for data in (
            {"loss": 2.5, "lr": 1e-3, "tokens_seen": 64, "step": 1},
            {"eval_loss": 3.0, "step": 2},
        )
    ]
    star = calls("wandb.define_metric")[1]
    assert (star["name"], star["step_metric"]) == ("*", "step")
    assert [(c["step"], c["metrics"]) for c in calls("mlflow.log_metrics")] == [
        (1, {"loss": 2.5, "lr": 1e-3, "tokens_seen": 64}),
        (2, {"eval_loss": 3.0}),
    ]
    assert [(c["step"], c["metrics"]) for c in calls("trackio.log")][1] == (2, {"eval_loss": 3.0})
    points = [
        (c["title"], c["series"], c["iteration"], c["value"]) for c in calls("clearml.report")
    ]
    assert ("loss", "train", 1, 2.5) in points and ("loss", "eval", 2, 3.0) in points
    ends = [calls(n)[0] for n in ("wandb.finish", "mlflow.end", "trackio.finish", "clearml.close")]
    assert ends[0]["exit_code"] == 0 and ends[1]["status"] == "FINISHED"

    first = calls("wandb.init")[0]
    assert first["project"] == "p" and first["name"] == "my run" and first["resume"] == "allow"
    assert first["config"]["train/steps"] == Config().train.steps
    assert first["config"]["versions/jax"] == jax.__version__
    assert first["config"]["devices/count"] == jax.device_count()
    assert not any("." in key for key in first["config"])
    params = {}
    for c in calls("mlflow.log_params"):
        assert len(c["params"]) <= 100
        params |= c["params"]
    assert params["train.steps"] == str(Config().train.steps)
    assert calls("clearml.update")[0]["parameters"]["run/seed"] == "0"

    config = Config(log=LogConfig(trackers=tools, project="p"))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    writer = Trackers(str(tmp_path / "my run"), longer, 1)
    writer.write({"step": 2, "loss": 2.0})
    writer.close()
    one, two = calls("wandb.init")
    assert one["id"] == two["id"] and two["resume"] == "allow"
    one, two = calls("mlflow.start_run")
    assert one["run_id"] is None and two["run_id"] == two["id"] == one["id"]
    assert any(c["tags"].get("now.train.steps") == "7" for c in calls("mlflow.set_tags"))
    one, two = calls("trackio.init")
    assert one["name"] == two["name"] != "my run" and [one["resume"], two["resume"]] == [
        "never",
        "allow",
    ]
    one, two = calls("clearml.init")
    assert (one["reuse"], one["continue"]) == (False, False)
    assert two["reuse"] == "task" and two["continue"] == 0 and two["continue"] is not False

    writer = opened(tmp_path / "my run", "mlflow", project="another")
    writer.close()
    assert calls("mlflow.start_run")[2]["run_id"] is None


def test_names_of_old_dashboards(tmp_path, calls):
    """As transformers' callbacks name them: test_tracker_packages.py compares with those."""
    writer = opened(tmp_path, "wandb,mlflow,trackio,clearml", names="hf", run_name="n")
    writer.write({"step": 1, **ROW, "eval_token_accuracy": 0.5})
    writer.close()
    slashed = {
        "train/loss": 2.5,
        "train/learning_rate": 1e-3,
        "train/num_input_tokens_seen": 64,
        "eval/mean_token_accuracy": 0.5,
        "train/global_step": 1,
    }
    assert calls("wandb.log")[0]["data"] == slashed == calls("trackio.log")[0]["metrics"]
    assert calls("wandb.define_metric")[1]["step_metric"] == "train/global_step"
    assert calls("mlflow.log")[-1]["metrics"].keys() == {
        "loss",
        "learning_rate",
        "num_input_tokens_seen",
        "eval_mean_token_accuracy",
    }
    lines = {(c["title"], c["series"]) for c in calls("clearml.report")}
    assert lines == {tuple(n.split("/")) for n in slashed if n != "train/global_step"}
    assert [calls(f"{t}.{c}")[0][key] for t, c, key in (
        ("wandb", "init", "name"), ("mlflow", "start_run", "run_name"),
        ("trackio", "init", "name"), ("clearml", "init", "task_name"),
    )] == ["n"] * 4  # fmt: skip
    assert names.tagged("tokens_per_sec", "hf") == "train/train_tokens_per_second"


def test_a_tool_that_hangs_costs_one_line(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_FAILS", "wandb.log:hang@2")
    monkeypatch.setattr(Outside, "CLOSE_SECONDS", 1.0)
    writer = opened(tmp_path, "wandb")
    started = time.monotonic()
    for step in range(1, 5001):
        writer.write({"step": step, **ROW})
    assert time.monotonic() - started < 5  # five thousand lines of metrics.jsonl, on a busy machine
    started = time.monotonic()
    writer.close()
    assert time.monotonic() - started < 5
    assert writer._outside[0]._process.poll() is not None, "it is still there"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "log.trackers=wandb: it " in error, error
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5000


@pytest.mark.parametrize(
    "fails, said, rows",
    [
        ("wandb.log:raise@2", "RuntimeError: the server is on fire: rows are missing", [1, 3, 4]),
        ("wandb.log:full@2", "OSError: [Errno 28] No space left on device", [1, 3, 4]),
        ("wandb.log:exit@2", "its process ended with 9", [1]),
        ("wandb.finish:raise", "RuntimeError: the server is on fire", [1, 2, 3, 4]),
        # no account or no network: the same once more, offline
        (
            "wandb.init:raise@1",
            "wandb: the server is on fire. Rows are kept: `wandb sync /",
            [1, 2, 3, 4],
        ),
    ],
)
def test_a_tool_that_fails_costs_one_line(tmp_path, calls, monkeypatch, capsys, fails, said, rows):
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    writer = opened(tmp_path, "wandb")
    for step in range(1, 5):
        writer.write({"step": step, **ROW})
    writer.close()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error
    assert [c["data"]["step"] for c in calls("wandb.log")] == rows
    if "init" in fails:
        assert calls("wandb.init")[0]["mode"] == "offline"


def until(found) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_tool_out_of_reach_is_not_waited_for(tmp_path, calls, monkeypatch, capsys):
    """One that has not opened its run, and says so; one that says nothing; one that has stopped logging."""
    seconds = {}
    for fails in ("mlflow.start_run:raise", "wandb.init:hang", "mlflow.log_metrics:raise"):
        monkeypatch.setenv("STAND_IN_FAILS", fails)
        tool = fails.partition(".")[0]
        writer = opened(tmp_path / tool, tool)
        writer.write({"step": 1, **ROW})
        one = writer._outside[0]
        if fails.endswith("hang"):
            until(lambda one=one: one._process)
            monkeypatch.setattr(Outside, "STUCK_SECONDS", 0.0)
        else:
            until(lambda one=one: one._failing)
        started = time.monotonic()
        writer.close()
        seconds[fails] = time.monotonic() - started
        assert one._process.poll() is not None
    assert max(seconds.values()) < Outside.FAILING_SECONDS + 2, seconds
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("rows are missing there") == 3, error


def test_no_room_for_ids_and_logs(tmp_path, calls, capsys):
    """WORKDIR/trackers cannot be made: rows arrive all the same."""
    (tmp_path / "trackers").write_text("")
    writer = opened(tmp_path, "wandb")
    writer.write({"step": 1, **ROW})
    writer.close()
    error = capsys.readouterr().err
    assert len(calls("wandb.log")) == 1
    assert "wandb.json cannot be written" in error and "rows are missing" not in error


class Flaky:
    """Opens at the second try; fails at step 3."""

    def __init__(self):
        self.tries, self.steps, self.failed = 0, [], None

    def open(self):
        self.tries += 1
        if self.tries == 1:
            raise ConnectionError("refused.")

    def log(self, row, time):
        if row["step"] == 3:
            raise ValueError
        self.steps.append(row["step"])

    def close(self, failed):
        self.failed = failed


@pytest.mark.parametrize("orderly", [True, False])
def test_rows_wait_for_a_server(monkeypatch, orderly):
    """What cannot be opened is tried again, and then has the rows that came meanwhile."""
    monkeypatch.setattr(child, "AGAIN_SECONDS", 0.0)
    tool, lost, taken, ended = Flaky(), [], [], []
    run = Run("wandb", "/w", "", "", "own", {}, {}, 1)
    lines = [json.dumps(dataclasses.asdict(run)).encode()]
    lines += [json.dumps({"row": {"step": i}, "time": 0}).encode() for i in range(1, 5)]
    lines += [b'{"end": true}'] if orderly else [b'{"row": {"st']  # a kill cuts the last line
    at_end = functools.partial(ended.append, True)
    child.serve(lines, lambda *_: tool, print, lost.append, taken.append, at_end)
    assert tool.steps == [1, 2, 4] and tool.failed is not orderly
    assert lost == ["ConnectionError: refused", "ValueError"] and ended == [True]
    assert taken == [True, True, True, False, True]  # the run, and four rows


def test_what_is_known_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "git/commit" not in child.facts()

    def git(*arguments):
        who = ("-c", "user.name=n", "-c", "user.email=e@x")
        return subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True)

    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "one")
    facts = child.facts()
    assert facts["git/commit"] == git("rev-parse", "HEAD").stdout.strip()
    assert not facts["git/changed"]
    (tmp_path / "f").write_text("2")
    assert child.facts()["git/changed"]


def test_what_the_option_takes(tmp_path, monkeypatch):
    for value in ("", "wandb", "tensorboard,mlflow"):
        validate(Config(log=LogConfig(trackers=value)))
    with pytest.raises(UserError, match="'all' is not known. Set names of these: tensorboard, wa"):
        validate(Config(log=LogConfig(trackers="all")))
    with pytest.raises(UserError, match="none .Hugging Face. is '' here"):
        validate(Config(log=LogConfig(trackers="none")))
    assert every.named(Config(log=LogConfig(trackers="wandb,wandb"))) == ["wandb"]

    (tmp_path / "trackio").mkdir()  # a folder of that name is no package
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install 'deepseek_jax.trackio.'.*leave trackio out"):
        every.check_installed(Config(log=LogConfig(trackers="tensorboard,trackio")))
    monkeypatch.setattr("sys.path", [str(STAND_INS)])
    every.check_installed(Config(log=LogConfig(trackers="wandb,mlflow,trackio,clearml")))

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = opened(tmp_path / "w", "wandb")
    writer.write({"step": 1})
    writer.close()
    assert not (tmp_path / "w" / "trackers").exists()


@pytest.mark.parametrize("before, now", [(True, "tensorboard"), (False, "")])
def test_the_option_that_it_replaces(tmp_path, before, now):
    with pytest.raises(
        UserError, match="config.log.trackers now: True is tensorboard, False is ''"
    ):
        from_config_dict({"log": {"tensorboard": before}})
    assert suggestions.suggestion("report_to").startswith(
        "report_to (Hugging Face) is config.log.tr"
    )
    written = Config().to_json()
    del written["log"]["trackers"]
    written["log"]["tensorboard"] = before
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert from_config_dict(workdirs.read_config(str(tmp_path))).log.trackers == now
