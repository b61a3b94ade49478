"""Tokenizers with chat templates, random chats, and config.sft as the encoder reads it, for tests of what is
scored."""

import importlib.util
import json
import os
import pathlib
import random
import re
import types

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from deepseek_jax.data.chat import Chat
from deepseek_jax.data.scoring import ExampleEncoder

TEXT = ["hello world, the answer is 42\nand é 你好 ", "user assistant system tool <think>"] * 9
# What a template may write as one token.
TOKEN = re.compile(r"<[|｜][^\s<>'|｜]+[|｜]>|</?(?:think|start_of_turn|end_of_turn|s)>")
# {name: (what ends an answer, template)}: the same chat, unmarked and marked.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}OPEN{{ message.content + '<|im_end|>' }}CLOSE{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = PLAIN.replace("OPEN", "").replace("CLOSE", "")
MARKED = PLAIN.replace(
    "OPEN{{ message.content + '<|im_end|>' }}CLOSE",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}",
)


def options(**given):
    """config.sft."""
    defaults = {
        "format": "auto",
        "assistant_only_loss": "auto",
        "completion_only_loss": "auto",
        "train_on_header": False,
        "chat_template": "",
        "chat_template_kwargs": "",
        "system_prompt": "",
        "eos_token": "",
    }
    return types.SimpleNamespace(**(defaults | given))


def trl_templates():
    """The folder of chat templates that TRL ships. It takes seconds to import, and need not be for them."""
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("TRL is not installed")
    return pathlib.Path(found.origin).parent / "chat_templates"


def trl_template(name):
    """One of them."""
    return (trl_templates() / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(kind, special):
    """A small tokenizer: byte-level BPE as DeepSeek's, the same without spaces in offsets, or BPE on ▁ with
    bytes for what is unknown as Llama 2's."""
    if kind.startswith("bytes"):
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.post_processor = processors.ByteLevel(trim_offsets=kind == "bytes trimmed")
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = list("abcdefghijklmnopqrstuvwxyz▁<>|_/")
        special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *special]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 60,
        special_tokens=special,
        initial_alphabet=alphabet,
    )
    inner.train_from_iterator(TEXT, trainer)
    return inner


def make_folder(path, template, eos, kind="bytes", bos="<s>", add_bos=False, more=()):
    """A folder with a tokenizer, all special tokens of a template in it, and the template."""
    os.makedirs(path, exist_ok=True)
    special = sorted({bos, eos, "</s>", *more, *TOKEN.findall(template or "")})
    inner = make_tokenizer(kind, special)
    if add_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    inner.save(os.path.join(path, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        **({"chat_template": template} if template else {}),
    }
    pathlib.Path(path, "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


def encode(folder, rows, **given):
    """The examples of some rows."""
    return ExampleEncoder(options(**given), Chat(folder)).encode_batch(rows)


def scored_texts(folder, example):
    """The text of each run of scored tokens."""
    tokenizer, out, last = Chat(folder).tokenizer, [], -2
    for i, (token, yes) in enumerate(zip(example.ids, example.scored, strict=True)):
        if yes:
            out += [[]] if last < i - 1 else []
            out[-1].append(int(token))
            last = i
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in out]


PIECES = (
    "hello", " world", "é", "你好", " 👍🏽", "\n", "  ", "42", "\t", "<|im", "|>", " the", "answer", "<",
    "thin",
)  # fmt: skip


def random_text(rng):
    """Some words, not blank."""
    return "".join(rng.choices(PIECES, k=rng.randint(1, 6))) + rng.choice(["x", "é", " y"])


def random_chat(rng, system=True):
    """Messages that alternate, the last an answer."""
    chat = []
    if system and rng.random() < 0.5:
        chat.append({"role": "system", "content": random_text(rng)})
    for _ in range(rng.randint(1, 3)):
        chat.append({"role": "user", "content": random_text(rng)})
        chat.append({"role": "assistant", "content": random_text(rng)})
    return chat


def random_chats(seed, count, system=True):
    rng = random.Random(seed)
    return [random_chat(rng, system) for _ in range(count)]
