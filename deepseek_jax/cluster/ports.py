"""Ports of this host: listening, and finding a free one."""

import random
import socket


def listen(host: str, port: int, backlog: int = 1) -> socket.socket:
    """A listening socket; an empty host means all interfaces.

    Raises:
      OSError: this host has no such address, or the port is taken.
    """
    host = host.strip("[]")
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if both or ":" in host else socket.AF_INET,
        backlog=backlog,
        dualstack_ipv6=both,
    )


def loopback(host: str) -> str:
    """Where to listen so that this host alone is heard, if `host` means that; "" if it does not."""
    if host == "localhost":
        return "127.0.0.1"
    return host if host.startswith("127.") else ""


def free_port() -> int:
    """A port of this host that nobody listens on.

    From 20,000 to 32,000: from 32,768 on Linux gives ports to whoever asks for any, and might give
    this one away before it is used.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        try:
            with listen("127.0.0.1", port):
                return port
        except OSError:
            continue
    with listen("127.0.0.1", 0) as s:
        return s.getsockname()[1]
