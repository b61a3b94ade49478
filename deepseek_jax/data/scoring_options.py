"""What of an example is scored, as config.sft says it."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from deepseek_jax.data.conversations import FORMATS, RESERVED
from deepseek_jax.errors import UserError

CHATS = ("messages", "conversations")
# Option -> the formats that it acts on.
ACTS_ON = {
    "assistant_only_loss": (*CHATS, "prompt_completion", "tokenized"),
    "completion_only_loss": ("prompt_completion", "instruction_output", "tokenized"),
    "chat_template": (*CHATS, "prompt_completion"),
    "chat_template_kwargs": (*CHATS, "prompt_completion"),
    "system_prompt": (*CHATS, "prompt_completion"),
    "train_on_header": (*CHATS, "prompt_completion"),
}


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


class Choices(NamedTuple):
    """config.sft, read.

    Attributes:
      assistant_only: whether only what the model says is scored; None: auto, in messages.
      completion_only: whether only the completion is; None: auto, where there is one.
      variables: chat_template_kwargs.
      The others: as the options of these names.
    """

    format: str
    assistant_only: bool | None
    completion_only: bool | None
    train_on_header: bool
    chat_template: str
    variables: Mapping[str, Any]
    system_prompt: str
    eos_token: str

    @classmethod
    def of(cls, options: Options) -> "Choices":
        """Raises UserError: an option is wrong by itself."""
        return cls(
            options.format,
            _choice(options.assistant_only_loss, "assistant_only_loss"),
            _choice(options.completion_only_loss, "completion_only_loss"),
            options.train_on_header,
            options.chat_template,
            _kwargs(options.chat_template_kwargs),
            options.system_prompt,
            options.eos_token,
        )

    def check(self, kind: str) -> None:
        """Raises UserError where an option that is set does not act on rows of a format."""
        given = self._of_messages() | {"completion_only_loss": self.completion_only is True}
        for option, value in given.items():
            if value and kind not in ACTS_ON[option]:
                raise UserError(
                    f"config.sft.{option} is set and acts on {', '.join(ACTS_ON[option])}; the rows are "
                    f"{kind}. Leave it out, or name the rows' format as config.sft.format."
                )

    def check_texts(self) -> None:
        """Raises UserError where an option that is set does not act on a prompt and completion as texts."""
        for option, value in self._of_messages().items():
            if value:
                raise UserError(
                    f"config.sft.{option} is set and acts on messages; this prompt and its completion are "
                    f"texts. Leave it out, or give both as lists of messages."
                )

    def _of_messages(self) -> dict[str, Any]:
        """The options that act on messages alone, by name: what is there is set."""
        return {
            "assistant_only_loss": self.assistant_only is True,
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.variables,
            "system_prompt": self.system_prompt,
            "train_on_header": self.train_on_header,
        }

    def by_turns(self, prompt: bool) -> bool:
        """Whether only what the model says is scored, in a chat with or without a prompt of its own."""
        return self.assistant_only is not False and (not prompt or self.assistant_only is True)

    def describe(self, kind: str, end: str) -> list[str]:
        """What is scored in a format, in lines for people.

        Args:
          end: what ends a text.
        """
        lines = [f"the examples have {' and '.join(FORMATS[kind])} (config.sft.format={kind})"]
        if kind == "text":
            return [*lines, f"every token is scored, with {end} at the end"]
        if kind == "tokenized":
            return [*lines, "tokens are scored by labels, completion_mask and assistant_masks"]
        if kind in CHATS:
            if not self.by_turns(prompt=False):
                return [*lines, "every token is scored, as by TRL's default"]
            header = "with" if self.train_on_header else "without"
            return [
                *lines,
                f"scored is what the assistant says, with its stop token and {header} its header",
                "TRL's default is every token: config.sft.assistant_only_loss=False",
            ]
        what = "completion" if kind == "prompt_completion" else "output"
        if self.completion_only is False:
            lines.append(f"every token is scored (TRL's default is the {what})")
        else:
            lines.append(
                f"the {what} is scored, with {end} or the stop token of its chat at the end"
                if kind == "prompt_completion"
                else f"the output is scored, with {end} at its end"
            )
        if self.assistant_only is True:
            lines.append("and of messages only what the assistant says")
        return lines


def _choice(value: Any, option: str) -> bool | None:
    """auto, true or false, in any case, or a bool; None: auto."""
    known = {"auto": None, "true": True, "false": False}
    word = str(value).lower()
    if word not in known:
        raise UserError(f"config.sft.{option}={value!r}: choose auto, true or false.")
    return known[word]


def _kwargs(text: str) -> Mapping[str, Any]:
    """config.sft.chat_template_kwargs."""
    why = ""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as e:
        value, why = None, f" ({str(e)[:100]})"
    if not isinstance(value, dict) or (taken := value.keys() & RESERVED):
        what = f"has {min(taken)!r}" if isinstance(value, dict) else f"is no JSON object{why}"
        raise UserError(
            f"config.sft.chat_template_kwargs={text!r} {what}. Give an object of the template's words, such "
            f'as {{"enable_thinking": false}}.'
        )
    return value
