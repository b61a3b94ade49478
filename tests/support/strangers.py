"""Connections to the ports of a job that do not belong to it."""

import errno
import json
import socket

from deepseek_jax.cluster import wire


def greeting_of_a_thief(s: socket.socket) -> bytes:
    """An answer to process 0's challenge by somebody who knows the protocol and no token."""
    challenge = json.loads(s.makefile().readline())["challenge"]
    proof = wire._proof(b"guessed", "process 1", challenge, "mine")
    greeting = {"process": 1, "host": "x", "challenge": "mine", "proof": proof}
    return json.dumps(greeting).encode() + b'\n{"process": 1, "count": 3}\n'


STRANGERS = (
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b'{"process": "0"}\n',
    b'{"process": 1, "count": 3, "error": "stop"}\n',
    b'{"process": 1, "challenge": 5, "proof": null}\n',
    b'{"process": 1, "challenge": "a", "proof": "\xc3\xa9"}\n',
    b'{"process": 1, "challenge": "\\ud800", "proof": "\\ud800"}\n',
    b"[1]\n",
    b"1\n",
    b"[" * 900 + b"\n",
    b"x" * 100_000,
    greeting_of_a_thief,
)

DROPPED = {errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN}


def visit(port: int) -> None:
    """All of them come, one after the other; returns when each has been dropped."""
    for text in STRANGERS:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
            try:
                s.sendall(text(s) if callable(text) else text)
                s.shutdown(socket.SHUT_WR)
                while s.recv(1 << 16):
                    continue
            except OSError as e:
                if e.errno not in DROPPED:  # a timeout: it was not
                    raise
