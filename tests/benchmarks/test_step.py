"""`python -m benchmarks step` beside its peer, and what it says of the machine."""

import json
import math
import subprocess
import sys
import time

import pytest

from benchmarks.speed import step
from deepseek_jax.plan import host


@pytest.mark.skipif(not host.STAT.exists(), reason="only Linux says what other programs used")
def test_what_other_programs_use():
    """A program that is not a child that has ended is another; half a core of it is seen, to a quarter."""
    burn = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    before = host.Others()
    burning = subprocess.Popen([sys.executable, "-c", burn])
    time.sleep(1.0)
    seen = before.cores()
    burning.wait()
    assert seen > 0.25
    assert "ratios may not be" in host.said(seen) and "ratios" not in host.said(0.01)


@pytest.mark.slow
def test_a_pair_of_turns(tmp_path, monkeypatch, capsys):
    """Both programs begin at the loss of random weights on the same tokens: near ln V, and each other."""
    out = tmp_path / "step.json"
    argv = ["--shape=small", "--turns=1", "--steps=1", "--peer=benchmarks/speed/hf_torch.py"]
    monkeypatch.setattr(sys, "argv", ["benchmarks step", *argv, f"--out={out}"])
    assert step.main() == 0
    kept = json.loads(out.read_text())["result"]
    peer = kept["peer"]
    assert abs(peer["losses"][0] - math.log(2048)) < 0.3
    assert abs(peer["losses"][1] - kept["loss"]) < 0.3
    assert peer["ratio"] > 0 and peer["peak_memory"] > 1e8
    said = capsys.readouterr().out
    assert kept["cpu"] in said and "transformers" in said
