"""What of a chat, a prompt with its completion and a text is scored, against transformers' masks and against
what the texts say. The numbers of bugs are those of the table in docs/finetuning.md."""

import json
import random

import numpy as np
import pytest
import transformers

from deepseek_jax.data.chat import Chat
from deepseek_jax.data.scoring import ExampleEncoder
from deepseek_jax.data.template import render, render_watched
from deepseek_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from deepseek_jax.errors import UserError
from tests.support import chats

KINDS = ("bytes", "bytes trimmed", "metaspace")
EOS = "<|im_end|>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(template, kind) -> a folder, made once."""
    made = {}

    def folder(template, kind="bytes", eos=EOS, **more):
        key = (template, kind, eos, str(more))
        if key not in made:
            path = tmp_path_factory.mktemp("tokenizer")
            made[key] = chats.make_folder(path, template, eos, kind, **more)
        return made[key]

    return folder


def messages(*contents, **last):
    """A chat of user and assistant in turn."""
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    chat[-1] |= last
    return chat


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [chats.CHATML, chats.MARKED], ids=["watched", "marked"])
def test_bug_8_masks_of_any_tokenizer(template, kind, folders):
    """Characters of several tokens and tokens of several characters, spaces outside of offsets, merges
    towards a border: transformers' mask of the marked template, for this and for the unmarked one."""
    folder = folders(template, kind)
    theirs = transformers.AutoTokenizer.from_pretrained(folders(chats.MARKED, kind))
    rows = chats.random_chats(0, 60)
    for chat, ours in zip(rows, chats.encode(folder, [{"messages": c} for c in rows]), strict=True):
        reference = theirs.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ours.ids.tolist() == reference["input_ids"]
        assert ours.scored.tolist() == [bool(m) for m in reference["assistant_masks"]]


VERBATIM = {  # stock templates without marks that write a content as it is or stripped: what ends an answer
    "qwen2_5": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "llama3": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
}


@pytest.mark.parametrize("name", VERBATIM)
def test_bug_9_stock_templates_have_no_marks(name, folders):
    """Where others' masks are all zero: scored are the answers, each with its stop token, to the letter."""
    folder = folders(chats.trl_template(name), eos=VERBATIM[name])
    rows = chats.random_chats(1, 40, system=name != "gemma3")
    encoded = chats.encode(folder, [{"messages": c} for c in rows])
    for chat, example in zip(rows, encoded, strict=True):
        stripped = name in ("llama3", "gemma3", "cohere")
        answers = [m["content"] for m in chat if m["role"] == "assistant"]
        expected = [(a.strip() if stripped else a) + VERBATIM[name] for a in answers]
        assert chats.scored_texts(folder, example) == expected


def test_bug_9_a_template_that_cannot_be_watched_is_refused(folders):
    """It joins all messages first; it copies them; it writes two in one pass."""
    joined = "{% set t = messages | map(attribute='content') | join('|') %}{{ t }}"
    copied = "{% for m in messages %}{% set n = dict(m) %}{% endfor %}{{ messages[1].content }}"
    both = "{{ m.content + loop.nextitem.content }}"
    pairs = "{% for m in messages %}{% if loop.first %}" + both + "{% endif %}{% endfor %}"
    for template in (joined, copied, pairs):
        with pytest.raises(UserError, match=r"row 1.*\{% generation %\}.*config.sft.chat_template"):
            chats.encode(folders(template), [{"messages": messages("q", "a")}])


def test_bug_9_marks_whose_place_is_unknown_are_refused(folders):
    """transformers takes the place where a macro is called for the place of what it marks."""
    template = (
        "{% macro say(m) %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    with pytest.raises(UserError, match="macro.*config.sft.chat_template"):
        chats.encode(folders(template), [{"messages": messages("q", "a")}])


def test_lookahead_and_inner_loops_do_not_move_a_turn(folders):
    """A loop that asks for its next item has that item in hand before it is its turn."""
    template = (
        "{% for m in messages[:1] %}{{ '[' + m.content + ']' }}{% endfor %}"
        "{% for m in messages %}{% if loop.index0 == 0 %}{% continue %}{% endif %}"
        "{% for n in messages %}{% if n.content == 'x' %}{% break %}{% endif %}{% endfor %}"
        "{{ '<|im_start|>' + m.role + ':' }}{% for i in range(2) %}{{ i }}{% endfor %}{{ m.content }}"
        "{% if not loop.last %}{{ EOS + loop.nextitem.role }}{% endif %}"
        "{% if loop.previtem %}{{ loop.previtem.role }}{% endif %}{{ EOS }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    ).replace("EOS", "'<|im_end|>'")
    folder = folders(template)
    chat = messages("one", "two", "three", "four")
    (example,) = chats.encode(folder, [{"messages": chat}])
    said = ["01two<|im_end|>useruser<|im_end|>", "01four" + "user<|im_end|>"]
    assert chats.scored_texts(folder, example) == said
    filtered = (
        "{{ messages[0].content }}{% for m in messages if m.role != 'system' %}{{ m.content + EOS }}"
        "{% if loop.nextitem %}{{ loop.nextitem.role }}{% endif %}{% endfor %}"
    ).replace("EOS", "'<|im_end|>'")
    chat.insert(0, {"role": "system", "content": "no"})
    (example,) = chats.encode(folders(filtered), [{"messages": chat}])
    assert chats.scored_texts(folders(filtered), example) == ["two<|im_end|>user", "four<|im_end|>"]


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "qwen3_5_think_training", "deepseekv3_training"]
)
def test_bug_10_what_a_generation_prompt_says_is_not_trained(name, kwargs, folders):
    """The text up to an answer's first scored token is the prompt with the generation prompt, what the model
    is given at inference, as far as the answer begins with that."""
    if name == "deepseekv3_training" and kwargs:
        return  # it reads no such word
    folder = folders(chats.trl_template(name))
    chat = messages("question", "<think>\nso\n</think>\n\nanswer")
    example = chats.encode(folder, [{"messages": chat, "chat_template_kwargs": kwargs}])[0]
    first = int(example.scored.argmax())
    before = Chat(folder).decode(example.ids[:first].tolist(), skip_special_tokens=False)
    prompt = Chat(folder).render(chat[:1], **kwargs)
    if (
        name == "deepseekv3_training"
    ):  # its generation prompt has a <think> that it cuts from answers
        prompt = prompt.removesuffix("<think>\n")
    if name == "qwen3_5_think" and kwargs or name == "qwen3" and kwargs:
        prompt = prompt.removesuffix("<think>\n\n</think>\n\n")  # and here there is reasoning
    if name == "qwen3_5_think_training" and kwargs:
        prompt = prompt.removesuffix("<think>\n\n</think>\n\n") + "<think>\n"
        before += "<think>\n" if not before.endswith("<think>\n") else ""
    assert before == prompt
    (with_header,) = chats.encode(
        folder, [{"messages": chat, "chat_template_kwargs": kwargs}], train_on_header=True
    )
    assert (with_header.scored >= example.scored).all()


def test_a_content_is_not_taken_for_the_header(folders):
    """The generation prompt ends in <think>; an answer that begins with "<thin" keeps these letters."""
    folder = folders(chats.trl_template("deepseekv3"), eos="<｜end▁of▁sentence｜>")
    chat = messages("q", "<thin air>")
    for row in ({"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}):
        (example,) = chats.encode(folder, [row])
        assert chats.scored_texts(folder, example) == ["<thin air><｜end▁of▁sentence｜>"]


TURN = "{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}"
BEGIN = "{{ '<|im_start|>assistant:' }}"
PLACES = {  # where a template writes what a generation prompt says
    "after the loop": "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}" + BEGIN + "{% endif %}",
    "within the last message": "{% for m in messages %}" + TURN +
    "{% if loop.last and add_generation_prompt %}" + BEGIN + "{% endif %}{% endfor %}",
    "with each question": "{% for m in messages %}{% if m.role == 'user' %}" + TURN + BEGIN +
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}",
    "instead of eos": "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}" + BEGIN + "{% else %}{{ '<|im_end|>' }}{% endif %}",
    "with more than a turn has": "{% for m in messages %}{% if m.role == 'user' %}" + TURN + "{% else %}"
    + BEGIN + "{{ '</think>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + BEGIN + "{{ '<think>' }}{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_headers_wherever_a_template_writes_them(place, folders):
    folder = folders(PLACES[place])
    (example,) = chats.encode(folder, [{"messages": messages("q", "one", "r", "two")}])
    more = (
        "</think>" if place.startswith("with more") else ""
    )  # the model says it: it was asked with <think>
    assert chats.scored_texts(folder, example) == [f"{more}{a}<|im_end|>" for a in ("one", "two")]


def test_bug_11_a_prompt_that_is_no_prefix_is_counted(folders):
    """The completion is what the template wrote at its messages, and the row says that inference differs."""
    folder = folders(chats.trl_template("deepseekv3"), eos="<｜end▁of▁sentence｜>")
    chat = messages("q", "answer")
    (example,) = chats.encode(folder, [{"prompt": chat[:1], "completion": chat[1:]}])
    assert example.prompt_differs
    folder = folders(chats.CHATML)
    (example,) = chats.encode(folder, [{"prompt": chat[:1], "completion": chat[1:]}])
    assert not example.prompt_differs
    assert chats.scored_texts(folder, example) == ["answer<|im_end|>\n"]


def test_bug_12_reasoning_that_the_template_drops(folders):
    """Ids and mask come from one text; messages whose reasoning is not in it are counted."""
    thought = "<think>\nfirst\n</think>\n\none", "<think>\nsecond\n</think>\n\ntwo"
    chat = messages("q", thought[0], "r", thought[1])
    split = [dict(m) for m in chat]
    for m, reasoning, content in ((split[1], "first", "one"), (split[3], "second", "two")):
        m |= {"reasoning_content": reasoning, "content": content}
    expected = {
        "deepseekv3": (2, ["\n\none", "\n\ntwo"]),
        "deepseek_r1_distill_training": (0, ["first\n</think>\n\none", "second\n</think>\n\ntwo"]),
        "qwen3": (1, ["one", thought[1]]),
        "qwen3_training": (0, list(thought)),
        "qwen2_5": (0, list(thought)),
    }
    for name, (dropped, said) in expected.items():
        end = "<｜end▁of▁sentence｜>" if name.startswith("deepseek") else EOS
        folder = folders(chats.trl_template(name), eos=end)
        (example,) = chats.encode(folder, [{"messages": chat}])
        assert example.dropped_reasoning == dropped
        texts = [t.removesuffix("\n") for t in chats.scored_texts(folder, example)]
        assert texts == [s + end for s in said]
    folder = folders(chats.trl_template("qwen2_5"))  # does not read reasoning_content
    assert chats.encode(folder, [{"messages": split}])[0].dropped_reasoning == 2


def test_bug_13_a_whole_example_has_no_generation_prompt(folders):
    folder = folders(chats.CHATML)
    chat = messages("q", "a")
    for row in ({"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}):
        (example,) = chats.encode(folder, [row])
        text = Chat(folder).decode(example.ids.tolist(), skip_special_tokens=False)
        assert text == Chat(folder).render(chat, add_generation_prompt=False)


def test_bug_14_bos_once(folders):
    """The template writes bos, the tokenizer adds one to texts, and a text may spell one already."""
    folder = folders(chats.CHATML, add_bos=True)
    chat = messages("q", "a")
    bos = Chat(folder).tokenizer.token_to_id("<s>")
    rendered = Chat(folder).render(chat, add_generation_prompt=False)
    for row in (
        {"messages": chat},
        {"prompt": chat[:1], "completion": chat[1:]},
        {"text": rendered},
        {"text": "plain"},
        {"prompt": "<s>a", "completion": "b"},
        {"instruction": "a", "output": "b"},
    ):
        (example,) = chats.encode(folder, [row])
        assert example.ids[0] == bos and (example.ids == bos).sum() == 1
        assert not example.scored[0]  # nothing predicts it


def test_bug_17_merges_across_the_border(folders):
    """hello| world and wor|ld: the token that both share is scored, its neighbours are where they are. The
    tokens of the prompt by itself would have put the border elsewhere."""
    folder = folders(chats.CHATML, "bytes trimmed")
    tokenizer = Chat(folder).tokenizer
    for prompt, completion in (
        ("hello", " world"),
        ("hello wor", "ld"),
        ("the answ", "er is"),
        ("a ", "b"),
    ):
        (example,) = chats.encode(folder, [{"prompt": prompt, "completion": completion}])
        whole = tokenizer.encode(prompt + completion + EOS, add_special_tokens=False)
        assert example.ids.tolist() == whole.ids
        # Of each token by itself: how many characters stand before it.
        lengths = np.cumsum([0] + [len(tokenizer.decode([i])) or 10 for i in whole.ids])
        assert example.scored.tolist() == [bool(end > len(prompt)) for end in lengths[1:]]


@pytest.mark.parametrize("spelling", ["mask", "weight"])
def test_a_masked_answer_is_not_trained(spelling, folders):
    """DeepSeek's mask (ESFT's data) and OpenAI's weight, in marked and unmarked templates, however scored."""
    no = {"mask": 1} if spelling == "mask" else {"weight": 0}
    chat = messages(
        "q", "first", "r", "second", **({"mask": 0} if spelling == "mask" else {"weight": 1})
    )
    chat[1] |= no
    for template in (chats.CHATML, chats.MARKED):
        folder = folders(template)
        (example,) = chats.encode(folder, [{"messages": chat}])
        assert chats.scored_texts(folder, example) == ["second<|im_end|>"]
        (example,) = chats.encode(folder, [{"messages": chat}], assistant_only_loss=False)
        text = "".join(chats.scored_texts(folder, example))
        assert "first" not in text and "second" in text and "q" in text
    with pytest.raises(UserError, match="row 1.*mask=3"):
        chats.encode(folder, [{"messages": messages("q", "a", mask=3)}])


def call(**arguments):
    function = {"name": "lookup", "arguments": arguments}
    return [{"id": "abcdefghi", "type": "function", "function": function}]


def test_tool_calls_in_the_spelling_that_a_template_takes(folders):
    """DeepSeek-V3's puts texts together, DeepSeek-R1's writes calls only without content, Qwen's makes JSON
    of objects: the call is written once, in JSON, and scored."""
    for name in ("deepseekv3", "deepseek_r1_distill", "qwen2_5", "qwen3", "glm4moe", "gptoss"):
        folder = folders(
            chats.trl_template(name), eos="<｜end▁of▁sentence｜>" if "deep" in name else EOS
        )
        for arguments in ({"a": "b"}, '{"a": "b"}'):
            if name == "glm4moe" and isinstance(arguments, str):
                continue  # it walks through an object
            for content in ("", None):
                calls = [
                    {"type": "function", "function": {"name": "lookup", "arguments": arguments}}
                ]
                chat = messages("q", content, tool_calls=calls)
                if content is None:
                    del chat[1]["content"]
                (example,) = chats.encode(folder, [{"messages": chat}])
                text = "".join(chats.scored_texts(folder, example))
                assert "lookup" in text and text.count("b") >= 1 and '\\"' not in text


def test_a_template_that_refuses_the_probe_is_judged_by_the_row(folders):
    """It asks for a system message, and changes contents: "a" is "A" then, which is not what was given."""
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    loop = "{% for m in messages %}{{ m.role + ':' + CONTENT + '<|im_end|>' }}{% endfor %}"
    chat = [{"role": "system", "content": "s"}, *messages("q", "answer")]
    folder = folders(wants + loop.replace("CONTENT", "m.content"))
    (example,) = chats.encode(folder, [{"messages": chat}])
    assert chats.scored_texts(folder, example) == ["assistant:answer<|im_end|>"]
    with pytest.raises(UserError, match="does not write the content of messages"):
        chats.encode(
            folders(wants + loop.replace("CONTENT", "m.content | upper")), [{"messages": chat}]
        )


def test_no_tool_calls_are_no_key(folders):
    """DeepSeek-V3's template asks whether there is the key, and then leaves the content out."""
    folder = folders(chats.trl_template("deepseekv3"), eos="<｜end▁of▁sentence｜>")
    for calls in ([], None):
        (example,) = chats.encode(folder, [{"messages": messages("q", "a", tool_calls=calls)}])
        assert chats.scored_texts(folder, example) == ["a<｜end▁of▁sentence｜>"]


def test_an_answer_that_is_not_written_is_refused(folders):
    """Llama 3's template knows no tool calls: the model would learn to say nothing. idefics' wants parts."""
    chat = messages("q", "", tool_calls=call(a="b"))
    with pytest.raises(UserError, match="row 1.*does not write the call of 'lookup'"):
        chats.encode(folders(chats.trl_template("llama3"), eos="<|eot_id|>"), [{"messages": chat}])
    for name in ("idefics3", "idefics3_training"):
        with pytest.raises(UserError, match="row 1.*does not write the content"):
            chats.encode(folders(chats.trl_template(name)), [{"messages": messages("q", "answer")}])


def test_a_message_that_is_not_written_is_refused(folders):
    """Most templates pass over a role that they do not know, with all that it says."""
    known = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.role + m.content + '</s>' }}"
        "{% endif %}{% endfor %}"
    )
    folder = folders(known)
    for role in ("ipython", "system"):
        rows = [{"messages": [{"role": role, "content": "4 8 15"}, *messages("q", "a")]}]
        with pytest.raises(UserError, match=f"row 1.*does not write messages.0., .*'{role}'"):
            chats.encode(folder, rows)
    before = "{{ messages[0].content if messages[0].role == 'system' }}" + known
    chats.encode(folders(before), rows)


def test_a_tool_result_in_a_turn_is_refused_unless_marked(folders):
    """Gemma 4's template writes the result within the turn that called."""
    chat = [
        *messages("q", "", tool_calls=call(a="b")),
        {"role": "tool", "name": "lookup", "tool_call_id": "abcdefghi", "content": "sunny"},
        {"role": "assistant", "content": "good"},
    ]
    with pytest.raises(UserError, match="cannot be told apart"):
        chats.encode(folders(chats.trl_template("gemma4")), [{"messages": chat}])
    folder = folders(chats.trl_template("gptoss"))
    (example,) = chats.encode(folder, [{"messages": chat}])
    text = "".join(chats.scored_texts(folder, example))
    assert "sunny" not in text and "good" in text and "lookup" in text


def test_a_stop_token_that_comes_with_the_next_message(folders):
    """GLM's answers end with the role of the next one."""
    folder = folders(chats.trl_template("glm4moe"), eos="<|user|>")
    (example,) = chats.encode(folder, [{"messages": messages("q", "one", "r", "two")}])
    said = ["\n<think></think>\none<|user|>", "\n<think></think>\ntwo"]
    assert chats.scored_texts(folder, example) == said


def test_stop_tokens_are_eos_and_the_one_that_is_named(folders):
    """A base model's eos is another than the template's, which config.sft.eos_token names."""
    folder = folders(chats.CHATML, eos="</s>")
    chat, rows = Chat(folder), [{"messages": messages("q", "a")}]
    encoder = ExampleEncoder(chats.options(), chat)
    encoder.encode_batch(rows)
    assert encoder.stop_ids == {chat.tokenizer.token_to_id("</s>")}
    encoder = ExampleEncoder(chats.options(eos_token="<|im_end|>"), chat)
    (example,) = encoder.encode_batch(rows)
    assert encoder.stop_ids == {chat.tokenizer.token_to_id(t) for t in ("</s>", "<|im_end|>")}
    assert encoder.stop_ids & set(example.ids[example.scored].tolist())
    with pytest.raises(UserError, match="config.sft.eos_token='<|none|>'"):
        ExampleEncoder(chats.options(eos_token="<|none|>"), chat)


def test_options_of_the_template(folders, tmp_path):
    """config.sft.chat_template as text, file and folder, its words, the row's before them, a system
    prompt."""
    folder = folders(None, more=("<|im_start|>", "<|im_end|>"))
    rows = [{"messages": messages("q", "a")}]
    with pytest.raises(UserError, match="no chat template"):
        chats.encode(folder, rows)
    (tmp_path / "chat_template.jinja").write_text(chats.MARKED)
    for given in (chats.CHATML, str(tmp_path / "chat_template.jinja"), str(tmp_path)):
        (example,) = chats.encode(folder, rows, chat_template=given, system_prompt="Be kind.")
        assert chats.scored_texts(folder, example) == ["a<|im_end|>"]
        text = Chat(folder).decode(example.ids.tolist(), skip_special_tokens=False)
        assert text.startswith("<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq")
    with pytest.raises(UserError, match="config.sft.chat_template='nowhere'"):
        chats.encode(folder, rows, chat_template="nowhere")
    template = chats.CHATML + "{{ word }}"
    for row, word in (({}, "one"), ({"chat_template_kwargs": {"word": "two"}}, "two")):
        given = {"chat_template": template, "chat_template_kwargs": '{"word": "one"}'}
        (example,) = chats.encode(folder, [rows[0] | row], **given)
        assert Chat(folder).decode(example.ids.tolist()).endswith(word)
    with pytest.raises(UserError, match="does not read 'other'"):
        chats.encode(folder, rows, chat_template=template, chat_template_kwargs='{"other": 1}')


def test_texts_and_tokens(folders):
    """Without a template: eos once, headers of instructions, ids as given, masks by their options."""
    folder = folders(None, more=("<|EOT|>",))
    tokenizer = Chat(folder).tokenizer
    ends = {tokenizer.token_to_id(t) for t in (EOS, "<|EOT|>")}
    for kind, stops in (
        ("auto", ends),
        ("instruction_output", ends),
        ("text", {tokenizer.token_to_id(EOS)}),
    ):
        assert ExampleEncoder(chats.options(format=kind), Chat(folder)).stop_ids == stops
    for text in ("hello", "hello" + EOS):
        (example,) = chats.encode(folder, [{"text": text}])
        assert example.ids.tolist() == tokenizer.encode("hello" + EOS).ids
        assert example.scored.tolist() == [False] + [True] * (len(example.ids) - 1)
    (example,) = chats.encode(
        folder, [{"instruction": " do {x} ", "output": "ok", "input": "on y"}]
    )
    assert chats.scored_texts(folder, example) == ["ok\n<|EOT|>"]
    text = tokenizer.decode(example.ids.tolist(), skip_special_tokens=False)
    assert text.endswith("### Instruction:\ndo {x}\n### Input:\non y\n### Response:\nok\n<|EOT|>")
    row = {
        "input_ids": [5, 6, 7, 8],
        "completion_mask": [0, 1, 1, 1],
        "assistant_masks": [1, 1, 0, 1],
    }
    for given, expected in (
        ({}, [0, 1, 0, 1]),
        ({"completion_only_loss": "False"}, [0, 1, 0, 1]),
        ({"assistant_only_loss": False}, [0, 1, 1, 1]),
    ):
        (example,) = chats.encode(folder, [row], **given)
        assert example.ids.tolist() == row["input_ids"] and example.scored.tolist() == [
            bool(e) for e in expected
        ]
    (example,) = chats.encode(folder, [row | {"labels": [-100, -100, 7, 8]}])
    assert example.scored.tolist() == [False, False, True, True]


@pytest.mark.parametrize("made", ["bytes", "file"])
def test_tokenizers_without_a_template(made, folders):
    """The byte tokenizer, and a tokenizer.json by itself: texts as everywhere, chats refused."""
    folder = folders(chats.CHATML)
    tokenizer = ByteTokenizer() if made == "bytes" else load_tokenizer(f"{folder}/tokenizer.json")
    encoder = ExampleEncoder(chats.options(), tokenizer)
    (example,) = encoder.encode_batch([{"prompt": "é 你:", "completion": "好!"}])
    assert tokenizer.decode(example.ids) == "é 你:好!"
    assert tokenizer.decode(example.ids[example.scored]) == "好!"
    assert example.ids[-1] in encoder.stop_ids and example.scored[-1]
    with pytest.raises(
        UserError, match="row 1: messages need a chat template.*config.data.tokenizer"
    ):
        ExampleEncoder(chats.options(), tokenizer).encode_batch([{"messages": messages("q", "a")}])


def test_options_that_cannot_act_are_refused(folders):
    folder = folders(chats.CHATML)
    text, chat = {"text": "a"}, {"messages": messages("q", "a")}
    passage = {"prompt": "a", "completion": "b"}
    for row, given, name in (
        (text, {"assistant_only_loss": True}, "assistant_only_loss"),
        (text, {"system_prompt": "x"}, "system_prompt"),
        (text, {"train_on_header": True}, "train_on_header"),
        (chat, {"completion_only_loss": "true"}, "completion_only_loss"),
        (chat, {"completion_only_loss": "maybe"}, "completion_only_loss='maybe'"),
        (chat, {"chat_template_kwargs": "[1]"}, "chat_template_kwargs"),
        (chat, {"chat_template_kwargs": '{"tools": []}'}, "chat_template_kwargs.*has 'tools'"),
        ({"input_ids": [1]}, {"assistant_only_loss": True}, "assistant_only_loss"),
        (passage, {"assistant_only_loss": True}, "assistant_only_loss .* are texts"),
        (passage, {"chat_template": chats.CHATML}, "chat_template .* are texts"),
    ):
        with pytest.raises(UserError, match=f"config.sft.{name}"):
            chats.encode(folder, [row], **given)


def test_what_is_said_and_what_identifies_it(folders):
    folder = folders(chats.CHATML)

    def encoder(**given):
        out = ExampleEncoder(chats.options(**given), Chat(folder))
        out.encode_batch([{"messages": messages("q", "a")}])
        return out

    said = "\n".join(encoder().describe())
    assert "messages" in said and "TRL's default" in said and "is watched" in said
    same = [encoder().identity for _ in range(2)]
    others = [
        encoder(assistant_only_loss="False").identity,
        encoder(chat_template=chats.MARKED).identity,
        encoder(system_prompt="x").identity,
    ]
    assert len(set(same)) == 1 and len({*same, *others}) == 4


def test_what_nothing_reads_is_named(folders):
    encoder = ExampleEncoder(chats.options(), Chat(folders(chats.CHATML)))
    chat = [{"role": "user", "content": "q", "name": "Ann", "id": None}, *messages("a", "b")[1:]]
    encoder.encode_batch([{"messages": chat, "source": "web", "tools": None, "score": None}])
    assert encoder.describe()[-2:] == [
        "nothing reads the columns source",
        "the chat template does not read these keys of messages: name",
    ]
    padded = {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}
    with pytest.raises(UserError, match="row 1 has an attention_mask with 0"):
        ExampleEncoder(chats.options(), Chat(folders(chats.CHATML))).encode_batch([padded])
    assert ExampleEncoder(chats.options(), Chat(folders(chats.CHATML))).encode_batch([]) == []


def test_a_batch_is_its_rows(folders):
    """Rows of a batch do not depend on each other, and errors name the row."""
    folder = folders(chats.CHATML)
    rows = [{"messages": c} for c in chats.random_chats(2, 20)]
    random.Random(0).shuffle(rows)
    encoder = ExampleEncoder(chats.options(), Chat(folder))
    together = encoder.encode_batch(rows)
    for row, example in zip(rows, together, strict=True):
        (alone,) = encoder.encode_batch([json.loads(json.dumps(row))])
        assert np.array_equal(alone.ids, example.ids) and np.array_equal(
            alone.scored, example.scored
        )
        assert alone.ids.dtype == np.int32 and alone.scored.dtype == bool
    with pytest.raises(UserError, match="^chats.jsonl, line 7 has the keys x;"):
        encoder.encode_batch([{"x": 1}], ["chats.jsonl, line 7"])


def test_garbage_is_refused_in_one_line(folders):
    """Whatever JSON can say in place of what belongs there: an example, or a message of one line."""
    rng = random.Random(0)
    encoder = ExampleEncoder(chats.options(format="messages"), Chat(folders(chats.CHATML)))
    refused = 0

    def junk(depth=0):
        leaf = rng.choice(["", "user", "[1]", "{", "\ud800", 0, -1, 2**70, 0.5, True, None])
        if depth > 2 or rng.random() < 0.5:
            return leaf
        some = range(rng.randrange(3))
        if rng.random() < 0.5:
            return [junk(depth + 1) for _ in some]
        return {rng.choice(["role", "content", "function", "text"]): junk(depth + 1) for _ in some}

    keys = ("role", "content", "tool_calls", "mask", "weight", "reasoning_content", "name")
    for chat in chats.random_chats(5, 300):
        row = {"messages": chat}
        rng.choice(chat)[rng.choice(keys)] = junk()
        if rng.random() < 0.3:
            row[rng.choice(["tools", "chat_template_kwargs", "messages", "system"])] = junk()
        try:
            (example,) = encoder.encode_batch([row], arrow=rng.random() < 0.5)
            assert len(example.ids) == len(example.scored)
        except UserError as e:
            refused += 1
            assert str(e).startswith("row 1") and "\n" not in str(e)
    assert 30 < refused < 270


@pytest.mark.slow
def test_watching_a_template_changes_no_text():
    """Every template that TRL ships, with and without marks, tools and a generation prompt."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    rows = [c[-2:] for c in chats.random_chats(6, 3)]
    rendered = 0
    for path in sorted(chats.trl_templates().glob("*.jinja")):
        for chat in rows:
            for begins in (False, True):
                given = {"add_generation_prompt": begins}
                source = path.read_text(encoding="utf-8")
                try:
                    text = render(source, path.stem, chat, special, **given)
                except UserError:
                    continue  # it is of images
                watched = render_watched(source, path.stem, chat, special, **given)
                assert watched.text == text
                assert all(
                    a.end <= b.start for a, b in zip(watched.owned, watched.owned[1:], strict=False)
                )
                rendered += 1
    assert rendered > 300
