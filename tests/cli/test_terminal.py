"""What a command meets outside: a stdout of any encoding or none, an environment that JAX cannot read."""

import json
import os
import subprocess
import sys

import jax
import pytest

from deepseek_jax.cli import terminal
from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.runtime import environment
from tests.support import ROOT

TEXT = "± é € 😀 \ud800"


def run(program: str, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    """A command whose `main` is this program, which returns 0 at its end. It imports no JAX."""
    text = (
        "import sys\nfrom deepseek_jax.cli.command import exit_code\n"
        f"def main():\n    {program}\n    return 0\n"
    )
    mode = options.pop("mode", "report")
    return subprocess.run(
        [sys.executable, "-c", f"{text}sys.exit(exit_code('it', main, {mode!r}))"],
        cwd=ROOT,
        timeout=60,
        env=os.environ | (env or {}),
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE} | options,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_escapes_are_json(encoding):
    """What an encoding has no byte for is written as JSON escapes it, so that JSON stays JSON."""
    written = (
        json.dumps({"text": TEXT}, ensure_ascii=False)
        .encode(encoding, terminal.ESCAPE)
        .decode(encoding)
    )
    assert json.loads(written)["text"].encode("utf-16", "surrogatepass") == TEXT.encode(
        "utf-16", "surrogatepass"
    )
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", terminal.ESCAPE)


@pytest.mark.parametrize(
    "env, said",
    [
        ({"PYTHONIOENCODING": "ascii"}, "\\u00b1 x"),
        ({"PYTHONIOENCODING": "latin-1"}, "± x"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "\\u00b1 x"),
        ({"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}, "\\u00b1 x"),
    ],
    ids=str,
)
def test_any_encoding(env, said):
    done = run(r"print('\u00b1 x'); print('\u00b1 x', file=sys.stderr)", env)
    assert (
        done.returncode == 0
        and done.stdout.decode("latin-1").rstrip() == said
        and done.stderr.count(b"x") == 1
    )


def test_a_reader_that_goes_away():
    """A report or a log is dropped and the work goes on; a command that writes its result ends.

    Without an error.
    """
    work = r"[print('x' * 1000, flush=True) for _ in range(1000)]; sys.stderr.write('done')"
    for mode, unbuffered, said in (
        ("report", "", b"done"),
        ("log", "1", b"done"),
        ("result", "", b""),
    ):
        read, write = os.pipe()
        os.close(read)
        try:
            done = run(work, {"PYTHONUNBUFFERED": unbuffered}, stdout=write, mode=mode)
        finally:
            os.close(write)
        assert (done.returncode, done.stderr) == (0, said), mode


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk():
    """A report that is lost is a failure, in one line; a log that is lost is not."""
    with open("/dev/full", "wb") as full:
        done = run("print('x')", stdout=full)
        assert (done.returncode, done.stderr) == (
            1,
            b"it: stdout cannot be written (No space left on device).\n",
        )
        done = run(
            "print('x', flush=True); print('y', flush=True); sys.stderr.write('done\\n')",
            stdout=full,
            mode="log",
        )
    assert (
        done.returncode == 0
        and done.stderr.splitlines()[1:] == [b"done"]
        and b"The work goes on" in done.stderr
    )


def test_no_stdout_at_all():
    """`>&-`: what is opened next must not become stdout."""
    done = run(
        "f = open('/dev/null'); print('x'); sys.stderr.write(str(f.fileno() > 2))",
        preexec_fn=lambda: os.close(1),
    )
    assert (done.returncode, done.stderr) == (0, b"True")


def test_every_command_is_set_up():
    """Each program goes through `exit_code`, or train.py's own way."""
    programs = [
        p
        for p in [*(ROOT / "deepseek_jax").rglob("*.py"), ROOT / "benchmarks" / "__main__.py"]
        if '__name__ == "__main__"' in p.read_text()
    ]
    assert len(programs) >= 9 and all("exit_code(" in p.read_text() for p in programs), programs
    assert 'terminal.set_up("log")' in (ROOT / "train.py").read_text()


@pytest.mark.parametrize(
    "text, devices, bad",
    [
        (None, 1, False),
        ("", 1, False),
        (" 8 ", 8, False),
        ("0", 1, True),
        ("-1", 1, True),
        ("x", 1, True),
        ("1.5", 1, True),
        ("٣", 1, True),
        ("9" * 12, 1, True),
    ],
)
def test_number_of_cpu_devices(text, devices, bad, monkeypatch):
    monkeypatch.setattr(environment, "malformed", [])
    env = {} if text is None else {environment.DEVICES: text}
    assert environment.take_devices(env) == devices
    assert (environment.DEVICES in env) == (devices == 8)
    if not bad:
        return environment.check()
    for meet in (environment.check, lambda: make_mesh(None)):  # a command, a library
        with pytest.raises(
            UserError, match=f"^{environment.DEVICES}={text} is not a number of devices"
        ):
            meet()


def test_devices_that_jax_does_not_find(monkeypatch, capsys):
    """Of an error while JAX looks for devices one line is left; other errors are themselves."""
    monkeypatch.setenv("JAX_PLATFORMS", "cudaa")
    assert exit_code("it", lambda: jax.devices("cudaa")) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("it: JAX_PLATFORMS=cudaa: ")
        and said.count("\n") == 1
        and "JAX_PLATFORMS=cpu" in said
    )
    jax.devices()
    for other in (RuntimeError("another"), AssertionError()):
        with pytest.raises(type(other)), environment.mistakes():
            raise other


@pytest.mark.parametrize(
    "program, env",
    [
        (
            ["train.py", "--config=configs/tiny.py", "--workdir=/nonexistent"],
            {"JAX_PLATFORMS": "cuda"},
        ),
        pytest.param(
            ["-m", "benchmarks", "attention", "--lengths=64"],
            {"JAX_PLATFORMS": "cuda"},
            marks=pytest.mark.slow,
        ),  # inside jit: JAX cuts its frames from the traceback
        (
            ["-m", "benchmarks", "step"],
            {"JAX_NUM_CPU_DEVICES": "two"},
        ),  # with huge pages it starts itself anew
    ],
    ids=str,
)
def test_one_line_and_exit_code_2(program, env):
    env = (
        {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "GLIBC_TUNABLES")}
        | {"CUDA_VISIBLE_DEVICES": ""}
        | env
    )
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]  # of progress
    ((name, value),) = [(k, v) for k, v in env.items() if v in ("cuda", "two")]
    assert (
        done.returncode == 2
        and done.stdout == ""
        and len(lines) == 1
        and f"{name}={value}" in lines[0]
    ), done.stderr
