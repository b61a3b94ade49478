"""Several answers to each prompt of a file, as rows that fine-tuning reads: what sequence-level distillation
trains on.

Rows go to OUT.part, whole batches at a time; OUT has its name when all are there. OUT.run.json says what they
are made of, so that the same command goes on after a kill, and another one is refused.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.cli.progress import Bar
from deepseek_jax.config.paths import temporary
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.data.row_file import RowFile
from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation.answers import Answers
from deepseek_jax.inference.generation.prompts import CHAT_KEYS

VERSION = 1
MADE_OF = ".run.json"  # OUT.run.json
PART = ".part"
# Of a prompt's row, what acts on its rendering alone: of the row with the answer it would be wrong.
_OF_PROMPTS = ("add_generation_prompt", "continue_final_message")
_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio, odd


def draw_number(prompt: int, sample: int) -> int:
    """int32: what the draws of a sample depend on, beside the seed and the position.

    That of the first sample is the prompt's own, so that it is the answer that the prompt has without
    samples. Others are far apart: multiples of the golden ratio leave gaps of about 2^32 / samples, which the
    numbers of prompts do not fill. How many samples there are plays no part.
    """
    return (prompt + sample * _GOLDEN + (1 << 31)) % (1 << 32) - (1 << 31)


def fingerprint(model: Any) -> str:
    """What tells weights from others: a hash of the names, shapes and first numbers of all arrays of each
    layer. It is the same on any mesh.

    Args:
      model: a LoadedModel, whose arrays are still there.
    """
    out = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path((model.params, model.bias)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        out.update(f"{name} {list(array.shape)} {array.dtype}".encode())
        first = next(s for s in array.addressable_shards if not any(i.start for i in s.index)).data
        stacked = name.startswith(
            ("layers/", "dense_layers/")
        )  # no device has a part of the layers alone
        index = (slice(None), *(0,) * (first.ndim - 1)) if stacked else (0,) * first.ndim
        out.update(np.asarray(first[index]).tobytes())
    return out.hexdigest()


def digest(prompts: Sequence[Mapping[str, Any]]) -> str:
    """Of the prompts, in their order."""
    out = hashlib.sha256()
    for row in prompts:
        out.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return out.hexdigest()


class Output:
    """OUT and what stands beside it.

    Args:
      path: OUT.
      made_of: what its rows depend on, by the option that says so.
    """

    def __init__(self, path: str, made_of: Mapping[str, Any]):
        self.path = path
        self.part = path + PART
        self._made_of = {"version": VERSION, **made_of}
        self._file = path + MADE_OF
        self._before = self._read()

    def is_complete(self) -> bool:
        """Whether all rows are there, by an earlier run of the same command.

        Raises:
          UserError: what is there is of another command, or nobody knows of which.
        """
        if self._before is None:
            for there in (self.path, self.part):
                if os.path.lexists(there):
                    raise UserError(
                        f"--out={self.path}: {there} exists, and no {self._file} says what it was made of. "
                        f"Name another --out, or move that file away."
                    )
            return False
        self._compare(self._made_of)
        return os.path.exists(self.path)

    def begin(self, weights: str) -> None:
        """Notes what the rows are made of, or compares it with what was noted.

        Args:
          weights: `fingerprint` of the model.

        Raises:
          UserError: they are of other weights, or the file cannot be written.
        """
        now = {**self._made_of, "weights": weights}
        if self._before is not None:
            self._compare(now)
            return
        name = temporary(self._file)
        try:
            with open(name, "x", encoding="utf-8") as f:
                json.dump(now, f, indent=2, ensure_ascii=False)
                f.flush()
                os.fsync(f.fileno())
            os.replace(name, self._file)
        except OSError as e:
            raise UserError(
                f"--out={self.path}: {self._file} cannot be written ({e.strerror}). Name another --out."
            ) from None

    def finish(self) -> None:
        """Gives the rows, which are on the disk, their name."""
        os.replace(self.part, self.path)
        folder = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read(self) -> dict[str, Any] | None:
        if not os.path.exists(self._file):
            return None
        try:
            with open(self._file, encoding="utf-8") as f:
                value = json.load(f)
            if not isinstance(value, dict) or "version" not in value:
                raise ValueError("it names no version")
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(
                f"--out={self.path}: {self._file} cannot be read ({e}). Name another --out, or move that "
                f"file away."
            ) from None
        return value

    def _compare(self, now: Mapping[str, Any]) -> None:
        assert self._before is not None
        for name, value in now.items():
            was = self._before.get(name)
            if was != value:
                what = {
                    "weights": "the model has other weights than",
                    "prompts": "--prompts holds other prompts than",
                    "version": "this version writes otherwise than",
                }.get(name, f"--{name}={value} is not {was} as")
                raise UserError(
                    f"--out={self.path}: {what} when it was begun. Give the same, or name another --out."
                )


def write(
    answers: Answers,
    prompts: Sequence[Mapping[str, Any]],
    ids: Sequence[Sequence[int]],
    samples: int,
    batch_size: int,
    output: Output,
) -> None:
    """Writes `samples` rows for each prompt, in their order, and says how many ended by themselves.

    A batch has always the same rows, so that after a kill the missing ones are what they would have been, to
    the byte.

    Args:
      answers: of the model.
      prompts: rows of read_prompts.
      ids: their tokens.
      samples: answers to each.
      batch_size: answers that are worked on at once.
      output: where they go; begun.

    Raises:
      UserError: a file cannot be written.
    """
    total = len(prompts) * samples
    begun, tokens, stopped = time.perf_counter(), 0, 0
    with (
        RowFile(output.part, "--out") as file,
        Bar("Generating", total, True, unit="items") as bar,
    ):
        done = file.count
        if done > total:
            raise UserError(
                f"--out={output.path}: {output.part} has {done} rows and not {total} at most. Delete it."
            )
        if done:
            print(f"goes on        after {done:,} of {total:,} answers", file=sys.stderr)
        bar.advance(done)
        for first in range(done // batch_size * batch_size, total, batch_size):
            numbers = [divmod(n, samples) for n in range(first, min(first + batch_size, total))]
            draws = [draw_number(prompt, sample) for prompt, sample in numbers]
            rows = []
            for (prompt, sample), stream in zip(
                numbers, answers.whole([ids[p] for p, _ in numbers], draws), strict=True
            ):
                reason = answers.finish_reason(stream)
                tokens, stopped = tokens + len(stream.ids), stopped + (reason == "stop")
                rows.append(
                    {
                        "index": prompt,
                        "sample": sample,
                        **answered(prompts[prompt], stream.text, answers.encoder),
                        "tokens": len(stream.ids),
                        "finish_reason": reason,
                    }
                )
            file.append(rows[max(0, done - first) :])
            speed = tokens / (time.perf_counter() - begun)
            bar.advance(file.count - max(first, done), f"{speed:,.0f} tokens/s")
    output.finish()
    made, seconds = total - done // batch_size * batch_size, time.perf_counter() - begun
    if made:
        print(
            f"answers        {total:,} to {len(prompts):,} prompts in {output.path}\n"
            f"made now       {made:,} of {tokens:,} tokens, {tokens / seconds:,.0f} tokens per second; "
            f"{stopped:,} ended by themselves, {made - stopped:,} at --max-tokens",
            file=sys.stderr,
        )


def answered(row: Mapping[str, Any], text: str, encoder: Encoder) -> dict[str, Any]:
    """A prompt's row with its answer: `messages` with one more, or `completion` beside `prompt`.

    An answer that the template began (`<think>`) has that beginning, as a template reads answers.
    """
    out = {key: value for key, value in row.items() if key not in _OF_PROMPTS}
    if "messages" not in row:
        return {**out, "completion": text}
    *before, last = row["messages"]
    if row.get("continue_final_message"):
        return {**out, "messages": [*before, {**last, "content": f"{last['content']}{text}"}]}
    options = {k: row[k] for k in CHAT_KEYS & row.keys()}
    rendered = encoder.chat.render(
        row["messages"], **options, **row.get("chat_template_kwargs", {})
    )
    begun = re.search(r"<think>\s*\Z", rendered)
    content = (begun[0] if begun else "") + text
    return {**out, "messages": [*before, last, {"role": "assistant", "content": content}]}


def check_prompts(prompts: Sequence[Mapping[str, Any]], path: str) -> None:
    """Raises UserError for a prompt to which no answer can be appended."""
    for number, row in enumerate(prompts, 1):
        if taken := {"sample", "completion"} & row.keys():
            raise UserError(
                f"--prompts={path}: prompt {number} has the key {min(taken)!r}, which the result has too. "
                f"Rename it."
            )
        if not row.get("continue_final_message"):
            continue
        if not isinstance(row["messages"][-1].get("content"), str):
            raise UserError(
                f"--prompts={path}: prompt {number} has continue_final_message, and its last message has no "
                f"text as content. Give it one."
            )
