"""Which characters of a rendered chat the model says.

A template either marks them by {% generation %}, or is watched while it runs (template_program.run_watched):
what it writes at an assistant's message is that turn. Of both, what a generation prompt would have begun the
answer with, the header, is cut: at inference the model is given it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data import template, template_program
from deepseek_jax.data.conversations import Conversation
from deepseek_jax.data.messages import REASONING, Message, unwritten_call
from deepseek_jax.data.template_probe import Probe
from deepseek_jax.data.template_program import Rendered
from deepseek_jax.errors import UserError

REMEDY = (
    "Give a template that marks what the model says by {% generation %} ... {% endgeneration %} as "
    "config.sft.chat_template."
)
# Of messages that a template may write elsewhere than in its loop over them.
KNOWN_ROLES = ("system", "developer", "user", "tool")
Region = tuple[int, int]  # characters from, to


class Turns(NamedTuple):
    """Of one chat.

    Attributes:
      text: of the whole chat.
      said: what the model says and may be trained on, in order.
      completion: from where the completion goes on to the end of the text; None without a prompt.
      masked: what the template wrote at messages that are not to be trained.
      dropped_reasoning: messages whose reasoning the template left out.
      prompt_differs: whether the prompt by itself, with a generation prompt, is not how the text begins.
    """

    text: str
    said: list[Region]
    completion: Region | None
    masked: list[Region]
    dropped_reasoning: int
    prompt_differs: bool


class TurnFinder:
    """Finds them for the chats of one template."""

    def __init__(
        self,
        source: str,
        where: str,
        special: Mapping[str, str],
        added: Sequence[str],
        stops: Sequence[str],
        train_on_header: bool,
    ):
        """
        Args:
          source: of the template.
          where: whose it is, for messages.
          special: the tokenizer's special tokens by name.
          added: tokens that the tokenizer finds in a text before it is split.
          stops: those that end an answer. Templates like GLM's write them with the next message.

        Raises:
          UserError: it is no template, or marks what the model says where that cannot be told.
        """
        self.source = source
        self.where = where
        self.marked = template_program.marks(source, where)
        self._special = special
        self._added = tuple(a for a in added if a)
        self._stops = tuple(s for s in stops if s)
        self._train_on_header = train_on_header
        self._probe = Probe(source, where, special)

    def find(self, chat: Conversation, all_said: bool) -> Turns:
        """The turns of a chat.

        Args:
          all_said: every turn of the model is needed, so that one that cannot be found is an error.

        Raises:
          UserError: the template refuses the chat, or what the model says cannot be told.
        """
        rendered = self._render(chat.messages, chat)
        turns: dict[int, Region] = {}  # from the first to the last character of each
        for span in rendered.owned:
            start = turns.get(span.owner, span)[0]
            turns[span.owner] = (start, span.end)
        variables = json.dumps({"tools": chat.tools, **chat.variables}, sort_keys=True, default=str)
        headers = {}
        for i, message in enumerate(chat.messages):
            if message["role"] == "assistant" and i in turns:
                after_tool = i > 0 and chat.messages[i - 1]["role"] == "tool"
                headers[i] = self._body(rendered.text, turns[i], variables, after_tool)
        bodies = {i: (turns[i][0] if self._train_on_header else at) for i, at in headers.items()}
        self._check(rendered, chat, turns, all_said)
        if self.marked:
            said = self._said_by_marks(rendered, chat, bodies)
        else:
            said = [
                (start, self._end(rendered.text, *turns[i]))
                for i, start in bodies.items()
                if chat.trained[i]
            ]
        masked = [turns[i] for i, trained in enumerate(chat.trained) if not trained and i in turns]
        dropped = sum(
            _drops_reasoning(m, rendered.text[slice(*turns.get(i, (0, None)))])
            for i, m in enumerate(chat.messages)
            if m["role"] == "assistant"
        )
        completion, differs = None, False
        if chat.prompt is not None:
            completion, differs = self._completion(rendered.text, chat, turns, headers)
        said = [r for r in said if r[0] < r[1]]
        return Turns(rendered.text, said, completion, masked, dropped, differs)

    def unread(self, messages: Sequence[Message]) -> set[str]:
        """Keys of messages that the template does not read: they have no effect."""
        known = template_program.names_read(self.source, self.where)[1]
        reasoning = REASONING if known & set(REASONING) else ()
        keys = {key for m in messages for key, value in m.items() if value not in (None, [], {})}
        return keys - known - {"role", "content", *reasoning}

    def describe(self) -> list[str]:
        """How it is told what the model says, in lines for people."""
        how = "marks by {% generation %}" if self.marked else "is watched for"
        lines = [f"the chat template of {self.where} {how} what the assistant says"]
        if "strftime_now" in template_program.names_read(self.source, self.where)[0]:
            lines.append(
                "it may write the date of the day: config.sft.chat_template_kwargs fixes it, as in "
                '{"date_string": "26 Jul 2024"}'
            )
        return lines

    def _render(
        self, messages: Sequence[Message], chat: Conversation, begins: bool = False
    ) -> Rendered:
        return template.render_watched(
            self.source,
            self.where,
            messages,
            self._special,
            tools=chat.tools,
            add_generation_prompt=begins,
            **chat.variables,
        )

    def _said_by_marks(
        self, rendered: Rendered, chat: Conversation, bodies: Mapping[int, int]
    ) -> list[Region]:
        """Marked regions, without headers and messages that are not to be trained."""
        out = []
        for start, end, owner in rendered.marked:
            if owner < 0 and not all(chat.trained):
                raise UserError(
                    f"the chat template of {self.where} marks what the model says outside a loop over "
                    f"messages, so that it is not known which of them has the mask that a message has. Leave "
                    f"the mask out, or give another template as config.sft.chat_template."
                )
            if owner < 0 or chat.trained[owner]:
                out.append((max(start, bodies.get(owner, 0)) if owner >= 0 else start, end))
        return out

    def _end(self, text: str, start: int, end: int) -> int:
        """The end of a turn: after its stop token, without line breaks that only part it from the next."""
        written = start + len(text[start:end].rstrip())
        if text.endswith(self._added, start, written):
            return written
        following = next((s for s in self._stops if text.startswith(s, end)), None)
        return written if following is None else end + len(following)

    def _body(self, text: str, turn: Region, variables: str, after_tool: bool) -> int:
        """Where what the model says begins in a turn: after its header."""
        found = self._probe.headers(variables, after_tool)
        return turn[0] + next((len(h) for h in found if text.startswith(h, *turn)), 0)

    def _check(
        self, rendered: Rendered, chat: Conversation, turns: Mapping[int, Region], all_said: bool
    ) -> None:
        """Raises UserError unless every message is written out, and every answer, if it has to be told from
        the rest and is not marked, where its turn is found and without other messages in it."""
        watched = all_said and not self.marked
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            needed = watched or not chat.trained[i] and not (all_said and self.marked)
            if needed and not (i in turns and rendered.of(i).strip()):
                raise UserError(
                    f"the chat template of {self.where} does not show where it writes messages[{i}], an "
                    f"answer. {REMEDY}"
                )
            content, inside = message.get("content"), rendered.of(i)
            last = content.split("</think>")[-1].strip() if isinstance(content, str) else ""
            name = unwritten_call(message, inside)
            if name is not None or not self._writes(last, inside):
                what = "content" if name is None else f"call of {name!r}"
                raise UserError(
                    f"the chat template of {self.where} does not write the {what} of messages[{i}]. Give one "
                    f"that does as config.sft.chat_template."
                )
        with_tool = any(m["role"] == "tool" for m in chat.messages)
        if watched and self._probe.tells(with_tool) is False:
            raise UserError(
                f"the chat template of {self.where} writes other messages' contents where it is at an "
                f"answer, so that they cannot be told apart. {REMEDY}"
            )
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                self._check_written(rendered, i, message, turns)

    def _check_written(
        self, rendered: Rendered, i: int, message: Message, turns: Mapping[int, Region]
    ) -> None:
        """Raises UserError if the template leaves out a message that is no answer, as most do with a role
        that they do not know."""
        content, where = message.get("content"), turns.get(i)
        if not isinstance(content, str) or where and rendered.text[slice(*where)].strip():
            return
        known = message["role"] in KNOWN_ROLES or self._probe.tells(False) is not True
        written = (
            clean_text(content).strip() in rendered.text
        )  # before the loop over messages, perhaps
        if known and written:
            return
        raise UserError(
            f"the chat template of {self.where} does not write messages[{i}], whose role is "
            f"{message['role'][:40]!r}. Give it a role that the template knows, leave it out, or give "
            f"another template as config.sft.chat_template."
        )

    def _writes(self, content: str, inside: str) -> bool:
        """Whether a content is in what a template wrote, in some form: one that writes those of a probe as
        they are may change others, but not every word."""
        if content in inside:
            return True
        return self._probe.tells(False) is True and any(w in inside for w in content.split())

    def _completion(
        self,
        text: str,
        chat: Conversation,
        turns: Mapping[int, Region],
        bodies: Mapping[int, int],
    ) -> tuple[Region, bool]:
        """(From the completion to the end of the text; whether the prompt by itself is not its beginning.)

        The prompt is rendered for comparison alone; its tokens are those of the whole text.
        """
        assert chat.prompt is not None
        prompt = self._render(chat.messages[: chat.prompt], chat, begins=True).text
        common = len(os.path.commonprefix([prompt, text]))
        whole = common == len(prompt)
        begins = turns.get(chat.prompt, (common, 0))[0]
        start = common if whole else bodies.get(chat.prompt, begins)
        return (begins if self._train_on_header else start, len(text)), not whole


def _drops_reasoning(message: Message, written: str) -> bool:
    """Whether an answer's reasoning is not in what the template wrote."""
    content = message.get("content")
    reasoning = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
    if reasoning is None and isinstance(content, str) and "</think>" in content:
        reasoning = content.split("</think>")[0].split("<think>")[-1]
    kept = (reasoning or "").strip()
    return bool(kept) and kept not in written
