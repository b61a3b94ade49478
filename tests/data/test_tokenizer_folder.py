"""The tokenizers of folders whose tokenizer.json does not say all: the ids of transformers, for text and for
training."""

import json
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import tokenizers

from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.hf import tokenizer_files
from deepseek_jax.hf.tokenizer_files import Companions
from deepseek_jax.inference import opener
from deepseek_jax.inference.loaded import stop_ids_of
from tests.support import FILES

transformers = pytest.importorskip("transformers")

DATA = os.path.join(FILES, "tokens")
TEXTS = (
    "",
    "hello world",
    "<|im_start|>user\nhello<|im_end|>",
    " the\n\n<s>you<pad> 你好 😀",
    "<|endoftext|><extra>end",
)


def copy(tmp_path, name, config=None, **files):
    """A folder of tests/data with its tokenizer_config.json changed and other files written."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(os.path.join(DATA, name), folder)
    if not (folder / "tokenizer.json").exists():
        shutil.copyfile(
            os.path.join(DATA, "added-decoder", "tokenizer.json"), folder / "tokenizer.json"
        )
    old = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in (old | (config or {})).items() if v is not None})
    )
    for file, value in files.items():
        (folder / f"{file}.json").write_text(json.dumps(value))
    return str(folder)


def same_ids(folder, chat=True, **options):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder, **options), Chat(folder)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids and Encoder(ours, folder).encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    if chat:
        messages = [{"role": "user", "content": "hello"}]
        assert ours.encode(messages) == theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    return theirs, ours


@pytest.mark.parametrize("name", ["added-added_json", "added-decoder"])
def test_ids_that_only_files_beside_tokenizer_json_give(name, tmp_path):
    folder = copy(tmp_path, name)
    theirs, ours = same_ids(folder)
    assert (
        ours.stop_ids == {281} == {theirs.eos_token_id} == stop_ids_of(folder)
    )  # the command and the library have one rule
    trained = load_tokenizer(folder)
    assert (trained.vocab_size, trained.eos_id, trained.hidden[281]) == (282, 0, "<|im_end|>")
    assert trained.decode([278, 281, 279]) == "hello world"
    (tmp_path / "alone").mkdir()
    shutil.copyfile(f"{folder}/tokenizer.json", tmp_path / "alone" / "tokenizer.json")
    alone = load_tokenizer(str(tmp_path / "alone" / "tokenizer.json"))
    assert trained.name != alone.name and alone.vocab_size == 280  # other ids, another identity


def test_ids_with_holes_and_tokens_that_are_not_special(tmp_path):
    """Ids that the library would not give: what it decodes and encodes are they, and the rest as ever."""
    added = {
        "281": {"content": "<|im_start|>", "special": True},
        "290": {"content": "<|im_end|>", "special": True},
        "300": {"content": "<think>", "special": False, "normalized": False},
    }
    folder = copy(
        tmp_path,
        "added-decoder",
        {"added_tokens_decoder": added},
        added_tokens={"<later>": 301, "<|im_end|>": 290},
    )
    ours = Chat(folder)
    assert ours.encode("hello<|im_start|><think> world<|im_end|><later>") == [
        278,
        281,
        300,
        279,
        290,
        301,
    ] and ours.stop_ids == {290}
    assert ours.decode([278, 281, 300, 279, 290, 301]) == "hello<think> world<later>"
    plain = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    for text in ("hello world, what are you", "im_start | im_end", "你好\n\n"):
        assert ours.encode(text) == plain.encode(text).ids
    assert load_tokenizer(folder).vocab_size == 302 and load_tokenizer(folder).token_bytes.tolist()[
        300:
    ] == [
        len("<think>"),
        len("<later>"),
    ]


@pytest.mark.parametrize(
    "config, files, named",
    [
        ({"added_tokens_decoder": {"5": {"content": "<|im_end|>"}}}, {}, "token 5 is '%'"),
        ({"added_tokens_decoder": {"900": {"content": "hello"}}}, {}, "'hello' is token 278"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, {}, "has 'x'"),
        (
            {"added_tokens_decoder": None},
            {"added_tokens": {"<a>": "280"}},
            "'<a>' has the id 280, which is none",
        ),
    ],
)
def test_files_that_contradict_each_other(config, files, named, tmp_path):
    folder = copy(tmp_path, "added-decoder", config, **files)
    for read in (Chat, load_tokenizer):
        with pytest.raises(UserError) as error:
            read(folder)
        assert named in str(error.value) and "\n" not in str(error.value)


def test_special_tokens_that_no_file_gives_an_id(tmp_path):
    """bos is in no vocabulary, eos in the model's alone, as a piece: both are tokens, new ones after all
    others in transformers' order."""
    folder = copy(
        tmp_path,
        "added-decoder",
        {
            "bos_token": "<s>",
            "eos_token": "hello",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<extra>"],
        },
    )
    theirs, ours = same_ids(folder)
    assert (theirs.bos_token_id, theirs.pad_token_id) == (282, 283) and ours.stop_ids == {278} == {
        theirs.eos_token_id
    }
    assert load_tokenizer(folder).vocab_size == 282  # training knows only ids that a file gives

    def fits(size):
        return opener.encoder_of(folder, "", None, size, "M").vocab_size

    assert fits(285) == 285
    with pytest.raises(
        UserError,
        match="the tokenizer of M has 284 ids, the last of them '<extra>', and the model 282",
    ):
        fits(282)
    padded = copy(tmp_path / "padded", "added-decoder", {"pad_token": "<pad>"})
    assert (
        opener.encoder_of(padded, "", None, 282, "M").vocab_size == 282
    )  # no text needs padding that the model never had


def test_bos_that_tokenizer_json_does_not_add(tmp_path, capsys):
    """DeepSeek's files. transformers 5 reads `add_bos_token` only as an argument, transformers 4 reads it
    from the file too."""
    folder = copy(tmp_path, "deepseek-bos")
    _, ours = same_ids(folder, chat=False, add_bos_token=True)
    encoder = Encoder(ours, folder)
    assert encoder.prefix == [0] and encoder.start_id == 0
    assert (
        encoder.encode_prompt("") == [0]
        and encoder.encode("hello")[0] == 0
        and encoder.encode("hello", prefix=False)[0] != 0
    )
    assert (
        encoder.encode("<｜begin▁of▁sentence｜>hello").count(0) == 1
    )  # a text that has it gets no second one
    ids, first = encoder.encode_batch([" hello"])[0]
    assert ids[0] != 0 and first == len(ours.decode(ids[:1]).encode())
    chat = ours.tokenizer.encode("<｜begin▁of▁sentence｜>hello", add_special_tokens=False).ids
    assert chat.count(0) == 1
    encoder.say_prefix()
    assert "begins with    <｜begin▁of▁sentence｜>, as" in capsys.readouterr().err
    without = copy(tmp_path / "without", "deepseek-bos", {"add_bos_token": False})
    assert Encoder(Chat(without), without).prefix == []
    llama = copy(
        tmp_path / "llama", "llama2-style", {"add_bos_token": True}
    )  # tokenizer.json adds it already
    assert Chat(llama).encode("hello").count(1) == 1
    np.testing.assert_array_equal(
        load_tokenizer(folder).encode("hello"), encoder.encode("hello", prefix=False)
    )  # training text has none


def test_where_a_tokenizer_is_looked_for(tmp_path):
    folder = copy(tmp_path, "added-decoder")
    assert load_tokenizer(folder).name == load_tokenizer(f"{folder}/tokenizer.json").name
    os.rename(f"{folder}/tokenizer.json", f"{folder}/other.json")
    assert (
        load_tokenizer(f"{folder}/other.json").vocab_size == 280
    )  # a file of its own: what lies beside it is of another
    assert tokenizer_folder.find(folder) is None
    with pytest.raises(UserError, match="is a folder without a tokenizer.json or tiktoken.model"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match="cannot be read .missing"):
        Chat(folder)


def test_an_exported_tokenizer_gives_the_ids_of_training(tmp_path):
    """Llama's class of transformers 5 drops a space at the beginning, which tokenizer.json keeps, and adds
    bos, which training text has not."""
    folder = copy(tmp_path, "llama2-style")
    (tmp_path / "out").mkdir()
    tokenizer_files.write(str(tmp_path / "out"), {}, Companions(None, str(folder), (2,)), 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (" import x", "import x", "  two", "a b"):
        ids = load_tokenizer(str(folder)).encode(text).tolist()
        assert ids == theirs(text).input_ids == Chat(str(tmp_path / "out")).encode(text)
