"""Tokenizer and chat template of a Hugging Face checkpoint: `Chat(folder).encode(messages)`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data import hub_cache, template, template_program, tokenizer_folder
from deepseek_jax.data.messages import REASONING, Message
from deepseek_jax.data.tokenizer import decode_after
from deepseek_jax.errors import UserError

JINJA = "chat_template.jinja"


def end_ids(folder: str) -> frozenset[int]:
    """`eos_token_id` of a generation_config.json, or else of a config.json: one, several or none.

    Raises:
      UserError: one of them is damaged.
    """
    for file in ("generation_config.json", "config.json"):
        ids = tokenizer_folder.read_json(folder, file).get("eos_token_id")
        if found := frozenset(
            i
            for i in (ids if isinstance(ids, list) else [ids])
            if isinstance(i, int) and not isinstance(i, bool)
        ):
            return found
    return frozenset()


class Chat:
    """The tokenizer of a folder, text and chats.

    Attributes:
      tokenizer: of the `tokenizers` library, without truncation and padding, with all tokens that the
        folder's files name.
      identity: changes whenever ids could change.
      special: {"bos_token": "<s>", ...} as far as tokenizer_config.json, special_tokens_map.json say.
      stop_ids: tokens that end an answer: generation_config.json's, or else config.json's, and eos_token.
    """

    def __init__(self, folder: str, vocab_size: int | None = None):
        """
        Args:
          folder: as hf.load takes it.
          vocab_size: of the model, where it is known; padding tokens beyond it are left out.

        Raises:
          UserError: there is no tokenizer, or a file is damaged.
        """
        self.folder = folder = hub_cache.folder_of(folder)
        path = tokenizer_folder.find(folder) or os.path.join(folder, tokenizer_folder.JSON)
        try:
            self.tokenizer, self.identity, self.special, config = tokenizer_folder.read(
                path, vocab_size=vocab_size
            )
        except (OSError, ValueError) as e:
            what: object = e
            if isinstance(e, OSError):
                what = e.strerror if os.path.exists(path) else "missing"
            raise UserError(
                f"{path} cannot be read ({what}). Copy the tokenizer.json or tiktoken.model of the "
                f"checkpoint there, and "
                f"tokenizer_config.json."
            ) from None
        self._templates = self._read_templates(config)
        self._eos = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        self.stop_ids = end_ids(folder) | ({self._eos} if self._eos is not None else set())

    def encode(self, chat: str | Sequence[Message], /, **options: Any) -> list[int]:
        """Token ids: of a text as transformers' tokenizer has them (with bos where it adds one), or
        of a chat by `render`."""
        if not isinstance(chat, str):
            return self.tokenizer.encode(self.render(chat, **options), add_special_tokens=False).ids
        if options:
            raise UserError(
                f"{next(iter(options))} is for a chat template, and a text has none. Give messages, or "
                f"leave it out."
            )
        return self.tokenizer.encode(clean_text(chat), add_special_tokens=True).ids

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, after: Sequence[int] = ()
    ) -> str:
        """The text of some ids.

        Args:
          after: ids that stand before them. Tokenizers like Llama 2's leave out the space that begins a text:
            give an answer its prompt here.
        """
        return decode_after(
            lambda some: self.tokenizer.decode(some, skip_special_tokens=skip_special_tokens),
            list(ids),
            after,
        )

    def render(
        self,
        /,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """A chat as the text that the model was trained on.

        Args:
          messages: in order, with "role" and "content", a text or a list of {"type": "text", "text": "..."}.
          add_generation_prompt: end with what begins an answer; None: yes, unless continue_final_message.
          tools: JSON schemas of functions.
          chat_template: the name of one of several, or a template.
          documents: objects with "title" and "text", for templates that read some.
          continue_final_message: end within the last message, for an answer that goes on with it.
          variables: for the template, enable_thinking=False for instance.

        Raises:
          UserError: there is no (such) template, it refuses these messages, or it does not read what is
            given.
        """
        source, where = self.source(chat_template, tools is not None)
        if "template" in variables:
            raise UserError("template= is called chat_template= now.")
        return template.render(
            source,
            where,
            messages,
            self.special,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    def unread(self, messages: Sequence[Message], chat_template: str | None = None) -> set[str]:
        """Keys of messages that the template does not read: they have no effect."""
        source = (
            chat_template
            if chat_template is not None and chat_template not in self._templates
            else self.template(chat_template)
        )
        known = template_program.names_read(source, self.folder)[1]
        known |= {
            "role",
            "content",
            *(REASONING if known & set(REASONING) else ()),
        }
        return {
            str(k)
            for m in messages
            for k, v in m.items()
            if v not in (None, [], {}) and k not in known
        }

    def turn_end(self) -> str | None:
        """The token that the chat template writes after an answer, if it is none of `stop_ids`: a model that
        learnt it may go on and write the user's part too."""
        mark = "an answer"
        try:
            text = self.render(
                [{"role": "user", "content": "a question"}, {"role": "assistant", "content": mark}],
                add_generation_prompt=False,
            )
        except UserError:
            return None  # a template that wants more than this; what it writes then is not known
        ids = self.tokenizer.encode(
            text[text.rfind(mark) + len(mark) :] if mark in text else "", add_special_tokens=False
        ).ids
        added = self.tokenizer.get_added_tokens_decoder()
        first = next((i for i in ids if i in added), None)
        return None if first is None or self.stop_ids & set(ids) else added[first].content

    def source(
        self, chat_template: str | None, with_tools: bool, option: str = "chat_template"
    ) -> tuple[str, str]:
        """(a chat template, whose it is, for messages).

        Args:
          chat_template: the name of one of the folder's, or a template; None: the folder's, of several the
            one for tools if there are tools.
          option: what error messages call it. An option of a config may also be the path of a file or folder.

        Raises:
          UserError: there is none.
        """
        if not isinstance(chat_template, str | None):
            raise UserError(
                f"{option} is a {type(chat_template).__name__}, and neither a template nor the name of one."
            )
        if chat_template is None or chat_template in self._templates:
            for_tools = "tool_use" if with_tools and "tool_use" in self._templates else None
            return self.template(chat_template or for_tools), self.folder
        if "{" in chat_template:
            return clean_text(chat_template), option
        if not option.startswith("config."):
            return self.template(chat_template), self.folder
        path = os.path.expanduser(chat_template)
        folder, file = (path, JINJA) if os.path.isdir(path) else os.path.split(path)
        text = tokenizer_folder.read_text(folder, file)
        if text is None:
            raise UserError(
                f"{option}={chat_template!r} is no file, nor a folder with a {JINJA}. Give the path of one, "
                f"or a template."
            )
        return text, path

    def sources(self, chat_template: str | None) -> dict[str, str]:
        """All templates that `source` can give, by whether there are tools and for config.sft."""
        found = {}
        for tools in (False, True):
            try:
                found[str(tools)] = self.source(chat_template, tools, "config.sft.chat_template")[0]
            except UserError:
                pass
        return found

    def template(self, name: str | None = None) -> str:
        """A chat template's text: the default one, or one of several by name.

        Raises:
          UserError: there is no such template.
        """
        name = name or "default"
        if name not in self._templates:
            there = (
                f"templates {', '.join(self._templates)}" if self._templates else "no chat template"
            )
            raise UserError(
                f"{self.folder} has {there}, and not {name!r}. Prompt it with a text, or add "
                f"{JINJA}."
            )
        return self._templates[name]

    def _read_templates(self, config: dict[str, Any]) -> dict[str, str]:
        """By name: chat_template.jinja and additional_chat_templates/, else chat_template.json,
        else tokenizer_config.json."""
        out: dict[str, str] = {}
        if (text := tokenizer_folder.read_text(self.folder, JINJA)) is not None:
            out["default"] = text
        more = os.path.join(self.folder, "additional_chat_templates")
        for file in sorted(os.listdir(more)) if os.path.isdir(more) else ():
            if file.endswith(".jinja"):
                out[file.removesuffix(".jinja")] = (
                    tokenizer_folder.read_text(
                        self.folder, os.path.join("additional_chat_templates", file)
                    )
                    or ""
                )
        found = (
            out
            or tokenizer_folder.read_json(self.folder, "chat_template.json").get("chat_template")
            or config.get("chat_template")
            or {}
        )
        if isinstance(found, list):
            found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = {"default": found} if isinstance(found, str) else found
        if not isinstance(found, dict) or not all(
            isinstance(t, str) for pair in found.items() for t in pair
        ):
            raise UserError(
                f"{self.folder}: chat_template is neither a text nor texts by name. Correct "
                f"tokenizer_config.json."
            )
        return found
