"""What a model in training answers to held-out prompts: WORKDIR/answers/STEP.jsonl."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.generation import sample
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.inference.generation.programs import Programs
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.model.layout import ModelWeights, PlacedModel

FOLDER = "answers"  # in WORKDIR
GREEDY = Sampling()


class Prompt(NamedTuple):
    """What is asked, and what an example has for an answer."""

    ids: list[int]
    reference: list[int]


def prompts_of(
    examples: Iterable[tuple[np.ndarray, np.ndarray]], count: int, longest: int
) -> list[Prompt]:
    """The first prompts of some examples: all that comes before the last run of scored tokens, which is the
    reference.

    Args:
      examples: (ids, which of them are scored).
      count: how many.
      longest: tokens that leave room for an answer; longer prompts are left out, as are examples without one.
    """
    out: list[Prompt] = []
    for ids, scored in examples:
        if len(out) == count:
            break
        ends = np.flatnonzero(scored)
        if not len(ends):
            continue
        last = int(ends[-1])
        unscored = np.flatnonzero(~np.asarray(scored, bool)[:last])
        first = int(unscored[-1]) + 1 if len(unscored) else 0
        if 0 < first <= longest:
            out.append(Prompt(ids[:first].tolist(), ids[first : last + 1].tolist()))
    return out


class Answering:
    """Answers to the same prompts, again and again, by the likeliest tokens.

    One process with the model on its devices has a cache, and for a while the weights once more in another
    form (on CPUs they are the same memory); several processes, stages and weights in the host's memory
    compute every token from the whole text.

    Args:
      model: the model, laid out over the mesh.
      stop_ids: tokens that end an answer.
    """

    def __init__(
        self,
        config: Config,
        model: PlacedModel,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        prompts: Sequence[Prompt],
    ):
        self._model = model
        self._mesh = mesh
        self._tokenizer = tokenizer
        self._stop = frozenset(stop_ids)
        self._prompts = prompts
        self._count = config.sft.eval_tokens
        elsewhere = mesh.shape["stage"] > 1 or config.offload.parameters
        self._cached = jax.process_count() == 1 and not elsewhere
        self._programs: Programs | None = None  # of the first time

    def ids(self, weights: ModelWeights) -> list[list[int]]:
        """The answers, without stop tokens. Every process calls it."""
        bound = BoundModel(self._model, *weights, self._mesh)
        prompts, vocab = [p.ids for p in self._prompts], self._tokenizer.vocab_size
        if not self._cached:
            return [
                list(sample.tokens(bound, p, self._count, GREEDY, vocab, self._stop)) for p in prompts
            ]
        engine = Engine(bound, vocab=vocab, programs=self._programs)
        self._programs = engine.programs
        return engine.generate(prompts, self._count, GREEDY, self._stop)

    def rows(self, weights: ModelWeights) -> list[dict]:
        """The answers as text, beside their prompts and references."""
        return [
            {
                "prompt": spelled(self._tokenizer, prompt.ids),
                "answer": self._tokenizer.decode(answer, after=prompt.ids),
                "reference": self._tokenizer.decode(prompt.reference, after=prompt.ids),
                "tokens": len(answer),
                "finish_reason": "length" if len(answer) >= self._count else "stop",
            }
            for prompt, answer in zip(self._prompts, self.ids(weights), strict=True)
        ]


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids with the special tokens among them."""
    out, begin = "", 0
    for i, id in enumerate([*ids, -1]):
        if id in tokenizer.hidden or i == len(ids):
            out += tokenizer.decode(ids[begin:i], after=ids[:begin])
            out += tokenizer.hidden.get(id, "")
            begin = i + 1
    return out


def write(
    workdir: str, step: int, rows: Iterable[dict], say: Callable[[str], None]
) -> None:
    """Writes WORKDIR/answers/STEP.jsonl, in process 0; a disk that is full is said and stops nothing."""
    if jax.process_index() != 0:
        return
    path = os.path.join(workdir, FOLDER, f"{step}.jsonl")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            for row in rows:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(path + ".tmp", path)
    except OSError as e:
        say(f"{path} cannot be written ({e.strerror}): these answers are left out.")
