"""Lines of JSON between the processes of one job, over TCP, after each end has proved that it
belongs to the job.

Process 0 has a `Hub`: a listener, and the connections of the other processes. Each of those has one
`Connection`, made by `connect`. The agreement before JAX starts and the monitor of a run both use
them, each with a port and a key of its own.

The greeting shows that both ends know the job's token, without sending it. A challenge is 16 random
bytes in hexadecimal:

    process 0 -> {"challenge": A}
    process i -> {"process": i, "host": H, "challenge": B, "proof": HMAC-SHA256(token, "process i A B")}
    process 0 -> {"proof": HMAC-SHA256(token, "hub A B")}

The token is made of the secret in DEEPSEEK_JAX_TOKEN, which `deepseek_jax.launch` makes up on one
host. Without it the token is made of the scheduler's name of the job (SLURM's, Open MPI's,
torchrun's), or of nothing where nobody names the job: Kubernetes, flags, JAX_* variables, launchers
of several hosts.

What that protects against: an end that does not know the token is dropped before anything that it
says is used. With a secret in DEEPSEEK_JAX_TOKEN nobody else can join a run, read its options or
stop it through these two ports. A token made of a job's name keeps out port scanners, other
programs and the processes of other jobs, but nobody who means harm: job numbers are no secret.
Neither protects against those who can read or change packets between the hosts: what follows the
greeting is neither encrypted nor signed. Nor do they cover the ports of JAX's own service, gloo and
NCCL, which check nobody: let a firewall or the scheduler's network keep the ports of a job to its
hosts.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

TOKEN = "DEEPSEEK_JAX_TOKEN"
MAX_LINE = 1 << 22  # bytes of a message; a longer one is not from this job: drop the connection
MAX_GREETING = 1 << 10  # bytes, of an end that has not proved anything yet
GREETING_TIMEOUT = 10.0  # seconds for the answer to a challenge
SEND_TIMEOUT = 10.0  # seconds; a partner that takes nothing for longer is noticed by its silence
SPARE_CONNECTIONS = (
    64  # more than the job's that may wait for their greeting; then the oldest is dropped
)

Message = dict[str, Any]


class Refused(OSError):
    """The other end does not know the token of this job."""


def job_token(environment: Mapping[str, str], job: str) -> bytes:
    """The token of this job, the same in all its processes.

    Args:
      environment: its DEEPSEEK_JAX_TOKEN comes first; empty counts as not set.
      job: the scheduler's name of the job, or "".
    """
    secret = environment.get(TOKEN, "").strip()
    text = f"secret {secret}" if secret else f"job {job}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def new_token() -> str:
    """A secret for DEEPSEEK_JAX_TOKEN."""
    return secrets.token_hex(16)


def derived(token: bytes, salt: str) -> bytes:
    """A key for one purpose: whoever hears the salt alone cannot make it."""
    return hmac.digest(token, f"key {salt}".encode(), "sha256")


class Connection:
    """One end of a connection. `send` may be called from any thread, the rest from one.

    Attributes:
      socket: the connected socket.
      process: number of the process at the other end; None until it has proved that it belongs to the job.
      host: that process's name of its host.
    """

    def __init__(self, s: socket.socket):
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        s.settimeout(SEND_TIMEOUT)
        self.socket = s
        self.process: int | None = None
        self.host = ""
        self._unread = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends one message, whole. That the other end is gone is noticed by reading, not here."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self, limit: int = MAX_LINE) -> list[Message] | None:
        """The messages that have come, once the socket is readable.

        Args:
          limit: bytes of the longest message.

        Returns:
          None if the connection is closed, or what came is no message.
        """
        try:
            chunk = self.socket.recv(1 << 16)
            *lines, self._unread = (self._unread + chunk).split(b"\n")
            if not chunk or max(map(len, (*lines, self._unread))) > limit:
                return None
            return [_message(line) for line in lines]
        except (OSError, ValueError):
            return None

    def receive(self, seconds: float | None) -> Message:
        """Waits for the next message; what comes after it stays in the socket, for `read`.

        Args:
          seconds: to wait at most; None: as long as it takes.

        Raises:
          OSError: none came in time (TimeoutError), the connection is closed, or what came is no message.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            self.socket.settimeout(left)
            chunk = self.socket.recv(1 << 16, socket.MSG_PEEK)
            line += self.socket.recv(chunk.find(b"\n") + 1 or len(chunk)) if chunk else b""
            if not chunk or len(line) > MAX_LINE:
                raise ConnectionError("the connection was closed")
        self.socket.settimeout(SEND_TIMEOUT)
        try:
            return _message(line)
        except ValueError as e:
            raise ConnectionError("another program answers there") from e

    def close(self) -> None:
        self.socket.close()


def _message(line: bytes) -> Message:
    """Raises ValueError: it is no JSON object."""
    try:
        message = json.loads(line)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def _proof(token: bytes, role: str, first: str, second: str) -> str:
    return hmac.new(token, _bytes(f"{role} {first} {second}"), "sha256").hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # JSON of strangers can spell lone surrogates


def _is_proof(given: Any, token: bytes, role: str, first: str, second: str) -> bool:
    wanted = _proof(token, role, first, second)
    return isinstance(given, str) and hmac.compare_digest(_bytes(given), _bytes(wanted))


def connect(
    address: tuple[str, int], token: bytes, process: int, timeout: float, patience: float
) -> Connection:
    """Connects to process 0.

    Args:
      address: host and port of its hub.
      token: of the job, or a key derived from it.
      process: number of this process.
      timeout: seconds until the connection must stand.
      patience: seconds until process 0 must have greeted: it may listen before it has time to answer.

    Raises:
      Refused: process 0 does not accept this token, or does not know it itself.
      OSError: nobody listens there or answers in time.
    """
    c = Connection(socket.create_connection(address, timeout=timeout))
    try:
        theirs, mine = str(c.receive(patience).get("challenge")), secrets.token_hex(16)
        proof = _proof(token, f"process {process}", theirs, mine)
        host = socket.gethostname()
        c.send(process=process, host=host, challenge=mine, proof=proof)
        try:
            answer = c.receive(patience)
        except ConnectionError as e:
            raise Refused("it does not accept this process's token") from e
        if not _is_proof(answer.get("proof"), token, "hub", theirs, mine):
            raise Refused("it does not know the token of this job")
        c.process = 0
        return c
    except BaseException:
        c.close()
        raise


class _Greeting(NamedTuple):
    """What is known of a connection whose other end has not proved anything yet."""

    challenge: str
    until: float  # when it is dropped, of time.monotonic()
    address: str


class Hub:
    """Process 0's end: accepts connections, and hands out what comes from those that belong to the job.

    Attributes:
      connections: of the processes that have proved that they belong to the job, in the order in
        which they came.
      refused: addresses of those that greeted with another token.
    """

    def __init__(self, listener: socket.socket, token: bytes, count: int):
        """
        Args:
          listener: as `listen` makes it.
          token: of the job, or a key derived from it.
          count: processes of the job.
        """
        self.connections: list[Connection] = []
        self.refused: set[str] = set()
        self._token = token
        self._count = count
        self._listener: socket.socket | None = listener
        self._greeting: dict[Connection, _Greeting] = {}
        self._ready = selectors.DefaultSelector()
        listener.setblocking(False)
        self._ready.register(listener, selectors.EVENT_READ)

    @property
    def port(self) -> int | None:
        """Where it listens; None: no longer."""
        return self._listener.getsockname()[1] if self._listener else None

    def wait(self, seconds: float) -> list[tuple[Connection, list[Message] | None]]:
        """What comes within so many seconds, or sooner: as soon as something has come.

        Returns:
          (connection, messages) of processes of the job; no message from one that has come just
          now, None from one whose connection is closed, which is no longer waited for.
        """
        out: list[tuple[Connection, list[Message] | None]] = []
        for key, _ in self._ready.select(seconds):
            connection = key.data
            if connection is None:
                self._accept()
            elif connection in self._greeting:
                if self._greeted(connection):
                    self.connections.append(connection)
                    out.append((connection, []))
            elif connection.process is not None:  # not dropped in this turn, for others that came
                messages = connection.read()
                if messages is None:
                    self._ready.unregister(connection.socket)
                out.append((connection, messages))
        now = time.monotonic()
        for connection in [c for c, greeting in self._greeting.items() if greeting.until < now]:
            self._drop(connection)
        return out

    def forget(self, connection: Connection) -> None:
        """Closes a connection that `wait` has reported as closed; its process may come again."""
        self.connections.remove(connection)
        connection.close()

    def close_listener(self) -> None:
        """Nobody more may come; the port is free for others."""
        if self._listener:
            self._ready.unregister(self._listener)
            self._listener.close()
            self._listener = None
        for connection in list(self._greeting):
            self._drop(connection)

    def close(self) -> None:
        self.close_listener()
        for connection in self.connections:
            connection.close()
        self.connections = []
        self._ready.close()

    def _accept(self) -> None:
        assert self._listener is not None  # `wait` reported it
        try:
            s, address = self._listener.accept()
        except OSError:  # it has gone again
            return
        if len(self._greeting) >= self._count + SPARE_CONNECTIONS:
            self._drop(next(iter(self._greeting)))
        connection, challenge = Connection(s), secrets.token_hex(16)
        until = time.monotonic() + GREETING_TIMEOUT
        self._greeting[connection] = _Greeting(challenge, until, address[0])
        self._ready.register(s, selectors.EVENT_READ, connection)
        connection.send(challenge=challenge)

    def _greeted(self, connection: Connection) -> bool:
        """Reads the answer to a challenge; False if it has not come yet, or is wrong: then the
        connection is dropped."""
        messages = connection.read(MAX_GREETING)
        if messages == []:
            return False
        challenge, _, address = self._greeting[connection]
        answer = messages[0] if messages and len(messages) == 1 else {}
        process, theirs = answer.get("process"), answer.get("challenge")
        if type(process) is not int or not isinstance(theirs, str):
            self._drop(connection)
            return False
        proof = answer.get("proof")
        if not _is_proof(proof, self._token, f"process {process}", challenge, theirs):
            self.refused.add(address)
            self._drop(connection)
            return False
        del self._greeting[connection]
        connection.process, connection.host = process, str(answer.get("host"))
        connection.send(proof=_proof(self._token, "hub", challenge, theirs))
        return True

    def _drop(self, connection: Connection) -> None:
        del self._greeting[connection]
        self._ready.unregister(connection.socket)
        connection.close()
