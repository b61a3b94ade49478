"""Ids and labels against TRL's SFTTrainer, for its formats and options, on stock templates and the training
templates that it ships. Where TRL is wrong or its default differs the test says so."""

import functools
import json
import random
import types

import pytest
import tokenizers
import transformers

from deepseek_jax.data.chat import Chat
from deepseek_jax.data.scoring import ExampleEncoder
from tests.support import chats

IGNORE = -100
# Template -> eos. Those of DeepSeek and of the families that this program reads, and of as many forms as
# there are: contents stripped, think blocks, roles renamed, stop tokens that come with the next message.
STOCK = {
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "phi3": "<|endoftext|>",
}
TRAINING = {
    "deepseekv3_training": "<｜end▁of▁sentence｜>",
    "deepseek_r1_distill_training": "<｜end▁of▁sentence｜>",
    "qwen2_5_training": "<|im_end|>",
    "qwen3_training": "<|im_end|>",
    "qwen3_5_think_training": "<|im_end|>",
    "glm4moe_training": "<|user|>",
    "gptoss_training": "<|return|>",
    "llama3_training": "<|eot_id|>",
    "gemma3_training": "<end_of_turn>",
    "phi3_training": "<|endoftext|>",
}


@pytest.fixture(scope="module", autouse=True)
def trl():
    """TRL and datasets, which only the process that runs this file takes the seconds to import."""
    global datasets, trl_templates, trl_sft
    datasets = pytest.importorskip("datasets")
    trl_templates = pytest.importorskip("trl.chat_template_utils")
    trl_sft = pytest.importorskip("trl.trainer.sft_trainer")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(template of TRL or None, eos) -> a folder, made once."""

    @functools.cache
    def folder(name, eos, add_bos=False):
        template = chats.trl_template(name) if name else None
        path = tmp_path_factory.mktemp("tokenizer")
        return chats.make_folder(path, template, eos, add_bos=add_bos)

    return folder


def trl_examples(folder, rows, assistant_only_loss=False, completion_only_loss=None):
    """[(ids, labels)] as SFTTrainer makes them of a dataset, before truncation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if completion_only_loss is None:  # SFTTrainer.__init__
        completion_only_loss = "prompt" in rows[0] and "completion" in rows[0]
    trainer = types.SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only_loss
    )
    arguments = types.SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant_only_loss,
        max_length=None,
        shuffle_dataset=False,
    )
    prepared = trl_sft.SFTTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(rows), tokenizer, arguments, False, None, "train"
    )
    return list(zip(prepared["input_ids"], prepared["labels"], strict=True))


def our_examples(folder, rows, **given):
    """The same of ours. The label of the first token is no target: nothing predicts it."""
    encoded = ExampleEncoder(chats.options(**given), Chat(folder)).encode_batch(rows)
    return [
        (
            e.ids.tolist(),
            [i if s else IGNORE for i, s in zip(e.ids.tolist(), e.scored, strict=True)],
        )
        for e in encoded
    ]


def check(ours, theirs):
    assert len(ours) == len(theirs)
    for (ids, labels), (their_ids, their_labels) in zip(ours, theirs, strict=True):
        assert ids == their_ids
        assert labels[1:] == their_labels[1:]
        assert labels[0] == IGNORE


def some_chats(name, count=8):
    return chats.random_chats(sum(map(ord, name)), count, system="gemma" not in name)


def split(chat):
    """A chat as prompt and completion: its last answer, which reads alike in both."""
    return {"prompt": chat[:-1], "completion": chat[-1:]}


@pytest.mark.parametrize("name", STOCK)
def test_messages_with_every_token(name, folders):
    """TRL's default, and ours with assistant_only_loss=False."""
    folder = folders(name, STOCK[name])
    rows = [{"messages": chat} for chat in some_chats(name)]
    check(our_examples(folder, rows, assistant_only_loss="False"), trl_examples(folder, rows))


@pytest.mark.parametrize("name", TRAINING)
def test_messages_with_what_the_assistant_says(name, folders):
    """With the header as the template marks it; our default leaves out of these masks what a generation
    prompt says (bug 10), and nothing else."""
    folder = folders(name, TRAINING[name])
    rows = [{"messages": chat} for chat in some_chats(name)]
    theirs = trl_examples(folder, rows, assistant_only_loss=True)
    check(our_examples(folder, rows, train_on_header=True), theirs)
    prompt = Chat(folder).render([{"role": "user", "content": "q"}])
    for (ids, labels), (_, their_labels) in zip(our_examples(folder, rows), theirs, strict=True):
        less = [i for i, a, b in zip(ids, labels, their_labels, strict=True) if a != b][1:]
        assert all(a in (b, IGNORE) for a, b in zip(labels, their_labels, strict=True))
        assert all(Chat(folder).decode([i], skip_special_tokens=False) in prompt for i in less)


@pytest.mark.parametrize(
    "name", [n for n in STOCK if n in ("qwen2_5", "qwen3", "llama3_1", "glm4moe")]
)
def test_bug_9_a_stock_template_and_the_training_template_of_it(name, folders):
    """TRL replaces a stock template by one of its own to know what to mask. Ours masks the stock one, and
    where both write the same, the masks are the same but for the line break after a stop token."""
    folder = folders(name, STOCK[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not any(
        tokenizer.apply_chat_template(
            some_chats(name)[0], return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
    )
    if name == "llama3_1":
        return  # TRL ships no training template for it
    template = trl_templates.get_training_chat_template(tokenizer)
    assert trl_templates.is_chat_template_stop_token_trained(tokenizer, template)
    same = 0
    for chat in some_chats(name):
        theirs = tokenizer.apply_chat_template(
            chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        ((ids, labels),) = our_examples(folder, [{"messages": chat}])
        if ids != theirs["input_ids"]:
            continue
        same += 1
        after = [
            i
            for i, m, label in zip(ids, theirs["assistant_masks"], labels, strict=True)
            if m and label < 0
        ]
        assert {tokenizer.decode([i]) for i in after} <= {"\n"}
        assert all(
            m for m, label in zip(theirs["assistant_masks"], labels, strict=True) if label >= 0
        )
    assert same or name != "qwen2_5"


# Thoughts, headers, stop tokens that come with the next message, no system message.
TRAINED = ("deepseekv3_training", "glm4moe_training", "gemma3_training")
QUICK = ("qwen3", "llama3_1", "gptoss", *TRAINED)
OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in STOCK | TRAINING if n not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_prompt_and_completion_of_messages(name, folders):
    """The last answer of a chat, by default and with the prompt, and, where the template marks it, with both
    masks at once."""
    folder = folders(name, (STOCK | TRAINING)[name])
    rows = [split(chat) for chat in some_chats(name)]
    check(our_examples(folder, rows), trl_examples(folder, rows))
    if name in ("qwen3", "deepseekv3_training"):
        ours = our_examples(folder, rows, completion_only_loss=False)
        check(ours, trl_examples(folder, rows, completion_only_loss=False))
    if name in TRAINING:
        ours = our_examples(folder, rows, assistant_only_loss=True)
        check(ours, trl_examples(folder, rows, assistant_only_loss=True))


@pytest.mark.parametrize("add_bos", [False, True])
def test_texts(add_bos, folders):
    """text, prompt and completion as texts, with and without eos in them, with the tokenizer's bos rule."""
    folder = folders(None, "</s>", add_bos)
    rng = random.Random(3)
    texts = [chats.random_text(rng) for _ in range(10)]
    rows = [{"text": t + rng.choice(["", "</s>"])} for t in texts]
    check(our_examples(folder, rows), trl_examples(folder, rows))
    pairs = [{"prompt": t + ":", "completion": " " + rng.choice(texts)} for t in texts]
    check(our_examples(folder, pairs), trl_examples(folder, pairs))
    check(
        our_examples(folder, pairs, completion_only_loss=False),
        trl_examples(folder, pairs, completion_only_loss=False),
    )


def test_bug_14_two_bos(folders):
    """A text that was rendered before begins with bos: TRL's has two of them."""
    folder = folders(None, "</s>", True)
    ((ids, _),) = our_examples(folder, [{"text": "<s>hello"}])
    ((theirs, _),) = trl_examples(folder, [{"text": "<s>hello"}])
    assert theirs == [ids[0], *ids]


def test_bug_17_a_prompt_that_merges_with_its_completion(tmp_path):
    """zxab by itself is z|x|ab, and zxabc is z|xa|bc. TRL scores all from where the tokens part, xa among
    them, which is of the prompt alone. Ours scores the tokens that have a letter of the completion."""
    vocabulary = ["a", "b", "c", "x", "z", "bc", "ab", "xa", "</s>"]
    merges = [("b", "c"), ("a", "b"), ("x", "a")]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({t: i for i, t in enumerate(vocabulary)}, merges)
    )
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    rows = [{"prompt": "zxab", "completion": "c"}]
    ((ids, labels),) = our_examples(str(tmp_path), rows)
    ((their_ids, their_labels),) = trl_examples(str(tmp_path), rows)
    assert ids == their_ids == [vocabulary.index(t) for t in ("z", "xa", "bc", "</s>")]
    assert labels == [IGNORE, IGNORE, *ids[2:]]
    assert their_labels == [IGNORE, *ids[1:]]


@pytest.mark.parametrize("name", ["qwen3", "deepseekv3_training"])
def test_conversations(name, folders):
    """from and value. The names of ShareGPT's roles are given to the template by TRL as they are; ours are
    its own."""
    folder = folders(name, (STOCK | TRAINING)[name])
    chat = some_chats(name)[0]
    rows = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in chat]}]
    check(our_examples(folder, rows, assistant_only_loss=False), trl_examples(folder, rows))
    shared = {"user": "human", "assistant": "gpt", "system": "system"}
    named = [{"from": shared[m["role"]], "value": m["content"]} for m in chat]
    ours = our_examples(folder, [{"conversations": named}])
    assert ours == our_examples(folder, [{"messages": chat}])
    ((theirs, _),) = trl_examples(folder, [{"conversations": named}])
    assert theirs != ours[0][0]


def test_tokenized(folders):
    """labels as they are, assistant_masks; a completion_mask acts by default, in TRL only if asked for."""
    folder = folders(None, "</s>")
    ids, mask, other = [5, 6, 7, 8, 9], [0, 0, 1, 1, 1], [1, 1, 1, 0, 1]
    for row in (
        {"input_ids": ids},
        {"input_ids": ids, "labels": [-100, 6, 7, -100, 9]},
        {"input_ids": ids, "assistant_masks": other},
    ):
        check(our_examples(folder, [row]), trl_examples(folder, [row]))
    row = {"input_ids": ids, "completion_mask": mask}
    check(our_examples(folder, [row]), trl_examples(folder, [row], completion_only_loss=True))
    check(our_examples(folder, [row], completion_only_loss=False), trl_examples(folder, [row]))
    row |= {"assistant_masks": other}
    check(our_examples(folder, [row]), trl_examples(folder, [row], completion_only_loss=True))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "finds",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]


@pytest.mark.parametrize(
    "name", ["qwen3_training", "glm4moe_training", "gptoss_training", "deepseekv3_training"]
)
def test_tools_and_results(name, folders):
    """Calls, results, tools as a list or as JSON text: as transformers renders and masks them."""
    folder = folders(name, TRAINING[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    function = {"name": "lookup", "arguments": {"a": "b"}}
    chat = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        },
        {"role": "tool", "name": "lookup", "content": "sunny"},
        {"role": "assistant", "content": "good"},
    ]
    tools = None if name.startswith("deepseek") else TOOLS
    theirs = tokenizer.apply_chat_template(
        chat, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    for given in (tools, None if tools is None else json.dumps(tools)):
        row = {"messages": chat, "tools": given}
        ((ids, labels),) = our_examples(folder, [row], train_on_header=True)
        assert ids == theirs["input_ids"]
        assert [x >= 0 for x in labels] == [bool(m) for m in theirs["assistant_masks"]]


def test_bug_15_tables_fill_tools_with_none(folders):
    """Arrow gives every struct the keys of all: TRL's rows then say null to the model. Ours leave them out of
    rows of a table, and keep what JSON says."""
    folder = folders("qwen3_training", "<|im_end|>")
    other = {
        "type": "function",
        "function": {
            "name": "other",
            "parameters": {
                "type": "object",
                "properties": {"b": {"type": "string", "enum": ["x"]}},
            },
        },
    }
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "tools": [t],
        }
        for t in (TOOLS[0], other)
    ]
    table = datasets.Dataset.from_list(rows).to_list()
    assert "None" in str(table)
    encoder = ExampleEncoder(chats.options(), Chat(folder))
    plain = encoder.encode_batch(rows)
    arrow = encoder.encode_batch(table, arrow=True)
    kept = encoder.encode_batch(table)
    assert [e.ids.tolist() for e in plain] == [e.ids.tolist() for e in arrow]
    assert "null" in Chat(folder).decode(kept[0].ids.tolist())
    ((theirs, _), _) = trl_examples(folder, rows)
    assert "null" in Chat(folder).decode(theirs)
