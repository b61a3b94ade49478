"""Huge pages for this process's memory. Imports nothing heavy, so that a program can call it first."""

import os
import sys

from deepseek_jax.runtime import environment

TUNABLE = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """Starts this program again, once, with glibc's `malloc` asking for huge pages; the same
    process, arguments and environment.

    XLA's CPU client gets a step's temporaries from `malloc` and gives them back after it: with
    pages of 4 KiB the kernel clears and maps hundreds of thousands of them at every step, and a
    step takes 1.2 to 1.5 times as long. glibc reads the tunable only when a program starts, hence
    the execv. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns it off. Call it before anything else:
    what was done before is lost.

    No longer needed when XLA's CPU client asks for huge pages itself, or keeps a step's memory;
    tests/runtime/test_huge_pages.py fails when it does.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    # A malformed variable has been taken away: the program started again could not say so.
    if sys.platform != "linux" or TUNABLE in given or not sys.executable or environment.malformed:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, f"{TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
