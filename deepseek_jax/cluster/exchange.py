"""Texts between the processes of a job, over JAX's coordination service: no device takes part, so
threads may talk too."""

from collections import defaultdict

import jax

from deepseek_jax.runtime.jax_private import coordination_client

TIMEOUT = 1200.0  # seconds to wait for another process, which may be writing its part of a large checkpoint
# turns of `from_first` that stay readable: collectives keep processes within few steps of each
# other
KEPT = 64

_turns: dict[str, int] = defaultdict(int)


def exchange(channel: str, text: str) -> list[str]:
    """The texts of all processes, in their order. All of them call it equally often with a channel,
    from one thread each.

    Raises:
      TimeoutError: the text of another process did not come.
    """
    if jax.process_count() == 1:
        return [text]
    turn = _next_turn(channel)
    client, me = coordination_client(), jax.process_index()

    def key(turn: int, process: int) -> str:
        return f"deepseek_jax/{channel}/{turn}/{process}"

    client.key_value_set(key(turn, me), text)
    processes = range(jax.process_count())
    out = [
        text if i == me else _wait_for(client, key(turn, i), "another process") for i in processes
    ]
    if turn:  # whoever speaks in this turn has heard all of the one before
        client.key_value_delete(key(turn - 1, me))
    return out


def from_first(channel: str, text: str) -> str:
    """The text of process 0. As `exchange`, but process 0 waits for nobody.

    Raises:
      TimeoutError: it did not come.
    """
    if jax.process_count() == 1:
        return text
    turn = _next_turn(channel)
    client = coordination_client()

    def key(turn: int) -> str:
        return f"deepseek_jax/{channel}/{turn}"

    if jax.process_index():
        return _wait_for(client, key(turn), "process 0")
    client.key_value_set(key(turn), text)
    if turn >= KEPT:
        client.key_value_delete(key(turn - KEPT))
    return text


def _next_turn(channel: str) -> int:
    turn = _turns[channel]
    _turns[channel] += 1
    return turn


def _wait_for(client, key: str, whose: str) -> str:
    try:
        return client.blocking_key_value_get(key, int(TIMEOUT * 1000))
    except jax.errors.JaxRuntimeError as e:
        reason = str(e).splitlines()[0][:150]
        raise TimeoutError(f"{whose} did not answer about the checkpoint ({reason})") from e
