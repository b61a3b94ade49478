"""Rows of each format, as people have them, and what is said of those that fit none."""

import json
import types

import numpy as np
import pytest

from deepseek_jax.data import conversations
from deepseek_jax.data.conversations import find_format, normalise
from deepseek_jax.errors import UserError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = {
    "tokenized": {"input_ids": [1, 2]},
    "messages": {"messages": CHAT},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "instruction_output": {"instruction": "q", "output": "a"},
    "text": {"text": "q a"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_the_format_is_found_by_its_keys(kind):
    """Also beside other columns, and where a table has a column of another format that is empty."""
    row = ROWS[kind] | {"id": 3, "source": "somewhere"}
    assert find_format(row, "row 1") == kind
    empty = {key: None for keys in conversations.FORMATS.values() for key in keys}
    assert find_format(empty | row, "row 1") == kind
    normalise(row, kind, "row 1")


def test_formats_of_rows_with_several():
    """UltraChat's prompt beside messages; Alpaca's instruction and output beside the text of both."""
    assert find_format({"prompt": "q", "messages": CHAT}, "row 1") == "messages"
    assert (
        find_format({"instruction": "q", "output": "a", "text": "qa"}, "row 1")
        == "instruction_output"
    )


def test_a_row_that_fits_no_format_or_not_this_one():
    with pytest.raises(
        UserError, match="^a.jsonl, line 1 has the keys answer, question, which are no format"
    ):
        find_format({"question": "q", "answer": "a"}, "a.jsonl, line 1")
    with pytest.raises(
        UserError, match="^row 7 has the keys text; config.sft.format=messages needs 'messages'"
    ):
        normalise(ROWS["text"], "messages", "row 7")


def test_the_same_chat_in_every_spelling():
    """from and value, ShareGPT's roles, lists as JSON text, NumPy's as pyarrow's to_pandas has them, role and
    content under conversations."""
    expected = normalise({"messages": CHAT}, "messages", "row 1")
    assert (
        list(expected.messages) == CHAT
        and expected.prompt is None
        and expected.trained == [True, True]
    )
    for row in (
        {"messages": json.dumps(CHAT)},
        {"messages": np.array(CHAT, object)},
        {"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"conversations": ROWS["conversations"]["conversations"]},
        {"conversations": CHAT},
        {"messages": [m | {"tool_calls": None, "name": None} for m in CHAT]},
        {"messages": [m | {"tool_calls": []} for m in CHAT]},
    ):
        kind = find_format(row, "row 1")
        given = normalise(row, kind, "row 1")
        without_none = [{k: v for k, v in m.items() if v is not None} for m in given.messages]
        assert without_none == CHAT and given[1:] == expected[1:]


def test_a_prompt_of_messages():
    row = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    given = normalise(row, "prompt_completion", "row 1")
    assert list(given.messages) == CHAT and given.prompt == 1
    given = normalise(row, "prompt_completion", "row 1", system_prompt="Be kind.")
    assert given.messages[0] == {"role": "system", "content": "Be kind."} and given.prompt == 2
    for half in ("prompt", "completion"):
        with pytest.raises(UserError, match="row 1.*Make both texts"):
            normalise(row | {half: "text"}, "prompt_completion", "row 1")
    # A prompt that looks like JSON is a text.
    assert normalise({"prompt": "[1]", "completion": "[2]"}, "prompt_completion", "row 1")[:] == (
        "[1]",
        "[2]",
    )


def test_system_prompts():
    """The option's where there is none; a row's own before it; never a second."""
    for row, option, expected in (
        ({}, "", None),
        ({}, "option", "option"),
        ({"system": "row"}, "option", "row"),
        ({"messages": [{"role": "system", "content": "first"}, *CHAT]}, "option", "first"),
        ({"messages": [{"role": "developer", "content": "first"}, *CHAT]}, "option", "first"),
    ):
        given = normalise({"messages": CHAT} | row, "messages", "row 1", option)
        first = given.messages[0]
        assert (first["content"] if first["role"] != "user" else None) == expected
        assert len(given.trained) == len(given.messages)


def test_masks_are_of_answers_and_are_no_keys_of_the_template():
    chat = [
        CHAT[0] | {"mask": 1},
        CHAT[1] | {"mask": 1},
        CHAT[0],
        CHAT[1] | {"weight": 0},
        CHAT[1] | {"mask": 0},
    ]
    given = normalise({"messages": chat}, "messages", "row 1")
    assert given.trained == [True, False, True, False, True]
    assert not any({"mask", "weight"} & set(m) for m in given.messages)


def test_tools_and_words_for_the_template():
    tools = [{"type": "function", "function": {"name": "f", "default": None}}]
    for given in (tools, json.dumps(tools)):
        row = {"messages": CHAT, "tools": given, "chat_template_kwargs": '{"a": 1}'}
        out = normalise(row, "messages", "row 1")
        assert out.tools == tools and out.variables == {"a": 1}
    assert normalise(row, "messages", "row 1", arrow=True).tools == [
        {"type": "function", "function": {"name": "f"}}
    ]
    assert normalise({"messages": CHAT, "tools": []}, "messages", "row 1").tools is None
    for key, value in (
        ("tools", "f"),
        ("tools", 3),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", {"add_generation_prompt": True}),
    ):
        with pytest.raises(UserError, match=f"row 1 has {key}"):
            normalise({"messages": CHAT, key: value}, "messages", "row 1")


def test_instructions():
    """DeepSeek-MoE's finetune.py, and Alpaca's input between instruction and answer."""
    prompt, text = normalise(
        {"instruction": " {x} \n", "output": "a"}, "instruction_output", "row 1"
    )
    theirs = (
        "You are an AI assistant, developed by DeepSeek Company. For politically sensitive questions, "
        "security and privacy issues, you will refuse to answer.\n### Instruction:\n{x}\n### Response:\n"
    )
    assert prompt == theirs and text == "a\n"
    for given in ("", None, " "):
        row = {"instruction": "{x}", "output": "a", "input": given}
        assert normalise(row, "instruction_output", "row 1").prompt == theirs
    row = {"instruction": "x", "output": "a", "input": "y"}
    assert (
        "x\n### Input:\ny\n### Response:\n" in normalise(row, "instruction_output", "row 1").prompt
    )
    with pytest.raises(UserError, match="row 1 has the key 'history'"):
        normalise(row | {"history": [["a", "b"]]}, "instruction_output", "row 1")


@pytest.mark.parametrize(
    "row, what",
    [
        ({"messages": "hello"}, "not a list of messages"),
        ({"messages": []}, "empty list"),
        ({"messages": ["a"]}, "not a list of messages"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has the keys content and no 'role'"),
        ({"messages": [CHAT[0], CHAT[1] | {"mask": "yes"}]}, "mask='yes'"),
        ({"text": 3}, "'text' that is a int"),
        ({"instruction": 3, "output": "a"}, "'instruction' that is a int"),
        ({"input_ids": []}, "input_ids that are not"),
        ({"input_ids": [1.5]}, "input_ids that are not"),
        ({"input_ids": [[1]]}, "input_ids that are not"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids and 1 labels"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, r"labels\[0\] is 2.*do not shift"),
        ({"input_ids": [1, 2], "completion_mask": [0, 2]}, "completion_mask with other values"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_what_is_wrong_is_said_in_one_line(row, what):
    with pytest.raises(UserError, match=f"^row 5.*{what}") as e:
        normalise(row, find_format(row, "row 5"), "row 5")
    assert "\n" not in str(e.value)


def test_tokens():
    row = {
        "input_ids": np.arange(3),
        "labels": [-100, 1, 2],
        "assistant_masks": [True, False, True],
    }
    given = normalise(row, "tokenized", "row 1")
    assert given.ids.dtype == np.int32 and given.ids.tolist() == [0, 1, 2]
    assert given.labels.tolist() == [False, True, True] and given.completion is None
    assert given.assistant.tolist() == [True, False, True]


def test_rows_are_left_as_they_are():
    """A row may be read again for another purpose."""
    row = {"messages": [types.MappingProxyType(m) for m in CHAT], "tools": None}
    before = json.dumps([dict(m) for m in row["messages"]])
    normalise(row, "messages", "row 1", "Be kind.")
    assert json.dumps([dict(m) for m in row["messages"]]) == before
