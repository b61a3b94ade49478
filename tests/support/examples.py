"""A small encoder of chats in bytes, in place of a template, and loaders over it."""

import json
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config.options import Config, DataConfig, ModelConfig, SftConfig, TrainConfig
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError

STOP = 256


class Bytes(NamedTuple):
    ids: np.ndarray
    scored: np.ndarray
    dropped_reasoning: int = 0
    prompt_differs: bool = False


class ByteEncoder:
    """Messages as "u:TEXT", "a:TEXT" in bytes, each ended by STOP; the text and STOP of an answer are scored.

    Attributes:
      calls: rows that were encoded.
    """

    stop_ids = frozenset([STOP])

    def __init__(self, name="bytes", trains_stop=True):
        self.identity = name
        self.format = "messages"
        self.calls = 0
        self._trains_stop = trains_stop

    def encode_batch(self, rows, names=(), arrow=False):
        return [self._encode(row, name) for row, name in zip(rows, names, strict=True)]

    def describe(self):
        return ["assistant messages are trained"]

    def _encode(self, row: dict[str, Any], name: str) -> Bytes:
        self.calls += 1
        ids, scored = [], []
        for message in row.get("messages", ()):
            if "content" not in message:
                raise UserError(f"{name} has a message and no content. Give one.")
            text = list(message["content"].encode())
            ids += [ord(message["role"][0]), ord(":"), *text, STOP]
            answer = message["role"] == "assistant"
            scored += [False, False, *[answer] * len(text), answer and self._trains_stop]
        return Bytes(np.array(ids, np.int32), np.array(scored, bool))


def chat(question: str, answer: str) -> dict[str, Any]:
    """A row of two messages."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def random_chats(count: int, seed: int = 0, longest: int = 24) -> list[dict[str, Any]]:
    """Chats of letters; the question says which it is."""
    rng = np.random.default_rng(seed)

    def word() -> str:
        return "".join(rng.choice(list("abcdef "), rng.integers(1, longest)))

    return [chat(f"{i} {word()}", word()) for i in range(count)]


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_config(path, batch=2, length=48, seed=0, sft=None, data=None, **train) -> Config:
    return Config(
        seed=seed,
        objective="sft",
        model=ModelConfig(vocab_size=320),
        data=DataConfig(
            path=str(path), **{"tokenizer": "bytes", "eval_fraction": 0.0} | (data or {})
        ),
        train=TrainConfig(batch_size=batch, sequence_length=length, **train),
        sft=SftConfig(**sft or {}),
    )


def make_loader(config: Config, folder=None, encoder=None) -> ExampleLoader:
    tokenizer = load_tokenizer("bytes")
    return ExampleLoader(config, tokenizer, encoder or ByteEncoder(), folder and str(folder))
