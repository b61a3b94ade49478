"""Tokenizer and chat templates against transformers' own."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tokenizers
import transformers

from deepseek_jax import hf
from deepseek_jax.errors import UserError

CHATML = """{%- if tools %}
<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{% for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role ' + message.role) }}
    {%- endif %}
    {%- if loop.first and message.role != 'system' %}{{ bos_token }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}<think>{{
        message.reasoning_content }}</think>{% endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}{{
            call.function.arguments | tojson(indent=1) }}{% if loop.index > 1 %}{%
            break %}{% endif %}{% endfor %}
    {%- endif %}
    {%- if message.content is defined %}{% generation %}{{
        message.content.strip() }}{% endgeneration %}{% endif %}
    {{- '<|im_end|>' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}"""

CHATS = [
    [{"role": "user", "content": " Hello, <b>world</b> & 你好! "}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "reasoning": "easy", "content": "2"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "w", "arguments": {"city": "Köln", "n": 1}},
                }
            ],
        },
        {"role": "tool", "content": "sunny <|im_end|>"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "w",
            "description": "a < b",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE with special tokens that puts bos in front of a text, truncating and padding
    as somebody left it."""
    out = tmp_path_factory.mktemp("tokenizer")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["hello world, be kind and sunny"] * 9, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    inner.enable_truncation(4)
    inner.enable_padding(length=4)
    inner.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "pad_token": "<pad>",
        "model_max_length": 1000000000000000019884624838656,
        "chat_template": CHATML,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    return out


def test_text(folder):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), hf.Chat(str(folder))
    for text in ("hello world", "", " a\n\nb  c", "<|im_start|>user", "你好 😀", "hello " * 50):
        assert ours.encode(text) == theirs(text, truncation=False, padding=False).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(
            ours.encode(text), skip_special_tokens=True
        )
    assert ours.stop_ids == {2, 3} and ours.special == {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
    }


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "options",
    [{}, {"tools": TOOLS}, {"enable_thinking": False}, {"add_generation_prompt": False}],
    ids=str,
)
def test_chats_render_as_transformers_renders_them(chat, options, folder):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), hf.Chat(str(folder))
    options = {"add_generation_prompt": True} | options
    text = theirs.apply_chat_template(chat, tokenize=False, **options)
    assert ours.render(chat, **options) == text
    assert ours.encode(chat, **options) == theirs.apply_chat_template(
        chat, return_dict=False, truncation=False, padding=False, **options
    )


def test_where_templates_come_from(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    user = [{"role": "user", "content": "x"}]

    def both(**options):
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), hf.Chat(str(tmp_path))
        text = ours.render(user, **options)
        assert text == theirs.apply_chat_template(
            user, tokenize=False, add_generation_prompt=True, **options
        )
        return text

    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}\n")
    assert both().startswith("file x")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(
        "tools {{ tools | length }}"
    )
    assert both(tools=TOOLS) == "tools 1" and both().startswith("file x")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].__class__.__mro__ }}{{ raise_exception(messages[0].__class__ | string) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ raise_exception('no system role') }}",
        "{{ messages[0].content + 1 }}",
        "{% if %}",
    ],
)
def test_a_hostile_or_broken_template_is_one_line(template, folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="the chat template of") as error:
        hf.Chat(str(tmp_path)).render([{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)


def test_folders_without(tmp_path, folder):
    with pytest.raises(UserError, match="tokenizer.json cannot be read .missing"):
        hf.Chat(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        hf.Chat(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="has no chat template"):
        hf.Chat(str(tmp_path)).render([])


@pytest.mark.parametrize(
    "options, line",
    [
        ({"chat_template": ["x"]}, "chat_template is a list"),
        (
            {"continue_final_message": "false"},
            "continue_final_message is 'false', and neither true nor false",
        ),
        ({"add_generation_prompt": 1}, "add_generation_prompt is 1, and neither"),
        ({"chat": 1}, "does not read 'chat'"),
        ({"self": 1}, "does not read 'self'"),
    ],
)
def test_options_of_a_wrong_type_or_name_are_one_line(options, line, folder):
    with pytest.raises(UserError, match=line):
        hf.Chat(str(folder)).encode([{"role": "user", "content": "x"}], **options)


FINAL = [{"role": "user", "content": "x"}, {"role": "assistant", "content": " I say "}]
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
TWO = [{"type": "text", "text": "I"}, {"type": "text", "text": " say"}]


@pytest.mark.parametrize("template", [CHATML, PLAIN, PARTS])
@pytest.mark.parametrize("chat", [FINAL, [FINAL[0], {"role": "assistant", "content": TWO}]])
def test_continue_final_message(template, chat, folder):
    """As transformers continues it, where the template reads what the message is made of; otherwise parts
    become one text."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), hf.Chat(str(folder))
    parts = isinstance(chat[1]["content"], list)
    if (template == PARTS) != parts:
        if not parts:  # a loop over a text's characters writes nothing
            with pytest.raises(UserError, match="does not write out the last message .assistant."):
                ours.render(chat, chat_template=template, continue_final_message=True)
            return
        chat = [chat[0], chat[1] | {"content": "I\n say"}]
    if template == PARTS:
        chat = [FINAL[0] | {"content": [{"type": "text", "text": "x"}]}, chat[1]]
    options = dict(chat_template=template, continue_final_message=True)
    text = theirs.apply_chat_template(chat, tokenize=False, **options)
    given = [chat[0], chat[1] | ({"content": TWO} if parts else {})]
    assert ours.render(given, **options) == text
    assert text.endswith("say") or text.endswith("say ")


def test_parts_documents_and_templates_by_text(folder):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), hf.Chat(str(folder))

    def rendered(chat, **options):
        return theirs.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **options
        )

    parts, one = [{"role": "user", "content": TWO}], [{"role": "user", "content": "I\n say"}]
    assert ours.render(parts, chat_template=PARTS) == rendered(parts, chat_template=PARTS)
    silent = "{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}"
    for template in (CHATML, "{{ messages[0].content }}", silent):
        assert ours.render(parts, chat_template=template) == rendered(one, chat_template=template)
    options = {
        "chat_template": "{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}",
        "documents": [{"title": "a", "text": "b"}],
    }
    assert ours.render(one, **options) == "a: b" == rendered(one, **options)
