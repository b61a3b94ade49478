"""What an export says beside the weights: nothing that the run or its checkpoint knew is forgotten, in no
reader's words."""

import functools
import json
import os

import jax
import numpy as np
import pytest
import safetensors
import tokenizers

from deepseek_jax import hf
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import CheckpointConfig, Config, DataConfig, MeshConfig
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.hf import provenance
from deepseek_jax.inference.loaded import config_for, stop_ids_of
from deepseek_jax.inference.opener import encoder_of, open_model
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.run import importer
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import to_tree
from tests.support.hf_folders import MODEL, source

TEXTS = [
    "",
    "Köln: 12 °C — 你好 😀\n\n\ttabs",
    "def f(x):\r\n    return x",
    "\x00\x7f ­ÿ",
    "<|endoftext|> is text",
]


@functools.cache
def trained():
    """What a checkpoint holds, as far as export reads it: halves."""
    _, params, bias = abstract_model(config_for(MODEL, None)[0])
    state = {"params": params, "bias": bias}
    return to_tree(jax.tree.map(lambda a: jax.device_put(np.full(a.shape, 0.5, a.dtype)), state))


def save(workdir, data=None):
    """A checkpoint of a run."""
    data = data or DataConfig()
    if not os.path.exists(os.path.join(workdir, "checkpoints")):
        checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"))
        checkpoints.save(1, trained(), {})
        checkpoints.close()
    workdirs.write_config(str(workdir), Config(model=MODEL, mesh=MeshConfig(fsdp=1), data=data))


def exported(tmp_path, name="out", **options):
    commands.export(str(tmp_path / "w"), str(tmp_path / name), **options)

    def read(file):
        path = tmp_path / name / file
        return json.loads(path.read_text()) if path.exists() else {}

    return read("config.json"), read("generation_config.json"), read("tokenizer_config.json")


def bpe(path, special=("<s>", "<|im_end|>", "</s>"), bos=True, text="some words of a text"):
    """A byte-level BPE whose ids 0, 1, ... are the special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([text] * 9, trainer)
    if bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    os.makedirs(os.path.dirname(path), exist_ok=True)
    inner.save(str(path))
    return str(path)


def test_a_run_on_bytes(tmp_path):
    """Its tokenizer is one that everybody reads; our own tools need nothing else."""
    save(tmp_path / "w")
    config, generation, tokenizer = exported(tmp_path)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        None,
        256,
        None,
    )
    assert generation == {"eos_token_id": 256} and tokenizer["eos_token"] == "<|endoftext|>"
    assert "bos_token" not in tokenizer
    out = str(tmp_path / "out")
    ours, theirs = ByteTokenizer(), load_tokenizer(f"{out}/tokenizer.json")
    assert (theirs.eos_id, theirs.vocab_size) == (256, 257)
    np.testing.assert_array_equal(theirs.token_bytes, ours.token_bytes)
    for text in TEXTS:
        np.testing.assert_array_equal(theirs.encode(text), ours.encode(text))
        assert theirs.decode(ours.encode(text)) == text
    every = np.arange(256)
    assert theirs.decode(every) == ours.decode(every)  # broken UTF-8 too
    encoder = Encoder(Chat(out), out)
    assert encoder.stop_ids == stop_ids_of(out) == {256} and encoder.encode("é") == [0xC3, 0xA9]


def test_transformers_reads_a_run_on_bytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    save(tmp_path / "w")
    exported(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS[:-1]:
        assert tokenizer(text).input_ids == ByteTokenizer().encode(text).tolist()
        assert tokenizer.decode(ByteTokenizer().encode(text).tolist()) == text
    assert tokenizer.eos_token_id == 256 and tokenizer.bos_token_id is None
    assert tokenizer.model_max_length == 128
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == generation.eos_token_id == 256
    assert config.bos_token_id is generation.bos_token_id is None


def test_a_run_with_a_tokenizer_of_its_own(tmp_path):
    """A file of any name: eos is what ended its documents. Bos, which its text had nowhere, is put before no
    prompt, in any reader."""
    path = bpe(tmp_path / "tok" / "mine.json")
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"eos_token": "of another file"}')
    save(tmp_path / "w", DataConfig(tokenizer=path))
    config, generation, tokenizer = exported(tmp_path)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        None,
        2,
        None,
    )
    assert generation == {"eos_token_id": 2}
    assert (tokenizer["eos_token"], tokenizer["clean_up_tokenization_spaces"]) == ("</s>", False)
    text = "a text of <s> words"
    trained = load_tokenizer(path, special_tokens=True).encode(text).tolist()
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == trained
    assert Chat(str(tmp_path / "out")).encode(text) == trained and trained[0] != 0
    save(tmp_path / "w", DataConfig(tokenizer=bpe(tmp_path / "tok" / "bare.json", bos=False)))
    config, generation, tokenizer = exported(tmp_path, "bare")
    assert config["bos_token_id"] is None and generation == {"eos_token_id": 2}
    assert "bos_token" not in tokenizer
    bare = (tmp_path / "bare" / "tokenizer.json").read_bytes()
    assert bare == (tmp_path / "tok" / "bare.json").read_bytes()


def test_what_lies_beside_the_tokenizer_comes_with_it(tmp_path):
    """A chat model's tokenizer: documents ended with </s>, turns end with <|im_end|>."""
    path = bpe(tmp_path / "tok" / "tokenizer.json")
    beside = {
        "eos_token": "<|im_end|>",
        "bos_token": "<s>",
        "pad_token": "</s>",
        "chat_template": "{{ messages[0].content }}",
    }
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(beside))
    (tmp_path / "tok" / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "tok" / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages[0].content }}"
    )
    (tmp_path / "tok" / "config.json").write_text('{"model_type": "gpt2"}')
    save(tmp_path / "w", DataConfig(tokenizer=path))
    config, generation, tokenizer = exported(tmp_path)
    assert tokenizer == beside | {
        "add_bos_token": False,
        "add_eos_token": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    assert config["model_type"] == "deepseek_v3"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 2, 2)
    assert generation == {"bos_token_id": 0, "eos_token_id": [2, 1], "pad_token_id": 2}
    chat = Chat(str(tmp_path / "out"))
    assert chat.stop_ids == {1, 2} and chat.render([{"role": "user", "content": "x"}]) == "<s>x"


def test_a_run_and_its_export_stop_at_the_same_tokens(tmp_path):
    """Documents ended with </s> (2) and by data.eos_token_id with 5, turns end with <|im_end|> (1)."""
    path = bpe(tmp_path / "tok" / "tokenizer.json")
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    data = DataConfig(tokenizer=path, eos_token_id=5)
    save(tmp_path / "w", data)
    exported(tmp_path)
    run = Config(model=MODEL, data=data)
    ours = encoder_of(None, path, run, MODEL.vocab_size, "run")
    assert ours.stop_ids == stop_ids_of(str(tmp_path / "out")) == {1, 2, 5}
    assert ours.decode([1, 2, 5]) == "" and ours.hidden[1] == "<|im_end|>"
    # Of an import the files are a folder's, which knows nothing of the documents.
    beside = encoder_of(str(tmp_path / "tok"), path, run, MODEL.vocab_size, "run")
    assert beside.stop_ids == {1, 2, 5} and stop_ids_of(str(tmp_path / "tok")) == {1}


def test_a_run_on_token_ids_of_an_unknown_tokenizer(tmp_path):
    save(tmp_path / "w", DataConfig(eos_token_id=300))
    config, generation, tokenizer = exported(tmp_path)
    assert config["eos_token_id"] == 300 and generation == {"eos_token_id": 300} and not tokenizer
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_tokenizer_that_is_gone(tmp_path):
    path = bpe(tmp_path / "tok" / "mine.json")
    save(tmp_path / "w", DataConfig(tokenizer=path))
    os.rename(path, tmp_path / "moved.json")
    with pytest.raises(
        UserError,
        match="mine.json' of .* is not there any more. Put it back; "
        "hf export takes its new place with --tokenizer",
    ):
        exported(tmp_path)
    assert not (tmp_path / "out").exists()
    config, _, tokenizer = exported(tmp_path, tokenizer=str(tmp_path / "moved.json"))
    assert config["eos_token_id"] == 2 and tokenizer["eos_token"] == "</s>"


GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "eos_token_id": [1],
    "bos_token_id": 0,
}
TOKENIZER_CONFIG = {"eos_token": "<|im_end|>", "chat_template": "chat"}


def imported(tmp_path, generation=GENERATION):
    folder = source(
        tmp_path / "source",
        {"eos_token_id": 1, "bos_token_id": 0, "tokenizer_class": "X"},
        generation,
        {
            "tokenizer_config.json": TOKENIZER_CONFIG,
            "merges.txt": "x",
            "LICENSE": "mine",
            "special_tokens_map.json": {},
        },
    )
    bpe(os.path.join(folder, "tokenizer.json"))
    importer.import_(folder, str(tmp_path / "w"))
    return folder


def test_an_import_goes_out_as_it_came(tmp_path):
    folder = imported(tmp_path)
    config, generation, tokenizer = exported(tmp_path)
    assert (
        generation == GENERATION and tokenizer == TOKENIZER_CONFIG and config["eos_token_id"] == 1
    )
    assert config["tokenizer_class"] == "X"
    for name in ("tokenizer.json", "merges.txt", "LICENSE", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == open(
            os.path.join(folder, name), "rb"
        ).read()


def test_a_trained_import_keeps_its_settings_and_stops_where_documents_ended(tmp_path):
    imported(tmp_path)
    save(tmp_path / "w", DataConfig(tokenizer=str(tmp_path / "w" / "hf" / "tokenizer.json")))
    config, generation, tokenizer = exported(tmp_path)
    assert generation == GENERATION | {"eos_token_id": [1, 2]}
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert read.encode("some").ids[0] == 0  # the model that it came from was trained with bos
    assert tokenizer == TOKENIZER_CONFIG and config["eos_token_id"] == 1
    assert Chat(str(tmp_path / "out")).stop_ids == {1, 2}


def test_a_trained_import_with_another_tokenizer(tmp_path):
    """Nothing of the one it came with is left, but what belongs to the model is."""
    imported(tmp_path)
    save(tmp_path / "w")
    config, generation, tokenizer = exported(tmp_path)
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 256)
    assert tokenizer["eos_token"] == "<|endoftext|>"
    assert generation == {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 256}
    assert not {"merges.txt", "special_tokens_map.json"} & set(os.listdir(tmp_path / "out"))
    assert (tmp_path / "out" / "LICENSE").exists()
    with pytest.raises(UserError, match="no chat template"):
        Chat(str(tmp_path / "out")).render([])


def test_bos_that_only_add_bos_token_asks_for(tmp_path):
    """DeepSeek's way. transformers 5 does not read it, and prompted a fine-tuned model without."""
    transformers = pytest.importorskip("transformers")
    beside = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    folder = source(tmp_path / "source", (), None, {"tokenizer_config.json": beside})
    bpe(os.path.join(folder, "tokenizer.json"), bos=False)
    importer.import_(folder, str(tmp_path / "w"))
    save(tmp_path / "w", DataConfig(tokenizer=str(tmp_path / "w" / "hf" / "tokenizer.json")))
    exported(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("some words").input_ids
    assert ids[0] == 0 and Chat(str(tmp_path / "out")).encode("some words") == ids
    assert ids == Chat(folder).encode("some words")


def test_hf_save_of_a_run_says_the_same(tmp_path):
    save(tmp_path / "w")
    by_command = exported(tmp_path)
    hf.save(open_model(str(tmp_path / "w")).model, str(tmp_path / "saved"))
    assert sorted(os.listdir(tmp_path / "saved")) == sorted(os.listdir(tmp_path / "out"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == by_command[0]
    again = hf.load(str(tmp_path / "saved")).params
    assert all(np.all(np.asarray(a) == 0.5) for a in jax.tree.leaves(again))


def test_a_run_whose_checkpoints_are_local(tmp_path):
    """It began with an import, and saved on its hosts' own disks only: the export is of what it learnt."""
    imported = source(tmp_path / "source")
    importer.import_(imported, str(tmp_path / "w"))
    local = CheckpointConfig(kind="local", local_dir=str(tmp_path / "local"))
    assert provenance.is_untrained(str(tmp_path / "w"), str(tmp_path / "w" / "checkpoints"))
    checkpoints = Checkpointer(str(tmp_path / "w" / "checkpoints"), options=local)
    checkpoints.save(1, trained(), {})
    checkpoints.close()
    saved = Config(model=MODEL, mesh=MeshConfig(fsdp=1), checkpoint=local)
    workdirs.write_config(str(tmp_path / "w"), saved)
    commands.export(str(tmp_path / "w"), str(tmp_path / "out"))
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as f:
        assert all((f.get_tensor(name) == 0.5).all() for name in f.keys())
    model = open_model(str(tmp_path / "w")).model
    assert all((a == 0.5).all() for a in jax.tree.leaves(model.params))
