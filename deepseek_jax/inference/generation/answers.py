"""Answers of a model as text: printed as they come, in a conversation, or written to a file."""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.inference.generation.prompts import fits
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.inference.generation.text import Stream


@dataclasses.dataclass
class Answers:
    """What a model answers to prompts.

    Attributes:
      stop: an answer ends before any of these texts.
      max_tokens: of an answer at most.
      draft_tokens: drafted per step by multi-token prediction layers; 0: none.
    """

    engine: Engine
    encoder: Encoder
    sampling: Sampling
    stop: Sequence[str]
    max_tokens: int
    draft_tokens: int

    def stream(
        self, ids: Sequence[Sequence[int]], draws: Sequence[int]
    ) -> Iterator[tuple[int, str, Stream]]:
        """Answers to prompts, as their tokens come.

        Args:
          ids: the prompts' tokens.
          draws: int32, the number of each, all different: with the seed it decides what is drawn.

        Yields:
          (number of the prompt in `ids`, text to show, its Stream); at the end of each answer once
          more.
        """
        streams = [Stream(self.encoder, self.stop, prompt) for prompt in ids]
        stopped: set[int] = set()
        row_of = {draw: row for row, draw in enumerate(draws)}
        for token in self.engine.batch(
            ids,
            self.max_tokens,
            self.sampling,
            self.encoder.stop_ids,
            draws,
            stopped,
            self.draft_tokens,
        ):
            row = row_of[token.number]
            stream = streams[row]
            if stream.stopped:
                continue
            yield row, stream.add(token.id), stream
            if stream.stopped:
                stopped.add(token.number)
                if len(stopped) == len(ids):
                    break
        for row, stream in enumerate(streams):
            yield row, stream.end(), stream

    def whole(self, ids: Sequence[Sequence[int]], draws: Sequence[int]) -> list[Stream]:
        """The answers of `stream`, ended."""
        streams = {row: stream for row, _, stream in self.stream(ids, draws)}
        return [streams[row] for row in range(len(ids))]

    def finish_reason(self, stream: Stream) -> str:
        """ "stop": by a stop token or a stop text; "length": there was no room for more."""
        ended = stream.stopped or stream.ids[-1] in self.encoder.stop_ids
        return "stop" if ended else "length"

    def show(self, ids: Sequence[int], index: int) -> str:
        """Prints an answer as it comes; returns it. `index`: number of the prompt, for the seed."""
        answer = ""
        for _, text, stream in self.stream([ids], [index]):
            print(text, end="", flush=True)
            answer = stream.text
        print()
        return answer

    def chat(self, messages: Sequence[dict[str, str]]) -> None:
        """Reads a line, prints the answer, until there are no more lines.

        Args:
          messages: the conversation begins with them.
        """
        messages = list(messages)
        for turn in itertools.count():
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            try:
                line = clean_text(sys.stdin.readline())
            except UnicodeDecodeError as e:
                what = f"{e.encoding} ({e.reason} at byte {e.start})"
                raise UserError(
                    f"a line of stdin is not {what}. Write it in that encoding."
                ) from None
            if not line:
                if sys.stdin.isatty():
                    print(file=sys.stderr)
                return
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.rstrip("\r\n")})
            ids = self.encoder.chat.encode(messages)
            fits(ids, "the conversation", self.engine.config.max_position_embeddings)
            messages.append({"role": "assistant", "content": self.show(ids, turn)})

    def write(
        self,
        prompts: Sequence[dict[str, Any]],
        ids: Sequence[Sequence[int]],
        batch_size: int,
        output: str | None,
    ) -> None:
        """Writes a line of JSON for each prompt, in their order.

        Args:
          ids: the prompts' tokens.
          batch_size: prompts that are worked on at once.
          output: a file; None is stdout.
        """
        try:
            out = open(os.path.expanduser(output), "w", encoding="utf-8") if output else sys.stdout
        except OSError as e:
            raise UserError(
                f"--output={output} cannot be written ({e.strerror}). Name a file that you may write to."
            ) from e
        try:
            for first in range(0, len(ids), batch_size):
                part = ids[first : first + batch_size]
                for row, stream in enumerate(self.whole(part, range(first, first + len(part)))):
                    result = {
                        "index": first + row,
                        **prompts[first + row],
                        "text": stream.text,
                        "tokens": len(stream.ids),
                        "finish_reason": self.finish_reason(stream),
                    }
                    print(json.dumps(result, ensure_ascii=False), file=out, flush=True)
        finally:
            if output:
                out.close()
