"""A program asks for huge pages by starting again: once, as the same process, with the same command line."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from deepseek_jax.runtime.huge_pages import use_huge_pages
use_huge_pages()
tunables = os.environ["GLIBC_TUNABLES"]
flag = sys.flags.dont_write_bytecode
print(json.dumps([os.getpid(), sys.argv[1:], flag, tunables, "jax" in sys.modules]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the tunable is glibc's")
@pytest.mark.parametrize(
    "given, wanted",
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_the_program_starts_again_once(tmp_path, given, wanted):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    env = (
        {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        | {"PYTHONPATH": os.getcwd()}
        | ({"GLIBC_TUNABLES": given} if given else {})
    )
    process = subprocess.Popen(
        [sys.executable, "-B", str(file), "--a=b", "two words"],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out) == [process.pid, ["--a=b", "two words"], 1, wanted, False]
