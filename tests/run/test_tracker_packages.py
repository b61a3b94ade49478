"""W&B, MLflow, Trackio and ClearML themselves, without accounts and networks: `make test-trackers`.

What arrived is read back by each tool's own reader, or from its file where it has none.
"""

import errno
import importlib.util
import inspect
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from deepseek_jax.config.options import Config, LogConfig
from deepseek_jax.run.trackers import names
from deepseek_jax.run.trackers.every import Trackers
from deepseek_jax.run.trackers.outside import Outside
from tests.support.runs import command, losses, run

pytestmark = pytest.mark.slow

STAND_INS = pathlib.Path(__file__).parents[1] / "support" / "stand_ins"
TOOLS = ("wandb", "mlflow", "trackio", "clearml")
Rows = list[tuple[int, float]]  # (step, loss), as they came


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Everything that the tools keep is below this folder."""
    for name in ("HOME", "TRACKIO_DIR", "CLEARML_CACHE_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("CLEARML_CONFIG_FILE", str(tmp_path / "clearml.conf"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("CLEARML_OFFLINE_MODE", "1")
    return tmp_path


def python(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def read_wandb(home: pathlib.Path, workdir: pathlib.Path) -> dict[str, Rows]:
    out: dict[str, Rows] = {}
    for file in sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb")):
        tool = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        text = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=True).stdout
        rows = out.setdefault(file.stem.removeprefix("run-"), [])
        for record in map(json.loads, text.splitlines()):
            values = record["history"]["item"] if record["type"] == "history" else {}
            if "loss" in values:
                rows.append((values["step"], values["loss"]))
    return out


def read_mlflow(home: pathlib.Path, workdir: pathlib.Path) -> dict[str, Rows]:
    program = """
import json, mlflow
client = mlflow.MlflowClient()
runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
print(json.dumps({r.info.run_id: [(m.step, m.value) for m in sorted(
    client.get_metric_history(r.info.run_id, "loss"), key=lambda m: m.timestamp)] for r in runs
    if r.info.status == "FINISHED" and r.data.params["model.hidden_size"]}))
"""
    return {name: [(s, v) for s, v in rows] for name, rows in json.loads(python(program)).items()}


def read_trackio(home: pathlib.Path, workdir: pathlib.Path) -> dict[str, Rows]:
    program = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps({r.id: [(row["step"], row["loss"]) for row in SQLiteStorage.get_logs("p", r.name)
    if "loss" in row] for r in trackio.Api().runs("p") if r.config["train/steps"]}))
"""
    return {name: [(s, v) for s, v in rows] for name, rows in json.loads(python(program)).items()}


def read_clearml(home: pathlib.Path, workdir: pathlib.Path) -> dict[str, Rows]:
    out: dict[str, Rows] = {}
    for folder in (home / "clearml_cache_dir" / "offline").iterdir():
        if not (folder / "metrics.jsonl").is_file():
            continue
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        events = [event for line in lines for event in json.loads(line)]
        out[folder.name] = [
            (e["iter"], e["value"])
            for e in events
            if (e.get("metric"), e.get("variant")) == ("loss", "train")
        ]
    return out


READERS = {
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    "clearml": read_clearml,
}


def opened(workdir: pathlib.Path, tool: str, step: int) -> Trackers:
    workdir.mkdir(exist_ok=True)
    return Trackers(str(workdir), Config(log=LogConfig(trackers=tool, project="p")), step)


@pytest.mark.parametrize("tool", TOOLS)
def test_rows_arrive_and_a_resumed_run_goes_on(home, tool, monkeypatch, capsys):
    """The second start is from step 2: steps 3 and 4 come twice, in one run."""
    pytest.importorskip(tool)
    monkeypatch.setattr(Outside, "CLOSE_SECONDS", 120.0)  # of a busy machine
    for begins, steps in ((0, range(1, 5)), (2, range(3, 7))):
        writer = opened(home / "w", tool, begins)
        for step in steps:
            writer.write({"step": step, "loss": step + begins / 10, "lr": 0.1})
        writer.write({"step": steps[-1], "eval_loss": 9.0})
        writer.close()
    error = capsys.readouterr().err
    assert "rows are missing" not in error, error + (home / f"w/trackers/{tool}.log").read_text()
    found = READERS[tool](home, home / "w")
    rows = [(s, float(s)) for s in range(1, 5)] + [(s, s + 0.2) for s in range(3, 7)]
    assert [[(s, pytest.approx(v)) for s, v in rows]] == list(found.values())


def test_a_real_run_with_all_of_them(home, corpus):
    """train.py, and the same command for more steps: one run in each, with the losses of metrics.jsonl."""
    for tool in TOOLS:
        pytest.importorskip(tool)
    more = [f"--config.log.trackers=tensorboard,{','.join(TOOLS)}", "--config.log.project=p"]
    more += ["--config.optimizer.schedule=constant"]
    for steps in (3, 5):
        done = run(command(home / "w", corpus, *more, f"--config.train.steps={steps}"))
        assert done.returncode == 0, done.stderr
        assert "rows are missing" not in done.stderr, done.stderr
    logged = list(losses(home / "w").items())
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
    for tool in TOOLS:
        found = READERS[tool](home, home / "w")
        assert [logged] == list(found.values()), tool


@pytest.fixture
def silent_server():
    """host:port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_dead_server_costs_nothing(home, tool, silent, silent_server, monkeypatch, capsys):
    pytest.importorskip(tool)
    url = f"http://{silent_server}" if silent else "http://127.0.0.1:9"
    for name in ("WANDB_MODE", "CLEARML_OFFLINE_MODE"):
        monkeypatch.delenv(name)
    for name in ("WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL"):
        monkeypatch.setenv(name, url)
    for name in ("CLEARML_API_HOST", "CLEARML_WEB_HOST", "CLEARML_FILES_HOST"):
        monkeypatch.setenv(name, url)
    for name in ("CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY", "TRACKIO_WRITE_TOKEN"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(Outside, "CLOSE_SECONDS", 10.0)
    writer = opened(home / "w", tool, 0)
    started = time.monotonic()
    for step in range(1, 101):
        writer.write({"step": step, "loss": 1.0})
    assert time.monotonic() - started < 2
    started = time.monotonic()
    writer.close()
    assert time.monotonic() - started < 15
    assert writer._outside[0]._process.poll() is not None
    error = capsys.readouterr().err
    assert error.count("rows are missing") <= 1 and "Traceback" not in error
    if tool != "trackio":  # it keeps what it cannot send, and says nothing
        assert "rows are missing" in error or "Rows are kept" in error, error
    assert len((home / "w" / "metrics.jsonl").read_text().splitlines()) == 100


@pytest.mark.parametrize("key", ["0" * 40, None], ids=["no answer", "no account"])
def test_rows_for_wandb_wait_on_the_disk(home, key, silent_server, monkeypatch, capsys):
    """What cannot be sent is what `wandb sync` sends later, under the id of the run."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{silent_server}")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(Outside, "CLOSE_SECONDS", 120.0)
    writer = opened(home / "w", "wandb", 0)
    for step in range(1, 4):
        writer.write({"step": step, "loss": 1.0})
    writer.close()
    error = capsys.readouterr().err
    assert "Rows are kept: `wandb sync /" in error and "rows are missing" not in error, error
    kept = json.loads((home / "w" / "trackers" / "wandb.json").read_text())["id"]
    assert read_wandb(home, home / "w") == {kept: [(1, 1.0), (2, 1.0), (3, 1.0)]}


def _fill(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(fd, bytes(1024)):
            pass
    except OSError as e:
        assert e.errno == errno.ENOSPC
    finally:
        os.close(fd)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_full_disk_costs_nothing(home, tool, monkeypatch, capsys):
    """The disk of the workdir and of all that the tools keep has 4 MiB, and is full after five rows."""
    pytest.importorskip(tool)
    disk = home / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    monkeypatch.setattr(Outside, "CLOSE_SECONDS", 30.0)
    try:
        for name in ("HOME", "TRACKIO_DIR", "CLEARML_CACHE_DIR"):
            monkeypatch.setenv(name, str(disk / name.lower()))
        (disk / "home").mkdir()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{disk}/mlflow.db")
        writer = opened(disk / "w", tool, 0)
        for step in range(1, 6):
            writer.write({"step": step, "loss": 1.0})
        deadline = time.monotonic() + 60
        while not (disk / "w" / "trackers" / f"{tool}.json").exists():
            assert time.monotonic() < deadline, (disk / f"w/trackers/{tool}.log").read_text()
            time.sleep(0.1)
        _fill(disk / "ballast")
        started = time.monotonic()
        for step in range(6, 300):
            writer.write({"step": step, "loss": 1.0})
        assert time.monotonic() - started < 5
        started = time.monotonic()
        writer.close()
        assert time.monotonic() - started < 35
        assert "Traceback" not in capsys.readouterr().err
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_stand_ins_have_the_packages_signatures(tool, monkeypatch):
    """What they take, the package takes, with the same defaults."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    spec = importlib.util.spec_from_file_location(f"stand_in_{tool}", STAND_INS / f"{tool}.py")
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(STAND_INS)])
    package = pytest.importorskip(tool)
    pairs = []
    for name, made in vars(stand_in).items():
        if getattr(made, "__module__", "") != stand_in.__name__ or name.startswith("_"):
            continue
        real = getattr(package, name)
        if not inspect.isclass(made):
            pairs.append((name, made, real))
            continue
        for method in vars(made):
            if callable(getattr(made, method)) and not method.startswith("__"):
                pairs.append((f"{name}.{method}", getattr(made, method), getattr(real, method)))
    assert len(pairs) >= 3
    for name, ours, theirs in pairs:
        if name == "MlflowException":
            continue
        real = inspect.signature(theirs).parameters
        for parameter in inspect.signature(ours).parameters.values():
            assert parameter.name in real, f"{tool}.{name}: {parameter.name}"
            default = real[parameter.name].default
            assert parameter.default == default, f"{tool}.{name}({parameter.name}={default!r})"


def test_names_are_those_of_transformers():
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    for name in ("loss", "lr", "grad_norm", "tokens_seen", "eval_loss", "eval_token_accuracy"):
        logged = names.logged(name, "hf")
        assert integrations.rewrite_logs({logged: 1.0}) == {names.tagged(name, "hf"): 1.0}
