"""Huge pages for this process's memory. It imports nothing heavy, so that a program can call it first."""

import os
import sys

from deepseek_jax.runtime import environment

TUNABLE = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """Starts this program again, once, with glibc's `malloc` asking for huge pages; the same process, arguments and environment.

    XLA's CPU client gets a step's temporaries from `malloc` and gives them back after it: with pages of 4 KiB the kernel clears and maps hundreds
    of thousands of them at every step, and a step takes 1.2 to 1.5 times as long. glibc reads the tunable when a program starts, and
    only then. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns it off. Call it before anything else: what was done is lost.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    # What is malformed is to be said: the program that is started would not know of it.
    if sys.platform != "linux" or TUNABLE in given or not sys.executable or environment.malformed:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, f"{TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
