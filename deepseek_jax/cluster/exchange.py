"""Words between the processes of a job, over JAX's coordination service: no device takes part, so threads may talk too."""

from collections import defaultdict

import jax
from jax._src import distributed

TIMEOUT = 1200.0  # seconds that a process waits for the words of another, who may be writing its part of a large checkpoint

_turns: dict[str, int] = defaultdict(int)


def exchange(channel: str, text: str) -> list[str]:
    """What every process said, in their order. All of them call it equally often with a channel, from one thread each.

    Raises:
      TimeoutError: a process did not say anything.
    """
    if jax.process_count() == 1:
        return [text]
    turn, _turns[channel] = _turns[channel], _turns[channel] + 1
    client, me = distributed.global_state.client, jax.process_index()
    key = lambda turn, process: f"deepseek_jax/{channel}/{turn}/{process}"
    client.key_value_set(key(turn, me), text)
    try:
        out = [
            text if i == me else client.blocking_key_value_get(key(turn, i), int(TIMEOUT * 1000))
            for i in range(jax.process_count())
        ]
    except jax.errors.JaxRuntimeError as e:
        raise TimeoutError(
            f"another process did not answer about the checkpoint ({str(e).splitlines()[0][:150]})"
        ) from e
    if turn:  # whoever speaks in this turn has heard all of the one before
        client.key_value_delete(key(turn - 1, me))
    return out


def from_first(channel: str, text: str) -> str:
    """What process 0 said. As `exchange`, but process 0 waits for nobody."""
    if jax.process_count() == 1:
        return text
    turn, _turns[channel] = _turns[channel], _turns[channel] + 1
    client = distributed.global_state.client
    key = lambda turn: f"deepseek_jax/{channel}/{turn}"
    if jax.process_index():
        try:
            return client.blocking_key_value_get(key(turn), int(TIMEOUT * 1000))
        except jax.errors.JaxRuntimeError as e:
            raise TimeoutError(
                f"process 0 did not answer about the checkpoint ({str(e).splitlines()[0][:150]})"
            ) from e
    client.key_value_set(key(turn), text)
    if turn >= 64:  # collectives keep processes within few steps of each other
        client.key_value_delete(key(turn - 64))
    return text
