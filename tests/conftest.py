"""Every test sees eight CPU devices and a compiler in a hurry."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile

# A suite that a shell runs in the background, or nohup, inherits ignored signals, and so would the
# runs that it starts and stops by them.
for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

# Compiling is most of what the tests do: LLVM optimises less, in one piece per program, and no
# instruction names the Python lines that it came from, here and in the processes that tests start. The
# passes over the program and the partitioning are as ever.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Tracing makes millions of objects that live on in JAX's caches; the collector finds nothing among them.
gc.set_threshold(200_000, 50, 1000)
# Without bytecode each process that a test starts would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def share_programs() -> None:
    """Lets all workers, and the processes that tests start, read what one of them has compiled: from a
    folder that the first process makes and removes, so that no earlier run and no cache of the user's
    has a part in what is tested."""
    folder = tempfile.mkdtemp(prefix="deepseek_jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    first = os.getpid()

    def remove() -> None:
        if os.getpid() == first:  # and not a child that leaves by sys.exit
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    share_programs()

import jax  # noqa: E402  it reads the environment when it is imported

from deepseek_jax.runtime.threads import enough_threads  # noqa: E402  as JAX
from tests.support.quick import compile_quickly  # noqa: E402

enough_threads(8)
compile_quickly()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Files that take longest, so that no process is left alone with one of them at the end; of the
# others the order does not matter.
FIRST = (
    "test_kills.py",
    "test_mesh.py",
    "test_launch.py",
    "test_profile.py",
    "test_offload.py",
    "test_resume.py",
    "test_strategies.py",
    "test_train.py",
)


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)
    )


def pytest_collection_finish():
    """Modules and tests stay: the collector need not go through them again and again."""
    gc.freeze()
