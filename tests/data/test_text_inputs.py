"""What a user hands in as text, and what comes back: prompts, questions, messages, stop strings, answers. No
model: its answers are given."""

import json
import os
import random
import types

import numpy as np
import pytest
import tokenizers

from deepseek_jax import generate
from deepseek_jax.config.options import Config, DataConfig, ModelConfig
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.data.sources import open_corpora, split
from deepseek_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.inference import opener
from deepseek_jax.inference.evaluation import choices, perplexity
from deepseek_jax.inference.generation import sample
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.inference.generation.text import Stream
from tests.support import FILES

DATA = os.path.join(FILES, "tokens")
LLAMA, TOOLS, BOS = (os.path.join(DATA, name) for name in ("llama2-style", "tools", "deepseek-bos"))


@pytest.fixture
def command(monkeypatch, capsys):
    """generate's command with a model that answers with given ids, prompt by prompt; returns (exit code,
    stdout, stderr, prompts)."""

    def run(folder, answers, *argv):
        prompts = []

        class Engine:
            model = types.SimpleNamespace(max_position_embeddings=500)

            def batch(self, ids, max_tokens, options, stop_ids, indexes, stopped, draft_tokens):
                for index, prompt in zip(indexes, ids, strict=True):
                    prompts.append(prompt)
                    for id in answers[index]:
                        if index not in stopped:
                            yield types.SimpleNamespace(number=index, id=id)

        options = types.SimpleNamespace(
            max_position_embeddings=500, num_nextn_predict_layers=0, vocab_size=400
        )
        model = types.SimpleNamespace(
            config=options, source=folder, layout=None, mesh=None, params=None, bias=None
        )
        monkeypatch.setattr(
            generate, "open_model", lambda *_: opener.Opened(model, None, False, folder)
        )
        monkeypatch.setattr(generate, "Engine", lambda *_, **__: Engine())
        monkeypatch.setattr(generate.compile_cache, "use_cache", lambda *_, **__: "")
        code = generate.main([f"--model={folder}", *argv])
        return code, *capsys.readouterr(), prompts

    return run


def ids_of(folder, text):
    return Chat(folder).tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("folder", [LLAMA, TOOLS])
def test_pieces_are_what_the_library_decodes_after_the_prompt(folder):
    """Streams of many texts, special tokens between them, against decoding prompt and answer as a whole."""
    inner, encoder, rng = (
        tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json"),
        Encoder(Chat(folder), folder),
        random.Random(0),
    )
    for _ in range(200):
        text = "".join(
            rng.choices(["hello", " world", "é", "你好", " ", "\n", "the"], k=rng.randint(0, 4))
        )
        prompt = [*inner.encode(text).ids, *rng.choices([0, 1], k=rng.randint(0, 2))]
        text = "".join(
            rng.choices([" hello", "world ", " é", "😀", "  ", "\n", " the"], k=rng.randint(1, 6))
        )
        # With bytes missing, as a model may write them: not of Llama 2's, where a broken byte takes back
        # whole characters before it.
        answer = [
            i
            for i in inner.encode(text, add_special_tokens=False).ids
            if folder == LLAMA or rng.random() < 0.95
        ]
        answer.insert(rng.randint(0, len(answer)), rng.randint(0, 2))
        whole, before = inner.decode([*prompt, *answer]), inner.decode(prompt)
        stream = Stream(encoder, before=prompt)
        shown = "".join([*map(stream.add, answer), stream.end()])
        assert before + shown == whole and stream.text == shown == encoder.decode(
            answer, after=prompt
        )
        assert Chat(folder).decode(answer, after=prompt) == shown


def test_the_first_space_of_an_answer(command, tmp_path, monkeypatch):
    """On the screen, in a file, in a chat's history and in the sample after training."""
    answer = ids_of(LLAMA, "world hello")[0:]
    assert Chat(LLAMA).decode(answer) == "world hello"  # what an answer on its own lacks
    assert command(LLAMA, [answer], "--prompt=hello")[:2] == (0, "hello world hello\n")
    assert command(LLAMA, [answer], "--prompt=")[1] == "world hello\n"  # nothing stands before it
    (tmp_path / "p.txt").write_text("hello\n")
    assert (
        json.loads(command(LLAMA, [answer], f"--prompts={tmp_path / 'p.txt'}")[1])["text"]
        == " world hello"
    )
    monkeypatch.setattr(sample, "tokens", lambda *_: iter(answer))
    for tokenizer, wanted in (
        (load_tokenizer(f"{LLAMA}/tokenizer.json"), "hello world hello"),
        (ByteTokenizer(), "hello"),
    ):
        assert sample.sample(None, tokenizer, "hello", 9, Sampling()).startswith(wanted)
    tokenizer = load_tokenizer(f"{LLAMA}/tokenizer.json")
    ids = tokenizer.encode("hello world hello")
    for cut in range(len(ids) + 1):
        assert (
            tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:], after=ids[:cut])
            == "hello world hello"
        )


@pytest.mark.parametrize(
    "answer, stop, text",
    [
        ("hello<|im_end|> world", "<|im_end|>", "hello"),
        ("hello<|im_end|>\n<|im_start|>user", "<|im_end|>\n<|im_start|>", "hello"),
        ("<|im_start|>hello world", "<|im_end|>", "hello world"),
        ("hel<|im_start|>lo world", "hello", ""),  # in the text that is shown
        ("hello the<|im_start|>", "the<|im_end|>", "hello the"),
    ],
)
def test_stop_strings_of_special_tokens(answer, stop, text, command, tmp_path):
    base = tmp_path / "base"  # a base model: the end of a turn does not end its texts
    base.mkdir()
    (base / "tokenizer.json").write_bytes(open(f"{TOOLS}/tokenizer.json", "rb").read())
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "the"}\n')
    row = json.loads(
        command(
            str(base),
            [ids_of(TOOLS, answer)],
            f"--prompts={tmp_path / 'p.jsonl'}",
            f"--stop={stop}",
        )[1]
    )
    assert row["text"] == text and row["finish_reason"] == (
        "stop" if text != answer.replace("<|im_start|>", "") else "length"
    )


def test_a_stop_token_that_is_not_special_is_not_shown(tmp_path):
    tree = json.loads(open(f"{TOOLS}/tokenizer.json").read())
    for token in tree["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, true]}')
    encoder = Encoder(Chat(str(tmp_path)), "M")
    stream = Stream(encoder)
    assert (
        encoder.stop_ids == {2}
        and "".join(map(stream.add, [280, 1, 281, 2])) == "hello<|im_start|> world"
    )


def test_prompts_with_tools_and_variables(command, tmp_path):
    path = tmp_path / "q.jsonl"
    row = json.loads(open(f"{TOOLS}/questions.jsonl").read())
    user = {"role": "user", "content": "hello"}
    rows = [
        row,
        {
            "messages": [user, {"role": "assistant", "content": "the"}],
            "continue_final_message": True,
            "id": 7,
        },
        {
            "messages": [user | {"name": "Bob"}],
            "add_generation_prompt": False,
            "chat_template": "{{ messages[0].content }}!",
        },
    ]
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, out, err, prompts = command(TOOLS, [[280]] * 3, f"--prompts={path}")
    assert code == 0 and [
        Chat(TOOLS).tokenizer.decode(p, skip_special_tokens=False) for p in prompts
    ] == [
        "TOOLS:get_weather <|im_start|>user\nweather?<|im_end|>\n<|im_start|>assistant\n<think></think>",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe",
        "hello!",
    ]
    assert "nothing reads 'id'" in err and "does not read 'name' of messages" in err
    assert [json.loads(line).get("id") for line in out.splitlines()] == [None, 7, None]
    _, _, err, prompts = command(BOS, [[280]], "--prompt=hello")
    assert "begins with    <｜begin▁of▁sentence｜>" in err and prompts[0][0] == 0


CHAT = '"messages": [{"role": "user", "content": "x"}]'


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"prompt": "x", "tools": []}', "'tools', which acts on messages"),
        (
            '{"prompt": "x", "temperature": 0}',
            "'temperature', which is not read here. It is the same for all prompts: give --temperature.",
        ),
        ('{"prompt": "x", "text": "y"}', "'text', which the result has too"),
        (f'{{{CHAT}, "tool_choice": "none"}}', "'tool_choice', which is not read"),
        (f'{{{CHAT}, "prompt": "x"}}', 'both "prompt" and "messages"'),
        ('{"question": "x"}', 'neither "prompt" nor "messages"'),
        ('{"prompt": ["x"]}', "list and not a text"),
        ("[1]", "is a list and not an object"),
        ('{"prompt": "x", "score": NaN}', "NaN is not a number of JSON"),
        ("[" * 100000, "is not JSON"),
        (
            f'{{{CHAT}, "chat_template_kwargs": {{"messages": []}}}}',
            "chat_template_kwargs with 'messages'",
        ),
        (
            f'{{{CHAT}, "chat_template_kwargs": 1}}',
            "chat_template_kwargs that are int and no object",
        ),
        (f'{{{CHAT}, "chat_template_kwargs": {{"thinking": true}}}}', "does not read 'thinking'"),
        (f'{{{CHAT}, "documents": [{{"title": "a", "text": "b"}}]}}', "does not read 'documents'"),
        (
            f'{{{CHAT}, "continue_final_message": true, "add_generation_prompt": true}}',
            "Set one of them",
        ),
        ('{"messages": []}', "messages are an empty list"),
        ('{"messages": "hello"}', '"messages" that are a text and not a list'),
        ('{"messages": {"role": "user"}}', "messages are a dict and not a list"),
        ('{"messages": ["hello"]}', "messages[0] is a str and not an object"),
        ('{"messages": [{"content": "x"}]}', "messages[0] has no 'role'"),
        (
            '{"messages": [{"role": 1, "content": "x"}]}',
            "messages[0] has a 'role' that is not a text",
        ),
        ('{"messages": [{"role": "user", "content": null}]}', "messages[0] has no 'content'"),
        (
            '{"messages": [{"role": "user", "content": 3}]}',
            "messages[0] has a 'content' that is int",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}',
            "of the type 'image_url'",
        ),
    ],
)
def test_lines_that_are_no_prompt(line, named, command, tmp_path):
    """One line each, before anything is generated."""
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    code, out, err, prompts = command(TOOLS, [[280]] * 2, f"--prompts={path}")
    assert (
        code == 2
        and not prompts
        and not out
        and named in err
        and f"--prompts={path}: " in err
        and len(err.splitlines()) == 1
    )


def test_lone_surrogates(command, tmp_path, monkeypatch):
    """In prompts, options, messages and questions: U+FFFD, and every answer is written."""
    out = tmp_path / "answers.jsonl"
    assert (
        command(TOOLS, [[280]] * 3, f"--prompts={DATA}/surrogate/prompts.jsonl", f"--output={out}")[
            0
        ]
        == 0
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [r["prompt"] for r in rows] == ["ok", "cut emoji \ufffd", "last"] and all(
        r["text"] == "hello" for r in rows
    )
    assert command(TOOLS, [[280]], "--prompt=a\udcff", "--stop=\udcff")[:2] == (0, "a\ufffdhello\n")
    chat = Chat(TOOLS)
    assert (
        chat.render(
            [{"role": "user", "content": "a\ud83d", "b\udc00": ["\udc00"]}],
            enable_thinking="\udc00",
        ).count("\ufffd")
        == 1
    )
    assert (
        chat.encode("a\ud83d") == chat.encode("a\ufffd")
        and Encoder(chat, "M").encode_batch(["\ud83d"])[0][1] == 3
    )
    questions = choices.read_questions(f"{DATA}/surrogate/questions.jsonl")
    assert questions[0].prompt == "2 + 2 = \ufffd" and questions[1].choices == [" 4\ufffd", " 5"]
    model = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=100))
    opened = types.SimpleNamespace(model=model, encoder=lambda: Encoder(chat, "M"))
    monkeypatch.setattr(
        choices,
        "score_pairs",
        lambda model, pairs, *_, **__: [
            choices.Score(i, float(i), 1, False) for i in range(len(pairs))
        ],
    )
    result, details = choices.evaluate(opened, questions)
    assert result["acc"] == 1 and json.dumps(details, ensure_ascii=False).encode()


def test_bytes_of_held_out_text(tmp_path):
    """Of a tokenizer whose tokens' bytes are not known, piece by piece: all of the text but the first
    token's, of which nothing tells."""
    texts = [
        "hello world hello",
        "the world",
        "2 + 2 the",
    ] * 20  # every character a token at least: pieces end anywhere
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    run = Config(
        model=ModelConfig(vocab_size=400),
        data=DataConfig(
            path=str(tmp_path / "t.jsonl"), tokenizer=f"{LLAMA}/tokenizer.json", eval_fraction=0.5
        ),
    )

    class Scorer:
        width, vocab_size = 16, 400

        def __call__(self, spans):
            return [choices.Score(s.key, 1.0, int((s.targets >= 0).sum()), False) for s in spans]

    tokenizer = load_tokenizer(run.data.tokenizer)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(perplexity, "HELD_OUT_PIECE", 3)
        result = perplexity.of_held_out(
            types.SimpleNamespace(run=run, tokenizer="", contents=None), Scorer(), 16
        )
    documents = split(*open_corpora(run, tokenizer), 0.5)[1]
    texts = [
        tokenizer.decode(documents.tokens[a : a + n])
        for a, n in zip(documents.starts, documents.lengths, strict=True)
    ]
    first = [tokenizer.decode(documents.tokens[a : a + 1]) for a in documents.starts]
    assert result["documents"] == len(texts) > 5 and result["bytes"] == sum(
        len(t.encode()) for t in texts
    ) - sum(len(t.encode()) for t in first)


def test_keys_of_questions(tmp_path, capsys):
    row = {"prompt": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row | {"id": "a", "subject": "sums"}))
    assert choices.read_questions(str(path))[0].more == {"id": "a", "subject": "sums"}
    assert "nothing reads 'id', 'subject'" in capsys.readouterr().err
    for key, named in (
        ("tools", "'tools', which is not read here"),
        ("messages", "'messages'"),
        ("loglikelihoods", "which the result has too"),
    ):
        path.write_text(json.dumps(row | {key: []}))
        with pytest.raises(UserError, match=named):
            choices.read_questions(str(path))
    path.write_bytes(json.dumps(row).encode() + b'\n{"prompt": "\xff"}')
    with pytest.raises(UserError, match="line 2 is not UTF-8 at byte 12"):
        choices.read_questions(str(path))
    assert len(choices.read_questions(str(path), limit=1)) == 1


def weather(city: str):
    """Weather of a city."""


@pytest.mark.parametrize(
    "options, named",
    [
        (
            dict(tools=[weather]),
            r"tools\[0\] is a function, .* Give its JSON schema, as transformers.utils.get_json_schema",
        ),
        (dict(tools=["weather"]), r"tools\[0\] is a str and not an object"),
        (dict(tools={"a": 1}), "tools are a dict and not a list"),
        (dict(enable_thinking=np.zeros(2)), "enable_thinking is a ndarray"),
        (dict(tokenize=False), "does not read 'tokenize'"),
        (dict(template="default"), "called chat_template= now"),
        (dict(chat_template="rag"), "and not 'rag'"),
        (dict(chat_template="{% if %}"), "chat_template .*Expected an expression"),
    ],
)
def test_options_of_chats_that_cannot_act(options, named):
    with pytest.raises(UserError, match=named):
        Chat(TOOLS).render([{"role": "user", "content": "x"}], **options)


def test_a_turn_that_no_stop_token_ends(command, tmp_path):
    """A base model's eos ends a document; the template's turns end with another token, and that is said."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes(open(os.path.join(TOOLS, file), "rb").read())
    assert Chat(str(tmp_path)).turn_end() is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"eos_token": "<|endoftext|>"})
    )
    assert Chat(str(tmp_path)).turn_end() == "<|im_end|>"
    path = tmp_path / "q.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    assert (
        "--stop='<|im_end|>' makes it one"
        in command(str(tmp_path), [[280]], f"--prompts={path}")[2]
    )
    assert (
        "makes it one"
        not in command(str(tmp_path), [[280]], f"--prompts={path}", "--stop=<|im_end|>")[2]
    )


def test_a_text_has_no_chat_options():
    with pytest.raises(
        UserError, match="add_generation_prompt is for a chat template, and a text has none"
    ):
        Chat(TOOLS).encode("hello", add_generation_prompt=True)
