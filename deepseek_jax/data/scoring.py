"""Rows of fine-tuning data to token ids and which of them are scored: `ExampleEncoder(config.sft, chat)
.encode_batch(rows)`.

A text or a rendered chat is encoded once, and what is scored is decided by its characters: a token with a
character of a scored region is scored. Neither a prompt's tokens counted by themselves nor ids of
prefixes are compared, which tokens that merge across a border, or templates that write a prefix differently,
would put out of step.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data import conversations
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.conversations import Conversation, Passage, Row, Tokens
from deepseek_jax.data.scoring_options import Choices, Options
from deepseek_jax.data.text_encoder import Placed, TextEncoder
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.turns import TurnFinder
from deepseek_jax.errors import UserError

CHATS = ("messages", "conversations")


class Encoded(NamedTuple):
    """An example.

    Attributes:
      ids: int32 [n].
      scored: bool [n], whether token i is a target, predicted at i - 1. Never the first: nothing predicts it.
      dropped_reasoning: messages whose reasoning the template left out.
      prompt_differs: whether a prompt's messages by themselves are not rendered as in the whole chat, so that
        inference gives the model another text than training did.
    """

    ids: np.ndarray
    scored: np.ndarray
    dropped_reasoning: int = 0
    prompt_differs: bool = False


class ExampleEncoder:
    """Encodes rows of one format.

    Attributes:
      format: of conversations.FORMATS; of the first row that was encoded where config.sft.format is auto, ""
        before. Whoever reads examples back that were encoded earlier sets it.
      identity: changes whenever ids or what is scored could change.
    """

    def __init__(self, options: Options, chat: Chat | Tokenizer, vocab_size: int | None = None):
        """
        Args:
          options: config.sft.
          chat: tokenizer and template of a folder, or a tokenizer alone, for texts.
          vocab_size: of the model, where it is known; tokenized rows are checked against it.

        Raises:
          UserError: an option is wrong by itself, or with this tokenizer.
        """
        self._chat = chat
        self._choices = Choices.of(options)
        self._encoder = TextEncoder(chat)
        self._vocab_size = vocab_size
        self._finders: dict[str, TurnFinder] = {}
        # what nothing reads, in the order in which it came
        self._columns: dict[str, None] = {}
        self._keys: dict[str, None] = {}
        self.format = "" if options.format == "auto" else options.format
        self._special = dict(chat.special) if isinstance(chat, Chat) else {}
        known = self._encoder.added
        eos = options.eos_token
        if eos and eos not in known:
            raise UserError(
                f"config.sft.eos_token={eos!r} is no token of the tokenizer. Give one that it has, or leave "
                f"the option out."
            )
        if isinstance(chat, Chat):
            self._end = eos or self._special.get("eos_token", "")
            self._end_id = chat.tokenizer.token_to_id(self._end)
            self._special |= {"eos_token": self._end} if self._end else {}
        else:
            self._end = eos or chat.hidden[chat.eos_id]
            self._end_id = known.get(self._end, chat.eos_id)
        self._output_end = self._end
        if not eos and conversations.INSTRUCTION_END in known:
            self._output_end = conversations.INSTRUCTION_END
        self.identity = self._identity()
        if self.format:
            self._choices.check(self.format)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the model's, config.sft.eos_token, and what ends an output of
        instruction_output, if the format is that or not known yet."""
        more = {self._end_id}
        if self.format in ("", "instruction_output"):
            more.add(self._encoder.added.get(self._output_end))
        return self._chat.stop_ids | {i for i in more if i is not None}

    def encode_batch(
        self, rows: Sequence[Row], names: Sequence[str] = (), arrow: bool = False
    ) -> list[Encoded]:
        """The examples of some rows; nothing is cut off.

        Args:
          rows: as JSON or a table has them.
          names: of the rows, for messages; else "row 1" and so on.
          arrow: they come from a table: see conversations.normalise.

        Raises:
          UserError: a row is not of the format, or cannot be encoded; names it.
        """
        names = names or [f"row {i}" for i in range(1, len(rows) + 1)]
        if not self.format and rows:
            self.format = conversations.find_format(rows[0], names[0])
            self._choices.check(self.format)
        kind = self.format
        reads = {*conversations.FORMATS.get(kind, ()), *conversations.ALSO_READ.get(kind, ())}
        plans = []
        for row, name in zip(rows, names, strict=True):
            self._columns |= dict.fromkeys(k for k in row if k not in reads and row[k] is not None)
            example = conversations.normalise(
                row, self.format, name, self._choices.system_prompt, arrow
            )
            try:
                plans.append(self._plan(example))
            except UserError as e:
                raise UserError(f"{name}: {e}") from e
        out: list[Encoded | None] = [p if isinstance(p, Encoded) else None for p in plans]
        for bounds in (False, True):
            some = [
                (i, p) for i, p in enumerate(plans) if isinstance(p, _Plan) and p.bounds == bounds
            ]
            placed = self._encoder.encode([p.text for _, p in some], bounds) if some else []
            for (i, plan), tokens in zip(some, placed, strict=True):
                out[i] = plan.encoded(tokens)
        return [e for e in out if e is not None]

    def describe(self) -> list[str]:
        """What is scored, in lines for people, and where TRL's default differs. Once the format is known."""
        if not self.format:
            return []
        end = self._output_end if self.format == "instruction_output" else self._end
        lines = self._choices.describe(self.format, end or "eos")
        for finder in self._finders.values():
            lines += finder.describe()
        for what, names in (
            ("nothing reads the columns", self._columns),
            ("the chat template does not read these keys of messages:", self._keys),
        ):
            if names:
                more = ", ..." if len(names) > 8 else ""
                lines.append(f"{what} {', '.join(str(n)[:40] for n in list(names)[:8])}{more}")
        return lines

    def _plan(self, example: Conversation | Passage | Tokens) -> "_Plan | Encoded":
        if isinstance(example, Tokens):
            return self._tokenized(example)
        if isinstance(example, Passage):
            return self._passage(example)
        return self._conversation(example)

    def _conversation(self, given: Conversation) -> "_Plan":
        chat = given._replace(variables={**self._choices.variables, **given.variables})
        finder = self._finder(chat)
        self._keys |= dict.fromkeys(sorted(finder.unread(chat.messages)))
        by_turns = self._choices.by_turns(chat.prompt is not None)
        turns = finder.find(chat, by_turns)
        whole = [(0, len(turns.text))]
        regions = turns.said if by_turns else whole
        within = turns.completion if self._choices.completion_only is not False else None
        return _Plan(
            turns.text,
            False,
            regions,
            within,
            turns.masked,
            dropped_reasoning=turns.dropped_reasoning,
            prompt_differs=turns.prompt_differs,
        )

    def _passage(self, passage: Passage) -> "_Plan":
        end, known = self._end, self._encoder.added
        if self.format == "prompt_completion":
            self._choices.check_texts()
        if self.format == "instruction_output":
            end = self._output_end
        if end not in known and self._end_id is None:
            raise UserError(
                "the tokenizer has no eos_token to end a text with. Give one as config.sft.eos_token."
            )
        prompt, text = clean_text(passage.prompt or ""), clean_text(passage.text)
        # As text where the tokenizer finds it in one, so that it is treated as there; else its id.
        spelt = end in known
        if spelt and not text.endswith(end):
            text += end
        text = prompt + text
        whole = passage.prompt is None or self._choices.completion_only is False
        region = (0 if whole else len(prompt), len(text) + 1)
        return _Plan(text, True, [region], append=None if spelt else self._end_id)

    def _tokenized(self, row: Tokens) -> Encoded:
        size = self._vocab_size or 1 << 31
        if (wrong := (row.ids < 0) | (row.ids >= size)).any():
            at = int(wrong.argmax())
            raise UserError(f"input_ids[{at}] is {row.ids[at]}, and the vocabulary has {size} ids.")
        scored = np.ones(len(row.ids), bool) if row.labels is None else row.labels.copy()
        for mask, choice, option, key in (
            (
                row.completion,
                self._choices.completion_only,
                "completion_only_loss",
                "completion_mask",
            ),
            (row.assistant, self._choices.assistant_only, "assistant_only_loss", "assistant_masks"),
        ):
            if mask is None and choice is True:
                raise UserError(f"config.sft.{option}=True needs {key} in a tokenized row.")
            if mask is not None and (choice or choice is None and row.labels is None):
                scored &= mask
        scored[0] = False
        return Encoded(row.ids, scored)

    def _finder(self, chat: Conversation) -> TurnFinder:
        if not isinstance(self._chat, Chat):
            raise UserError(
                f"messages need a chat template, and the tokenizer {self._chat.name!r} is of no checkpoint "
                f"with one. Begin from a model with config.init_from, give a folder with a tokenizer and its "
                f"chat template as config.data.tokenizer, or train on text or prompt and completion."
            )
        source, where = self._chat.source(
            self._choices.chat_template or None, chat.tools is not None, "config.sft.chat_template"
        )
        if source not in self._finders:
            known = self._encoder.added
            stops = [text for text, i in known.items() if i in self.stop_ids]
            self._finders[source] = TurnFinder(
                source, where, self._special, list(known), stops, self._choices.train_on_header
            )
        return self._finders[source]

    def _identity(self) -> str:
        what: list[Any] = [
            self._chat.identity if isinstance(self._chat, Chat) else self._chat.name,
            sorted(self._special.items()),
            [self._encoder.prefix, self._encoder.suffix, sorted(self._chat.stop_ids)],
            self._choices._replace(chat_template=""),
        ]
        if isinstance(self._chat, Chat):
            what.append(self._chat.sources(self._choices.chat_template or None))
        return "sha256:" + hashlib.sha256(json.dumps(what).encode()).hexdigest()


class _Plan(NamedTuple):
    """A text to be encoded, and what of it is scored.

    Attributes:
      bounds: whether bos, and what else the tokenizer has around a text, is added.
      regions: characters that are scored.
      within: but only those within this region; None: all of them.
      without: and none of these.
      append: an id to put at the end, which is scored.
    """

    text: str
    bounds: bool
    regions: Sequence[tuple[int, int]]
    within: tuple[int, int] | None = None
    without: Sequence[tuple[int, int]] = ()
    append: int | None = None
    dropped_reasoning: int = 0
    prompt_differs: bool = False

    def encoded(self, tokens: Placed) -> Encoded:
        scored = tokens.overlapping(self.regions)
        if self.within is not None:
            scored &= tokens.overlapping([self.within])
        if self.without:
            scored &= ~tokens.overlapping(self.without)
        ids = tokens.ids
        if self.append is not None and ids[-1:].tolist() != [self.append]:
            ids, scored = np.append(ids, np.int32(self.append)), np.append(scored, True)
        scored[:1] = False
        return Encoded(ids, scored, self.dropped_reasoning, self.prompt_differs)
