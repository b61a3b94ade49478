"""JAX's persistent compilation cache: where it lies, what it keeps, and how large it may get."""

import contextlib
import hashlib
import os
import platform
import threading
from collections.abc import Callable

import jax

from deepseek_jax.runtime import jax_private

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
    """Lets JAX keep compiled programs in a folder, and take them from there. Call it before
    anything is compiled.

    An unusable folder costs a warning and the time to compile, never the run. Entries are named by
    a hash of program, compiler options, XLA flags, JAX version and devices; process 0 writes them,
    and the others read them if they see the same folder. A program for CPUs may use every
    instruction of the CPU it was compiled on; XLA only logs that another CPU lacks some, and runs
    the program until one of them stops it. So such programs have a folder for each kind of CPU.

    Args:
      cache_dir: `config.compile.cache_dir`. "" leaves a folder alone that is set already
        (JAX_COMPILATION_CACHE_DIR).
      warn: is given the line that says why there is no cache.

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
            f"No compilation cache: {folder} cannot be written ({e.strerror}). "
            f"Set config.compile.cache_dir to a folder, or to {OFF}."
        )
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    for name, value in (
        ("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax_private.name_cached_programs_by(cpu_kind)
    return folder


def forget_oldest(folder: str, limit: int) -> None:
    """Removes programs from a folder, those first that were not read for the longest time, until it
    holds `limit` bytes or less.

    JAX's own limit (jax_compilation_cache_max_size) takes one lock for every read, for which
    processes of a large cluster would wait longer than the 10 seconds that it gives them, and fails
    on entries that were made without a limit.
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


def default_folder() -> str:
    """$XDG_CACHE_HOME/deepseek_jax, or ~/.cache/deepseek_jax."""
    return os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"),
        "deepseek_jax",
    )


def cpu_kind() -> str:
    """8 hexadecimal digits, of the CPU's model and features where the system tells them (Linux), of
    what Python knows elsewhere."""
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
