"""What a model in training answers to held-out prompts, and a sample of its text.

Answers are in WORKDIR/answers/STEP.jsonl, samples in WORKDIR/samples.jsonl.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.config.options import Config
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.token_marks import marked
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation import sample
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.inference.generation.programs import Programs
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.model.layout import ModelWeights, PlacedModel
from deepseek_jax.train.state import TrainState

FOLDER, SAMPLES = "answers", "samples.jsonl"  # in WORKDIR
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


def prompts_of_run(config: Config, data: Loader | ExampleLoader) -> list[Prompt]:
    """Those that config.sft.eval_prompts asks for.

    Raises:
      UserError: no held-out example has one.
    """
    count = config.sft.eval_prompts
    if not count:
        return []
    assert isinstance(data, ExampleLoader)  # the option is of fine-tuning
    longest = config.model.max_position_embeddings - 1
    out = prompts_of(data.eval_examples(100 * count), count, longest)
    if not out:
        raise UserError(
            f"config.sft.eval_prompts={count}, but the first held-out examples of config.data.path="
            f"{config.data.path!r} have no prompt: they are scored from their first token. Set "
            "config.sft.eval_prompts=0."
        )
    return out


class Answering:
    """Answers the same prompts at every evaluation, by the likeliest tokens.

    One process with the model on its devices has a cache, and for a while the weights once more in another
    form (on CPUs they are the same memory). Several processes, stages and weights in the host's memory
    compute every token from the whole text.

    Args:
      workdir: of the run.
      model: the model, laid out over the mesh.
      data: of the run.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        model: PlacedModel,
        mesh: jax.sharding.Mesh,
        data: Loader | ExampleLoader,
        prompts: Sequence[Prompt],
    ):
        assert isinstance(data, ExampleLoader)  # which has prompts
        self._workdir = workdir
        self._model = model
        self._mesh = mesh
        self._tokenizer = data.tokenizer
        self._stop = data.encoder.stop_ids
        self._prompts = prompts
        self._count = config.sft.eval_tokens
        self._longest = config.model.max_position_embeddings
        elsewhere = mesh.shape["stage"] > 1 or config.offload.parameters
        self._has_cache = jax.process_count() == 1 and not elsewhere
        self._programs: Programs | None = None  # of the first time
        vocab = data.tokenizer.vocab_size
        self._sampler = sample.Sampler(model, mesh, GREEDY, vocab)  # without a cache

    def write(self, step: int, weights: ModelWeights) -> None:
        """Writes WORKDIR/answers/STEP.jsonl. Every process calls it; a disk that is full stops nothing."""
        rows = [
            self._row(prompt, answer)
            for prompt, answer in zip(self._prompts, self.answers(weights), strict=True)
        ]
        if jax.process_index() != 0:
            return
        path = os.path.join(self._workdir, FOLDER, f"{step}.jsonl")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            os.replace(path + ".tmp", path)
        except OSError as e:
            print(
                f"{path} cannot be written ({e.strerror}): these answers are left out.",
                file=sys.stderr,
            )

    def answers(self, weights: ModelWeights) -> list[list[int]]:
        """Ids of the answers, without stop tokens."""
        prompts = [p.ids for p in self._prompts]
        if not self._has_cache:
            return [
                list(self._sampler.tokens(weights, p, self._count, self._stop)) for p in prompts
            ]
        bound = BoundModel(self._model, *weights, self._mesh)
        engine = Engine(bound, vocab=self._tokenizer.vocab_size, programs=self._programs)
        self._programs = engine.programs
        return engine.generate(prompts, self._count, GREEDY, self._stop)

    def _row(self, prompt: Prompt, answer: list[int]) -> dict[str, Any]:
        ids, nothing = np.array(prompt.ids), np.zeros(0, np.int32)
        room = min(self._count, self._longest - len(prompt.ids))
        spelled = marked(self._tokenizer, ids, np.ones(len(ids), bool), nothing)
        return {
            "prompt": "".join(text for text, _ in spelled),
            "answer": self._tokenizer.decode(answer, after=prompt.ids),
            "reference": self._tokenizer.decode(prompt.reference, after=prompt.ids),
            "tokens": len(answer),
            "finish_reason": "length" if len(answer) >= room else "stop",
        }


def sample_text(
    config: Config,
    model: PlacedModel,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    tokenizer: Tokenizer,
) -> str:
    """Text that a model writes after config.eval.sample_prompt; "" if none is asked for."""
    c = config.eval
    if not c.sample_prompt or not c.sample_tokens:
        return ""
    bound = BoundModel(model, *state.weights(), mesh)
    options = Sampling(temperature=0.7, top_p=0.95, seed=config.seed)
    return sample.sample(bound, tokenizer, c.sample_prompt, c.sample_tokens, options)


def keep_sample(workdir: str, step: int, text: str) -> None:
    """Adds a sample that was printed to WORKDIR/samples.jsonl, for the run's report; process 0 does. Samples
    of this step and later ones, of an earlier start, go. A disk that is full costs the sample."""
    if not text or jax.process_index() != 0:
        return
    path = os.path.join(workdir, SAMPLES)
    kept = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(path, encoding="utf-8") as f:
            kept = [line for line in f if json.loads(line)["step"] < step]
    with contextlib.suppress(OSError):
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines([*kept, json.dumps({"step": step, "text": clean_text(text)}) + "\n"])
        os.replace(path + ".tmp", path)
