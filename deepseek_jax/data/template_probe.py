"""What a chat template does, found by rendering chats of known words, once per template."""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data import template
from deepseek_jax.data.template_program import Rendered
from deepseek_jax.errors import UserError

# Words that no template writes by itself.
QUESTIONS = ("questionone", "questiontwo")
ANSWERS = ("answerone", "answertwo")
RESULT = "resultone"
OPENED = re.compile(r"<[^<>]*$")


class Probe:
    """Of one template.

    Args:
      source: of the template.
      where: whose it is, for messages.
      special: the tokenizer's special tokens by name.
    """

    def __init__(self, source: str, where: str, special: Mapping[str, str]):
        self._template = (source, where)
        self._special = special
        self.headers = functools.lru_cache(64)(self._headers)
        self.tells = functools.lru_cache(2)(self._tells)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], variables: str = "{}", begins: bool = False
    ) -> Rendered:
        return template.render_watched(
            *self._template,
            messages,
            self._special,
            add_generation_prompt=begins,
            **json.loads(variables),
        )

    def _headers(self, variables: str, after_tool: bool) -> list[str]:
        """What a turn can begin with of what a generation prompt ends with, the longest first.

        A generation prompt may say more than a turn begins with ("<think>" where the turn has no reasoning),
        so parts that turns of a probe begin with, up to their content, are headers too.

        Args:
          variables: for the template, an object in JSON; tools among them.
          after_tool: of a turn after a tool's result.
        """
        others = self.headers(variables, False) if after_tool else []
        chat = _chat(after_tool)
        try:
            whole = self._render(chat, variables)
            without = self._render(chat[:-1], variables).text
            prompt = self._render(chat[:-1], variables, begins=True)
        except UserError:
            return others
        header = prompt.text[prompt.owned[-1].end :] if prompt.owned else ""
        if not header:  # written with the last message, or at none
            header = prompt.text[len(_shared(prompt.text, without)) :]
        found = {header, *others}
        for span in whole.owned:
            turn = whole.text[span.start : span.end]
            at = min((at for word in ANSWERS if (at := turn.find(word)) >= 0), default=-1)
            if chat[span.owner]["role"] == "assistant" and at >= 0:
                found.add(_shared(header, turn[:at]))
        return sorted(found - {""}, key=len, reverse=True)

    def _tells(self, tool: bool) -> bool | None:
        """Whether a probe's answers, and nothing else of it, are where the template is at them; None: it
        refuses the probe. Of one that refuses a tool's result: by the other messages.

        Args:
          tool: with a tool's result.
        """
        chat = _chat(tool)
        try:
            rendered = self._render(chat)
        except UserError:
            return self.tells(False) if tool else None
        words = [(i, m["content"]) for i, m in enumerate(chat) if m["content"]]
        answers = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
        return all((word in rendered.of(i)) == (i == k) for i in answers for k, word in words)


def _shared(a: str, b: str) -> str:
    """What two texts begin with, without a part of a tag: <think> and </think> share a letter, which says
    nothing."""
    shared = os.path.commonprefix([a, b])
    return shared if shared in (a, b) else OPENED.sub("", shared)


def _chat(tool: bool) -> list[dict[str, Any]]:
    """Messages of which the last is an answer."""
    chat: list[dict[str, Any]] = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": answer})
    if not tool:
        return chat
    function = {"name": "lookup", "arguments": {"a": "b"}}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return [
        chat[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "lookup", "tool_call_id": "abcdefghi", "content": RESULT},
        chat[3],
    ]
