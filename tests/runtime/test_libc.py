"""What the C library does for a process: that it works, and that it is still needed."""

import ctypes
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from deepseek_jax.cluster.ports import free_port
from deepseek_jax.runtime.libc import trim_memory
from tests.support import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is asked for is Linux' own")
ABORTS = """
import ctypes, os, sys, threading, time
from deepseek_jax.runtime.libc import delay_abort
if sys.argv[1] == "delayed":
    delay_abort()
threading.Thread(target=ctypes.CDLL(None).abort).start()  # as XLA does it, without Python's lock
time.sleep(0.5)
print("said", flush=True)
os._exit(4)
"""
LOSES_PROCESS_0 = """
import os, sys, time, jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
time.sleep(1)
if sys.argv[2] == "0":
    os._exit(0)
time.sleep(60)
"""


def started(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how, code, said", [("delayed", 4, "said\n"), ("at once", -6, "")])
def test_an_abort_is_delayed(how, code, said):
    p = started(ABORTS, how)
    assert (p.communicate(timeout=60)[0], p.returncode) == (said, code)


@pytest.mark.slow
def test_jax_still_aborts_when_process_0_is_lost():
    """If this fails, `delay_abort` can go."""
    port = str(free_port())
    both = [started(LOSES_PROCESS_0, port, i) for i in "01"]
    error = [p.communicate(timeout=120)[1] for p in both][1]
    assert both[1].returncode == -6 and "Terminating process because the JAX" in error


def resident() -> int:
    """Bytes of this process in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_glibc_keeps_freed_memory_until_it_is_trimmed():
    """If the first part fails, `trim_memory` can go."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("another C library")
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 1 << 16, 1024  # blocks of a size that glibc does not map one by one
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    full = resident()
    for block in blocks[:-1]:  # the last one lies at the end of the heap, and holds it
        libc.free(block)
    assert full - resident() < size * count / 4, "glibc gives freed memory back by itself"
    trim_memory()
    assert full - resident() > size * count / 2
    libc.free(blocks[-1])


HUGE_PAGES = """
import pathlib, re
import jax.numpy as jnp

def huge():
    text = pathlib.Path("/proc/self/smaps").read_text()
    return sum(int(n) for n in re.findall(r"AnonHugePages: +(\\d+) kB", text)) << 10

before = huge()
x = jnp.zeros(1 << 25).block_until_ready()  # 128 MiB
print((huge() - before) / x.nbytes)
"""


def test_xla_asks_for_no_huge_pages_itself():
    """If this fails, runtime/huge_pages.py can go. In a process of its own: `make test` gives its workers
    some."""
    setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this kernel gives huge pages to all, or to none")
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", HUGE_PAGES],
        env=env | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25
