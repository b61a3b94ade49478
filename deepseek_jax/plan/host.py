"""The machine that is measured: its CPU, and how much of it other programs used meanwhile. A ratio of two
programs counts only where both had the machine to themselves (PyTorch's threads spin while they wait).
"""

import os
import pathlib
import platform
import resource
import time

STAT = pathlib.Path("/proc/stat")
ENOUGH = 0.1  # cores of others below which a figure is that of an idle machine


class Others:
    """Cores that programs other than this process and its finished children use, since it was made."""

    def __init__(self) -> None:
        self._busy = busy()
        self._own = own()
        self._at = time.perf_counter()

    def cores(self) -> float | None:
        """The mean since then; None where the system does not say it."""
        if self._busy is None:
            return None
        passed = time.perf_counter() - self._at
        others = (busy() or 0.0) - self._busy - (own() - self._own)
        return max(0.0, others / passed)


def busy() -> float | None:
    """CPU seconds that the machine has spent or its host took from it; None without /proc/stat."""
    try:
        names = STAT.read_text(encoding="ascii").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, names[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def said(cores: float | None) -> str:
    """A line for a person."""
    if cores is None:
        return "this system does not say what other programs used meanwhile"
    verdict = "" if cores <= ENOUGH else ": ratios may not be those of an idle machine"
    return f"other programs used {cores:.2f} cores meanwhile{verdict}"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The model of the CPU, "" where the system does not say it: ratios of two programs depend on it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = {name.strip(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
    # Hypervisors may hide the product's number: family and model still tell generations apart.
    numbers = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return f"{found['model name']} ({numbers})" if "model name" in found else platform.processor()


def memory() -> int | None:
    """Bytes of memory that this process may have: the machine's, or less where its control group says so;
    None where the system does not say.
    """
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = pathlib.Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdecimal():  # else "max"
            found = min(found, int(limit))
    return found
