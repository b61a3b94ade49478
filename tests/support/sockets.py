"""Processes of this host and where they take connections, from /proc (Linux)."""

import contextlib
import ipaddress
import os
import pathlib


def parent_of(pid: int) -> int:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[1])


def descendants(pid: int) -> set[int]:
    """A process and all that it has started, and these, that still run."""
    children: dict[int, list[int]] = {}
    for proc in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(parent_of(int(proc.name)), []).append(int(proc.name))
    found, left = set(), [pid]
    while left:
        found.add(one := left.pop())
        left += children.get(one, [])
    return found


def listened_at(pids: set[int]) -> set[str]:
    """The addresses at which processes take connections of TCP."""
    sockets = set()
    for pid in pids:
        for file in pathlib.Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(file))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                # words of 32 bits in this host's order of bytes
                raw = bytes.fromhex(words[1].partition(":")[0])
                parts = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
                found.add(str(ipaddress.ip_address(b"".join(parts))))
    return found
