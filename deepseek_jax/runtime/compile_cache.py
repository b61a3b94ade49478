"""JAX's persistent compilation cache."""

import contextlib
import hashlib
import inspect
import os
import platform
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax._src import cache_key

OFF = "off"
# Programs that compile faster are not kept: reading them back takes as long.
MIN_SECONDS = 0.2
# What a folder of programs may hold when a run starts; the longest unused go first.
MAX_BYTES = 4 * 2**30

_this_thread = threading.local()


def _count_hits(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _this_thread.hits = getattr(_this_thread, "hits", 0) + 1


jax.monitoring.register_event_listener(_count_hits)


def hits() -> int:
    """How many programs this thread has read from the cache."""
    return getattr(_this_thread, "hits", 0)


def use_cache(cache_dir: str, warn: Callable[[str], None]) -> str:
    """Lets JAX keep compiled programs in a folder, and take them from there. Call it before anything is compiled.

    An unusable folder costs a warning and the time to compile, never the run. Entries are named by a hash of program, compiler
    options, XLA flags, JAX version and devices; process 0 writes them, and the others read them where they see the same folder. A
    program for CPUs may use every instruction of the CPU it was compiled on, and XLA, which only logs a difference, would run it on
    another until that stops it: such programs have a folder for each kind of CPU.

    Args:
      cache_dir: `config.compile.cache_dir`. "" leaves a folder alone that is set already (JAX_COMPILATION_CACHE_DIR).
      warn: what to do with the line that says why there is no cache.

    Returns:
      The folder, or "" without a cache.
    """
    if cache_dir == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    set_outside = jax.config.jax_compilation_cache_dir if not cache_dir else None
    folder = set_outside or cache_dir or default_folder()
    if jax.default_backend() == "cpu" and not set_outside:
        folder = os.path.join(folder, f"cpu-{cpu_kind()}")
    try:
        if "://" not in folder:
            folder = os.path.abspath(os.path.expanduser(folder))
            os.makedirs(folder, exist_ok=True)
            probe = os.path.join(folder, f".writable.{os.getpid()}")
            with open(probe, "w"):
                pass
            os.remove(probe)
            if (
                jax.process_index() == 0
                and not set_outside
                and "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ
            ):
                forget_oldest(folder, MAX_BYTES)
    except OSError as e:
        warn(
            f"No compilation cache: {folder} cannot be written ({e.strerror}). Set config.compile.cache_dir to a folder, or to {OFF}."
        )
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    for name, given, value in (
        (
            "jax_persistent_cache_min_compile_time_secs",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
            MIN_SECONDS,
        ),
        (
            "jax_persistent_cache_min_entry_size_bytes",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
            -1,
        ),
    ):
        if given not in os.environ:
            jax.config.update(name, value)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        _same_key_in_every_process()
    return folder


def forget_oldest(folder: str, limit: int) -> None:
    """Removes programs from a folder, those first that were not read for the longest time, until it holds `limit` bytes or less.

    JAX's own limit (jax_compilation_cache_max_size) takes one lock for every read, for which processes of a large cluster would wait
    longer than the 10 seconds that it gives them, and fails on entries that were made without a limit.
    """
    entries = []
    for entry in os.scandir(folder):
        if entry.name.endswith("-cache"):
            with contextlib.suppress(FileNotFoundError):  # another run is at it too
                found = entry.stat()
                entries.append((max(found.st_atime, found.st_mtime), found.st_size, entry.path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            return
        with contextlib.suppress(OSError):
            os.remove(path)
        total -= size


def _same_key_in_every_process() -> None:
    """Lets processes on CPUs find the programs that process 0 keeps.

    A CPU's topology has the index of the process in its fingerprint, which jax 0.10.2 makes part of an entry's name: every other process
    looked for a name that nobody writes. What it should tell apart is told by the kind of CPU and by which process has which device.
    tests/run/test_profile.py fails where this is needed and does not act.
    """
    hash_devices = getattr(cache_key, "_hash_accelerator_config", None)
    if hash_devices is None or list(inspect.signature(hash_devices).parameters) != [
        "hash_obj",
        "accelerators",
    ]:
        return

    def hash_layout(hash_obj: Any, accelerators: Any) -> None:
        if any(d.platform != "cpu" for d in accelerators.flat):
            return hash_devices(hash_obj, accelerators)
        hash_obj.update(
            f"{cpu_kind()} {[(d.id, d.process_index) for d in accelerators.flat]}".encode()
        )

    cache_key._hash_accelerator_config = hash_layout


def default_folder() -> str:
    """$XDG_CACHE_HOME/deepseek_jax, or ~/.cache/deepseek_jax."""
    return os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"),
        "deepseek_jax",
    )


def cpu_kind() -> str:
    """8 hexadecimal digits: of the CPU's model and features where the system tells them (Linux), of what Python knows elsewhere."""
    text = f"{platform.machine()} {platform.system()} {platform.processor()}"
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            first = f.read().split("\n\n")[0].splitlines()
        text += "\n".join(
            line
            for line in first
            if line.split(":")[0].strip().lower() in ("model name", "flags", "features", "cpu part")
        )
    except OSError:
        pass
    return hashlib.sha256(text.encode()).hexdigest()[:8]
