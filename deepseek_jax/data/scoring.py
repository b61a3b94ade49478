"""Rows of fine-tuning data to token ids and which of them are scored: `ExampleEncoder(config.sft, chat)
.encode_batch(rows)`.

A text or a rendered chat is encoded once, and what is scored is decided by its characters: a token with a
character of a scored region is scored. Neither a prompt's tokens counted by themselves nor ids of
prefixes are compared, which tokens that merge across a border, or templates that write a prefix differently,
would put out of step.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data import conversations
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.conversations import Conversation, Passage, Row, Tokens
from deepseek_jax.data.template_program import names_read
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


class Options(Protocol):
    """What is read of config.sft."""

    @property
    def format(self) -> str: ...
    @property
    def assistant_only_loss(self) -> Any: ...
    @property
    def completion_only_loss(self) -> Any: ...
    @property
    def train_on_header(self) -> bool: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def chat_template_kwargs(self) -> str: ...
    @property
    def system_prompt(self) -> str: ...
    @property
    def eos_token(self) -> str: ...


class ExampleEncoder:
    """Encodes rows of one format.

    Attributes:
      format: of conversations.FORMATS; of the first row that was encoded where config.sft.format is auto, ""
        before.
      stop_ids: tokens that end an answer: the model's, config.sft.eos_token, and what ends an output of
        instruction_output.
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
        self._options = options
        self._chat = chat
        self._encoder = TextEncoder(chat)
        self._vocab_size = vocab_size
        self.format = "" if options.format == "auto" else options.format
        self._assistant_only = _choice(options.assistant_only_loss, "assistant_only_loss")
        self._completion_only = _choice(options.completion_only_loss, "completion_only_loss")
        self._variables = _kwargs(options.chat_template_kwargs)
        self._special = dict(chat.special) if isinstance(chat, Chat) else {}
        ids = self._encoder.added()
        eos = options.eos_token
        if eos and eos not in ids:
            raise UserError(
                f"config.sft.eos_token={eos!r} is no token of the tokenizer. Give one that it has, or leave the "
                f"option out."
            )
        # The token that ends a text, as text where the tokenizer finds it in one, else by its id.
        named = self._special if isinstance(chat, Chat) else {"eos_token": chat.hidden[chat.eos_id]}
        self._eos = eos or named.get("eos_token", "")
        if self._eos:
            self._special["eos_token"] = self._eos
        own = chat.eos_id if isinstance(chat, Tokenizer) else None
        self._eos_id = ids.get(self._eos, own)
        if self._eos_id is None and isinstance(chat, Chat):
            self._eos_id = chat.tokenizer.token_to_id(self._eos)
        self._instruction_end = eos or (
            conversations.INSTRUCTION_END if conversations.INSTRUCTION_END in ids else self._eos
        )
        stops = set(chat.stop_ids)
        stops |= {i for i in (self._eos_id, ids.get(self._instruction_end)) if i is not None}
        self.stop_ids = frozenset(stops)
        self._finders: dict[str, TurnFinder] = {}
        self.identity = self._identity()
        if self.format:
            self._check_options()

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
            self._check_options()
        plans = []
        for row, name in zip(rows, names, strict=True):
            example = conversations.normalise(
                row, self.format, name, self._options.system_prompt, arrow
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
        lines = [f"{self.format} ({', '.join(conversations.FORMATS[self.format])})"]
        end = self._eos or "eos"
        if self.format == "tokenized":
            return [
                *lines,
                "scored are the tokens with labels, completion_mask and assistant_masks",
            ]
        if self.format == "text":
            return [*lines, f"every token is scored, {end} at the end too"]
        header = "with the header of each turn" if self._options.train_on_header else "no headers"
        if self.format in CHATS:
            if self._assistant_only is False:
                lines.append("every token is scored")
            else:
                lines.append(
                    f"assistant turns are scored with their stop token, {header} (TRL's default is every token: "
                    f"config.sft.assistant_only_loss=False)"
                )
        else:
            if self.format == "instruction_output":
                end = self._instruction_end or "eos"
            ending = "" if self.format == "prompt_completion" else f" with {end} at the end"
            lines.append(
                "every token is scored, prompts too (TRL's default is the completion)"
                if self._completion_only is False
                else f"the {'completion' if not ending else 'output'} is scored{ending}"
            )
        for finder in self._finders.values():
            how = "marks by {% generation %}" if finder.marked else "was watched for"
            lines.append(f"the chat template of {finder.where} {how} what the model says")
            if "strftime_now" in names_read(finder.source, finder.where)[0]:
                lines.append(
                    "this template may write the date of today: set what it reads instead, such as "
                    "date_string, in config.sft.chat_template_kwargs"
                )
        return lines

    def _plan(self, example: Conversation | Passage | Tokens) -> "_Plan | Encoded":
        if isinstance(example, Tokens):
            return self._tokenized(example)
        if isinstance(example, Passage):
            return self._passage(example)
        return self._conversation(example)

    def _conversation(self, given: Conversation) -> "_Plan":
        chat = given._replace(variables={**self._variables, **given.variables})
        finder = self._finder(chat)
        by_turns = self._assistant_only is not False and (
            chat.prompt is None or self._assistant_only is True
        )
        turns = finder.find(chat, by_turns)
        whole = [(0, len(turns.text))]
        regions = turns.said if by_turns else whole
        within = turns.completion if self._completion_only is not False else None
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
        end = self._instruction_end if self.format == "instruction_output" else self._eos
        written = end in self._encoder.added()
        text, begins = passage.text, clean_text(passage.prompt or "")
        if written and not text.endswith(end):
            text += end
        text = begins + clean_text(text)
        ids = self._encoder.added()
        append = None if written else self._eos_id
        if append is None and ids.get(end) is None:
            raise UserError(
                "the tokenizer has no eos_token to end a text with. Give one as config.sft.eos_token."
            )
        whole = passage.prompt is None or self._completion_only is False
        region = (0 if whole else len(begins), len(text) + 1)
        return _Plan(text, True, [region], None, [], append)

    def _tokenized(self, row: Tokens) -> Encoded:
        size = self._vocab_size or 1 << 31
        if (wrong := (row.ids < 0) | (row.ids >= size)).any():
            at = int(wrong.argmax())
            raise UserError(f"input_ids[{at}] is {row.ids[at]}, and the vocabulary has {size} ids.")
        scored = np.ones(len(row.ids), bool)
        for mask, choice, key in (
            (row.completion, self._completion_only, "completion_mask"),
            (row.assistant, self._assistant_only, "assistant_masks"),
        ):
            if mask is None and choice is True:
                option = key.split("_")[0] + "_only_loss"
                raise UserError(f"config.sft.{option}=True needs {key} in a tokenized row.")
            if mask is not None and choice is not False:
                scored &= mask
        if row.labels is not None:
            scored &= row.labels
        scored[0] = False
        return Encoded(row.ids, scored)

    def _finder(self, chat: Conversation) -> TurnFinder:
        if not isinstance(self._chat, Chat):
            raise UserError(
                f"messages need a chat template, and the tokenizer {self._chat.name!r} is not of a checkpoint with "
                f"one. Set config.init_from or config.data.tokenizer to a folder with a tokenizer and its chat "
                f"template, or train on text or prompt and completion."
            )
        source, where = self._chat.source(
            self._options.chat_template or None, chat.tools is not None, "config.sft.chat_template"
        )
        if source not in self._finders:
            added = self._encoder.added()
            stops = [text for text, i in added.items() if i in self.stop_ids]
            self._finders[source] = TurnFinder(
                source, where, self._special, stops, self._options.train_on_header
            )
        return self._finders[source]

    def _check_options(self) -> None:
        """Raises UserError where an option cannot act on the format."""
        wants = {
            "assistant_only_loss": (*CHATS, "prompt_completion", "tokenized"),
            "completion_only_loss": ("prompt_completion", "instruction_output", "tokenized"),
        }
        given = {
            "assistant_only_loss": self._assistant_only,
            "completion_only_loss": self._completion_only,
        }
        for option, formats in wants.items():
            if given[option] is True and self.format not in formats:
                raise UserError(
                    f"config.sft.{option}=True acts on {', '.join(formats)}, and the rows are "
                    f"{self.format}. Leave it at auto."
                )
        chats = (*CHATS, "prompt_completion")
        for option in ("chat_template", "chat_template_kwargs", "system_prompt"):
            if getattr(self._options, option) and self.format not in chats:
                raise UserError(
                    f"config.sft.{option} acts on chats, and the rows are {self.format}. Leave it out."
                )

    def _identity(self) -> str:
        what: list[Any] = [
            self._chat.identity if isinstance(self._chat, Chat) else self._chat.name,
            sorted(self._special.items()),
            self._encoder.prefix,
            self._encoder.suffix,
            sorted(self.stop_ids),
            [str(self._assistant_only), str(self._completion_only), self._variables],
            [self._options.format, self._options.train_on_header, self._options.system_prompt],
        ]
        if isinstance(self._chat, Chat):
            what.append(self._chat.sources(self._options.chat_template or None))
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
    within: tuple[int, int] | None
    without: Sequence[tuple[int, int]]
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


def _choice(value: Any, option: str) -> bool | None:
    """auto, true or false, in any case, or a bool; None: auto."""
    known = {"auto": None, "true": True, "false": False}
    word = str(value).lower()
    if word not in known:
        raise UserError(f"config.sft.{option}={value!r}: choose auto, true or false.")
    return known[word]


def _kwargs(text: str) -> Mapping[str, Any]:
    """config.sft.chat_template_kwargs."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"config.sft.chat_template_kwargs={text!r} is not JSON ({str(e)[:100]}). Give an object, such as "
            f'{{"enable_thinking": false}}.'
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"config.sft.chat_template_kwargs={text!r} is no object. Give one, such as "
            f'{{"enable_thinking": false}}.'
        )
    return value
