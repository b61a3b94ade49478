"""Tokenizer and chat template of a Hugging Face checkpoint: `Chat(folder).encode(messages)`.

Templates are programs of whoever made the checkpoint. They run in jinja2's sandbox, see plain data only, and render as in transformers'
`apply_chat_template`, whose environment this is: utils/chat_template_utils.py there.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from deepseek_jax.config import UserError

MAX_BYTES = 1 << 24  # of a template or a tokenizer_config.json
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; templates read the first, gpt-oss's the second

Message = Mapping[str, Any]  # {"role": "user", "content": "..."} and what else a template reads


def end_ids(config: dict[str, Any]) -> frozenset[int]:
    """`eos_token_id` of a config.json or generation_config.json: one, several or none."""
    ids = config.get("eos_token_id")
    return frozenset(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))


class Chat:
    """The tokenizer of a folder, text and chats.

    Attributes:
      tokenizer: of the `tokenizers` library, without truncation and padding.
      special: {"bos_token": "<s>", ...} as far as tokenizer_config.json, special_tokens_map.json say.
      stop_ids: tokens that end an answer: eos_token and generation_config.json's.
    """

    def __init__(self, folder: str):
        """Raises: UserError: there is no tokenizer.json, or a file is damaged."""
        self.folder = folder
        path = os.path.join(folder, "tokenizer.json")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as e:  # the library raises plain Exception
            what = "missing" if not os.path.exists(path) else " ".join(str(e).split())[:160]
            raise UserError(f"{path} cannot be read ({what}). Copy the tokenizer.json of the checkpoint there.") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = self._json("tokenizer_config.json")
        self.special = {name: text for name in SPECIAL if (text := _text(config.get(name, self._json("special_tokens_map.json").get(name))))}
        self._templates = self._read_templates(config)
        eos = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        self.stop_ids = end_ids(self._json("generation_config.json")) | ({eos} if eos is not None else set())

    def encode(self, chat: str | Sequence[Message], **options: Any) -> list[int]:
        """Token ids: of a text as transformers' tokenizer has them (with bos where it adds one), or of a chat by `render`."""
        if isinstance(chat, str):
            return self.tokenizer.encode(chat, add_special_tokens=True).ids
        return self.tokenizer.encode(self.render(chat, **options), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] | None = None,
               template: str | None = None, **variables: Any) -> str:
        """A chat as the text that the model was trained on.

        Args:
          messages: in order, with "role" and "content". add_generation_prompt: end with what begins an answer.
          tools: JSON schemas of functions. template: the name of one of several. variables: for the template, enable_thinking=False for instance.

        Raises:
          UserError: there is no (such) template, or it refuses these messages.
        """
        source = self.template(template or ("tool_use" if tools is not None and "tool_use" in self._templates else None))
        chat = [_with_reasoning({k: v for k, v in m.items() if v is not None}) for m in _plain(list(messages))]
        given = _plain({**self.special, **variables})
        try:
            return _environment().from_string(source).render(
                messages=chat, tools=_plain(tools), documents=None, add_generation_prompt=add_generation_prompt, **given)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError, ArithmeticError, RecursionError) as e:
            raise UserError(f"the chat template of {self.folder} refuses these messages ({' '.join(str(e).split())[:200]}). "
                            f"Give messages in the form that it was made for.") from e

    def template(self, name: str | None = None) -> str:
        """A chat template's text: the default one, or one of several by name.

        Raises:
          UserError: there is no such template.
        """
        name = name or "default"
        if name not in self._templates:
            there = f"templates {', '.join(self._templates)}" if self._templates else "no chat template"
            raise UserError(f"{self.folder} has {there}, and not {name!r}. Prompt it with a text, or add chat_template.jinja.")
        return self._templates[name]

    def _read_templates(self, config: dict[str, Any]) -> dict[str, str]:
        """By name: chat_template.jinja and additional_chat_templates/, else chat_template.json, else tokenizer_config.json."""
        out: dict[str, str] = {}
        if (text := self._read("chat_template.jinja")) is not None:
            out["default"] = text
        more = os.path.join(self.folder, "additional_chat_templates")
        for file in sorted(os.listdir(more)) if os.path.isdir(more) else ():
            if file.endswith(".jinja"):
                out[file.removesuffix(".jinja")] = self._read(os.path.join("additional_chat_templates", file)) or ""
        found = out or self._json("chat_template.json").get("chat_template") or config.get("chat_template") or {}
        if isinstance(found, list):
            found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = {"default": found} if isinstance(found, str) else found
        if not isinstance(found, dict) or not all(isinstance(t, str) for pair in found.items() for t in pair):
            raise UserError(f"{self.folder}: chat_template is neither a text nor texts by name. Correct tokenizer_config.json.")
        return found

    def _read(self, file: str) -> str | None:
        path = os.path.join(self.folder, file)
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path} cannot be read ({e}). Copy it again from where the checkpoint came from.") from e
        if len(text) > MAX_BYTES:
            raise UserError(f"{path} is longer than {MAX_BYTES} characters, which no such file is. Copy it again.")
        return text

    def _json(self, file: str) -> dict[str, Any]:
        try:
            value = json.loads(self._read(file) or "{}")  # not bounded_json: model_max_length has 31 digits in many
        except (ValueError, RecursionError) as e:
            raise UserError(f"{self.folder}/{file} is not JSON ({str(e)[:100]}). Copy it again from where the checkpoint came from.") from e
        return value if isinstance(value, dict) else {}


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the model said; rendering, it is what stands in it."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inner"), [], [], body).set_lineno(line)

    def _inner(self, caller):
        return caller()


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _plain(value: Any) -> Any:
    """A copy of JSON's types alone: the sandbox knows nothing of other objects' methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return str.__str__(value)
    return f"<{type(value).__name__}>"


def _text(token: Any) -> str | None:
    """A special token, as a text or as an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
