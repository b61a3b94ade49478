"""The tasks of EleutherAI's lm-evaluation-harness (pip install 'deepseek_jax[lm-eval]'):

  python -m deepseek_jax.hf.lm_eval run --model deepseek_jax --tasks arc_easy --batch_size auto \
      --model_args pretrained=DIR,dtype=bfloat16,fsdp=2

which is the harness's own command with one model more. In Python:
lm_eval.simple_evaluate(model=DeepseekJaxLM("DIR"), tasks=[...]). Tokens, context and truncation are those of
its model "hf", so that the numbers are those of transformers.
"""

import os
from typing import Any

from deepseek_jax.cli.progress import Bar
from deepseek_jax.errors import UserError
from deepseek_jax.inference.evaluation.choices import Pair, score_pairs
from deepseek_jax.inference.generation.text import Stream
from deepseek_jax.inference.opener import open_model, parse_mesh

try:
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as e:
    raise ImportError(
        f"lm-evaluation-harness cannot be imported ({e}). Install it: pip install 'deepseek_jax[lm-eval]'."
    ) from e

MAX_GEN_TOKS = 256  # the harness's default


@register_model("deepseek_jax")
class DeepseekJaxLM(TemplateLM):
    """A model for the harness.

    Args:
      pretrained: as open_model: a Hugging Face checkpoint, or the folder of a run or import.
      step: checkpoint of a run.
      dtype: of weights and computation.
      batch_size: sequences of a batch; "auto": about 4,096 tokens per device.
      max_length: tokens that the model reads at most (default: its max_position_embeddings).
      max_gen_toks: tokens of an answer at most.
      axes: sizes of mesh axes, fsdp=2 for instance.

    Raises:
      UserError: there is no model or tokenizer, or the mesh does not fit.
    """

    def __init__(
        self,
        pretrained: str,
        step: int | None = None,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        max_batch_size: int | None = None,
        device: str | None = None,
        **axes: int,
    ):
        super().__init__()
        del max_batch_size, device  # the harness's command gives them to every model
        mesh = parse_mesh(",".join(f"{a}={n}" for a, n in axes.items()), "model_args")
        opened = open_model(str(pretrained), step, dtype, mesh)
        self._model = opened.model
        self._encoder = opened.encoder()
        longest = self._model.config.max_position_embeddings
        if max_length is not None and not 1 <= int(max_length) <= longest:
            raise UserError(
                f"max_length={max_length} is not between 1 and the model's "
                f"max_position_embeddings={longest}. Choose one of these."
            )
        stated = None
        if batch_size is not None and not str(batch_size).startswith("auto"):
            stated = str(batch_size)
            if not (stated.isdigit() and int(stated)):
                raise UserError(
                    f"batch_size={batch_size} is neither auto nor a number of sequences."
                )
        self.batch_size = int(stated) if stated else None
        self.max_length = int(max_length or longest)
        self.max_gen_toks = int(max_gen_toks)
        self._name = str(pretrained)
        self._template: str | None = None

    @property
    def eot_token_id(self) -> int:
        return min(self._encoder.stop_ids, default=self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        if self._encoder.start_id is None:
            raise UserError(
                f"the tokenizer of {self._name} has no token that begins or ends a text. Name one in "
                f"tokenizer_config.json."
            )
        return self._encoder.start_id

    @property
    def tokenizer_name(self) -> str:
        return os.path.abspath(self._name).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template that chats are rendered by from now on, which the harness notes in its
        results."""
        self._template = chat_template if isinstance(chat_template, str) else None
        return self._encoder.chat.template(self._template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        # without: the answer has begun and goes on
        return self._encoder.chat.render(
            chat_history,
            add_generation_prompt,
            chat_template=self._template,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids = self._encoder.encode(string, prefix=add_special_tokens is None)
        return [*self._encoder.prefix, *ids] if add_special_tokens else ids

    def tok_decode(self, tokens: list[int] | int, skip_special_tokens: bool = True) -> str:
        return self._encoder.decode([tokens] if isinstance(tokens, int) else tokens)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [
            Pair(context or [self.prefix_token_id], continuation)
            for _, context, continuation in requests
        ]
        with Bar("loglikelihood requests", len(pairs), not disable_tqdm, unit="items") as bar:
            scores = score_pairs(
                self._model, pairs, self.batch_size, self.max_length, lambda _: bar.advance(1)
            )
        out = [(-s.nll, s.greedy) for s in scores]
        for (key, *_), answer in zip(requests, out, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return out

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        windows = [
            (i, *lm_eval.utils.make_disjoint_window(w))
            for i, request in enumerate(requests)
            for w in lm_eval.utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
        ]
        out = [0.0] * len(requests)
        for (i, *_), (ll, _) in zip(
            windows,
            self._loglikelihood_tokens([(None, *w[1:]) for w in windows], disable_tqdm),
            strict=True,
        ):
            out[i] += ll
        for request, ll in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, ll)
        return out

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        out: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        with Bar("generate_until requests", len(requests), not disable_tqdm, unit="items") as bar:
            for members in groups.values():
                members.sort(key=lambda i: -len(requests[i].args[0]))
                options = _options(requests[members[0]].args[1], self.max_gen_toks, self.max_length)
                size = self.batch_size or 16
                for at in range(0, len(members), size):
                    some = members[at : at + size]
                    answers = self._generate([requests[j].args[0] for j in some], **options)
                    for i, text in zip(some, answers, strict=True):
                        out[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.advance(len(some))
        return out

    def _generate(
        self, texts: list[str], until: list[str], max_gen_toks: int, temperature: float
    ) -> list[str]:
        room = self.max_length - max_gen_toks
        prompts = [(self.tok_encode(t) or [self.prefix_token_id])[-room:] for t in texts]
        answers: Any = self._model.generate(
            prompts,
            max_tokens=max_gen_toks,
            temperature=temperature,
            stop_ids=self._encoder.stop_ids,
            seed=0,
        )
        return [self._until(ids, until) for ids in answers]

    def _until(self, ids: list[int], until: list[str]) -> str:
        """The text of an answer up to the first of some others, special tokens among them; decoded on its
        own, as the model "hf" does."""
        stream = Stream(self._encoder, until)
        for id in ids:
            stream.add(id)
        stream.end()
        return stream.text


def _options(given: dict[str, Any], max_gen_toks: int, max_length: int) -> dict[str, Any]:
    """until, max_gen_toks and temperature of a request.

    Raises:
      UserError: it asks for what there is not, or for more tokens than the model reads.
    """
    options = dict(normalize_gen_kwargs(given, max_gen_toks))
    sampled = options.pop("do_sample", False)
    max_gen_toks = int(options.pop("max_gen_toks"))
    out = {
        "until": [u for u in options.pop("until", []) if u],
        "max_gen_toks": max_gen_toks,
        "temperature": float(options.pop("temperature", 0.0) or 0.0) if sampled else 0.0,
    }
    if sampled and (more := sorted(options)):
        raise UserError(
            f"gen_kwargs {more[0]}={options[more[0]]} is not known here. Leave it out, or give "
            f"do_sample=False."
        )
    if not 0 < max_gen_toks < max_length:
        raise UserError(
            f"max_gen_toks={max_gen_toks} leaves no room for a prompt in the model's {max_length} "
            f"tokens. Make it smaller."
        )
    return out
