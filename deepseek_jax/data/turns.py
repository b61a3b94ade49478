"""Which characters of a rendered chat the model says.

A template either marks them by {% generation %}, or is watched while it runs (template_program.run_watched):
what it writes at an assistant's message is that turn. Of both, what a generation prompt would have begun the
answer with, the header, is cut: at inference the model is given it.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.data import template, template_program
from deepseek_jax.data.conversations import Conversation
from deepseek_jax.data.messages import REASONING, Message
from deepseek_jax.data.template_program import Rendered
from deepseek_jax.errors import UserError

REMEDY = (
    "Give a template that marks what the model says by {% generation %} ... {% endgeneration %} as "
    "config.sft.chat_template."
)
# Words that no template writes by itself.
QUESTION, ANSWER = ("questionone", "questiontwo"), ("answerone", "answertwo")

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
        stops: Sequence[str],
        train_on_header: bool,
    ):
        """
        Args:
          source: of the template.
          where: whose it is, for messages.
          special: the tokenizer's special tokens by name.
          stops: tokens that end an answer. Templates like GLM's write them with the next message.

        Raises:
          UserError: it is no template, or marks what the model says where that cannot be told.
        """
        self.source = source
        self.where = where
        self.marked = template_program.marks(source, where)
        self._special = special
        self._stops = tuple(s for s in stops if s)
        self._train_on_header = train_on_header
        self._headers = functools.lru_cache(64)(self._find_headers)
        self._tells = functools.lru_cache(64)(self._answers_are_found)

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
        variables = json.dumps([chat.tools, chat.variables], sort_keys=True, default=str)
        headers = {}
        for i, message in enumerate(chat.messages):
            if message["role"] == "assistant" and i in turns:
                after_tool = i > 0 and chat.messages[i - 1]["role"] == "tool"
                headers[i] = self._body(rendered.text, turns[i], variables, after_tool)
        bodies = {i: (turns[i][0] if self._train_on_header else at) for i, at in headers.items()}
        if self.marked:
            said = self._said_by_marks(rendered, chat, bodies)
        else:
            if all_said:
                self._check(rendered, chat, turns, variables)
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
                    f"the chat template of {self.where} marks what the model says outside a loop over messages, "
                    f"so that which message it belongs to is not known, and one of them is not to be trained. "
                    f"Leave out the mask, or give another config.sft.chat_template."
                )
            if owner < 0 or chat.trained[owner]:
                out.append((max(start, bodies.get(owner, 0)) if owner >= 0 else start, end))
        return out

    def _end(self, text: str, start: int, end: int) -> int:
        """The end of a turn: after its stop token, without line breaks that only part it from the next."""
        written = start + len(text[start:end].rstrip())
        if text.endswith(self._stops, start, written):
            return written
        following = next((s for s in self._stops if text.startswith(s, end)), None)
        return written if following is None else end + len(following)

    def _body(self, text: str, turn: Region, variables: str, after_tool: bool) -> int:
        """Where what the model says begins in a turn: after its header."""
        found = self._headers(variables, after_tool)
        return turn[0] + next((len(h) for h in found if text.startswith(h, *turn)), 0)

    def _find_headers(self, variables: str, after_tool: bool) -> list[str]:
        """What a turn can begin with of what a generation prompt ends with, the longest first.

        A generation prompt may say more than a turn begins with ("<think>" where the turn has no reasoning),
        so parts that turns of a probe begin with, up to their content, are headers too.
        """
        tools, given = json.loads(variables)
        probe = _probe(after_tool)

        def rendered(messages, begins=False):
            chat = Conversation(messages, [True] * len(messages), None, tools, given)
            return self._render(messages, chat, begins)

        try:
            whole, prompt = rendered(probe), rendered(probe[:-1], begins=True)
        except UserError:
            return self._headers(variables, False) if after_tool else []
        if not prompt.owned:
            return []
        header = prompt.text[prompt.owned[-1].end :]
        found = {header}
        for span in whole.owned:
            turn = whole.text[span.start : span.end]
            at = min((at for word in ANSWER if (at := turn.find(word)) >= 0), default=-1)
            if probe[span.owner]["role"] == "assistant" and at >= 0:
                found.add(os.path.commonprefix([header, turn[:at]]))
        if after_tool:
            found |= set(self._headers(variables, False))
        return sorted(found - {""}, key=len, reverse=True)

    def _check(
        self,
        rendered: Rendered,
        chat: Conversation,
        turns: Mapping[int, Region],
        variables: str,
    ) -> None:
        """Raises UserError unless every turn of the model is found with its content in it."""
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant" or not chat.trained[i]:
                continue
            content = message.get("content")
            last = content.split("</think>")[-1].strip() if isinstance(content, str) else ""
            inside = rendered.text[slice(*turns[i])] if i in turns else ""
            if not inside.strip() or last not in inside and not self._tells(variables):
                raise UserError(
                    f"the chat template of {self.where} does not show where it writes message {i + 1}, an answer. "
                    f"{REMEDY}"
                )

    def _answers_are_found(self, variables: str) -> bool:
        """Whether a probe's answers, and nothing else of it, are where they are looked for."""
        tools, given = json.loads(variables)
        probe = _probe(False)
        chat = Conversation(probe, [True] * len(probe), None, tools, given)
        try:
            rendered = self._render(probe, chat)
        except UserError:
            return False
        written = {i: "" for i in range(len(probe))}
        for start, end, owner in rendered.owned:
            written[owner] += rendered.text[start:end]
        words = [m["content"] for m in probe]
        return all((word in written[i]) == (i == k) for i in (1, 3) for k, word in enumerate(words))

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


def _probe(after_tool: bool) -> list[dict[str, Any]]:
    """A chat whose contents are known words; its last message is an answer."""
    chat: list[dict[str, Any]] = []
    for question, answer in zip(QUESTION, ANSWER, strict=True):
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": answer})
    if not after_tool:
        return chat
    function = {"name": "f", "arguments": {"a": "b"}}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return [
        chat[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "result"},
        chat[3],
    ]


def _drops_reasoning(message: Message, written: str) -> bool:
    """Whether an answer's reasoning is not in what the template wrote."""
    content = message.get("content")
    reasoning = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
    if reasoning is None and isinstance(content, str) and "</think>" in content:
        reasoning = content.split("</think>")[0].split("<think>")[-1]
    return bool(reasoning and reasoning.strip()) and reasoning.strip() not in written
