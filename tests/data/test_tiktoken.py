"""tiktoken.model against BPE by ranks written out here, and pieces by another regular expression engine."""

import base64
import itertools
import json
import random
import shutil

import pytest
import tokenizers

from deepseek_jax.data import tiktoken, tokenizer_folder
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.hf import provenance, tokenizer_files
from deepseek_jax.hf.tokenizer_files import Companions

try:
    import regex  # transformers brings it
except ImportError:
    regex = None

CORPUS = [
    "The quick brown fox's tail, isn't it? HelloWorld THEY'LL \n",
    "def f(x):\n    return x ** 2  # square\n\n\tprint(f(1234567))\r\n",
    "你好世界，今天天气很好。我们去公园吧！",
    "日本語テスト カタカナ",
    "😀😃🚀👩‍👩‍👧 é́ üß ſ",
    "    \n\n \t x\u3000y\u00a0z\u2028",
    "русский 한국어 ١٢٣ ²³",
]
MIXED = "aeiouthe ABC' 你好世界的\n\r\t  0123456789.,;(){}=😀é\u0301 \u3000'sTdllſ"


def pieces_of(text):
    """By another engine if it is there; else the library's own pieces, and the test is of their ids alone."""
    if regex:
        return regex.findall(tiktoken.PATTERN, text, flags=regex.V1)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tiktoken.PATTERN), "isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


def theirs(ranks, text):
    """tiktoken's algorithm: of the neighbours that are a token together, those of the lowest rank are joined,
    the first of them first."""
    out = []
    for piece in pieces_of(text):
        data = piece.encode()
        parts = [data] if data in ranks else [data[i : i + 1] for i in range(len(data))]
        while True:
            pairs = [
                (ranks[a + b], i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in ranks
            ]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        out += [ranks[p] for p in parts]
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(ranks, folder with tiktoken.model and tokenizer_config.json in the form of Moonlight's)."""
    folder, pre = tmp_path_factory.mktemp("moonlight"), tokenizers.pre_tokenizers
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tokenizers.Regex(tiktoken.PATTERN), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.train_from_iterator(
        CORPUS * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=900, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet()
        ),
    )
    byte_of = dict(zip(bytes_to_unicode(), range(256), strict=True))
    ranks = {bytes(byte_of[c] for c in token): i for token, i in inner.get_vocab().items()}
    ranks[b"never joined"] = len(
        ranks
    )  # no two of its parts are a token before it: only a whole piece can be it
    (folder / "tiktoken.model").write_bytes(
        b"".join(
            base64.b64encode(t) + b" %d\n" % i for t, i in sorted(ranks.items(), key=lambda p: p[1])
        )
    )

    def special(text, shown=False):
        return {
            "content": text,
            "special": not shown,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }

    n = len(ranks)
    added = {
        n: special("[BOS]"),
        n + 1: special("[EOS]"),
        n + 2: special("<|im_end|>"),
        n + 3: special("<|im_user|>"),
        n + 4: special("<|im_assistant|>"),
        n + 5: special("<|tool_call_begin|>", shown=True),
        n + 255: special("[PAD]"),
    }
    template = "{% for m in messages %}<|im_{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    template += "<|im_assistant|>"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "TikTokenTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
                "chat_template": template,
                "added_tokens_decoder": added,
                "bos_token": "[BOS]",
                "eos_token": "[EOS]",
                "pad_token": "[PAD]",
                "additional_special_tokens": ["<|im_end|>"],
            }
        )
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": n + 2}))
    return ranks, str(folder)


def bytes_to_unicode():
    """GPT-2's table, in the order of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + rest.index(b)) for b in range(256)]


def test_ids_are_those_of_ranks(made):
    ranks, folder = made
    ours, rng = Chat(folder), random.Random(0)
    texts = [*CORPUS, "".join(CORPUS), "never joined", "a" * 200, " " * 70 + "x"]
    texts += ["".join(rng.choices(MIXED, k=rng.randint(0, 50))) for _ in range(400)]
    texts += [
        "".join(
            chr(
                rng.choice(
                    [
                        rng.randint(1, 0x2FF),
                        rng.randint(0x3000, 0x9FFF),
                        rng.randint(0x1F300, 0x1F6FF),
                    ]
                )
            )
            for _ in range(20)
        )
        for _ in range(200)
    ]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(ranks, text), text
        assert ours.decode(ids) == text
    assert max(map(max, filter(None, map(ours.encode, texts)))) < len(ranks)


def test_special_tokens_chat_and_training(made):
    ranks, folder = made
    n, ours = len(ranks), Chat(folder)
    assert ours.stop_ids == {n + 1, n + 2} and ours.special["bos_token"] == "[BOS]"
    ids = [n + 3, *theirs(ranks, "你好"), n + 2, n + 4]
    assert ours.encode([{"role": "user", "content": "你好"}]) == ids and ours.decode(ids) == "你好"
    assert ours.encode(f"<|tool_call_begin|>[PAD]<|reserved_token_{n + 77}|>") == [
        n + 5,
        n + 255,
        n + 77,
    ]
    assert ours.decode([n + 5, n + 1]) == "<|tool_call_begin|>"
    assert Encoder(ours, folder).vocab_size == n + 256 and Encoder(ours, folder).prefix == []
    trained = load_tokenizer(folder)
    assert (trained.vocab_size, trained.eos_id) == (n + 256, n + 1)
    assert trained.encode("the [EOS]").tolist() == theirs(
        ranks, "the [EOS]"
    )  # in training text a special token's text is text
    assert trained.token_bytes.tolist()[:n] == [
        len(t) for t, _ in sorted(ranks.items(), key=lambda p: p[1])
    ]
    assert trained.name == load_tokenizer(f"{folder}/tiktoken.model").name


def test_copies_and_an_identity_of_their_own(made, tmp_path):
    """What import and init_from copy is enough; another tokenizer_config.json is another tokenizer."""
    provenance.copy_files(made[1], str(tmp_path))
    assert load_tokenizer(str(tmp_path)).name == load_tokenizer(
        made[1]
    ).name and tokenizer_folder.find(str(tmp_path)).endswith("tiktoken.model")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"][str(len(made[0]) + 9)] = {"content": "<|new|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).name != load_tokenizer(made[1]).name


def test_exported_as_one_file_that_everybody_reads(made, tmp_path):
    ranks, folder = made
    tokenizer_files.write(str(tmp_path), {}, Companions(None, folder, ()), 4096)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*CORPUS, "你好<|im_end|>[PAD]"):
        assert (
            inner.encode(text).ids == Chat(folder).encode(text) == Chat(str(tmp_path)).encode(text)
        )


@pytest.mark.parametrize("companions", [lambda folder: Companions(None, folder, ()), Companions])
def test_an_export_needs_no_code_of_others(companions, made, tmp_path):
    """Of a run's tokenizer, and of a checkpoint's own files: transformers asks for the code that auto_map
    names."""
    folder = made[1]
    if companions is Companions:
        provenance.copy_files(folder, str(tmp_path))
    tokenizer_files.write(str(tmp_path), {}, companions(folder), 4096)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "auto_map" not in config and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert Chat(str(tmp_path)).encode("你好<|im_end|>") == Chat(folder).encode("你好<|im_end|>")


@pytest.mark.slow  # importing it takes seconds
def test_transformers_reads_an_export(made, tmp_path):
    transformers, folder = pytest.importorskip("transformers"), made[1]
    tokenizer_files.write(str(tmp_path), {}, Companions(None, folder, ()), 4096)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs("你好<|im_end|> the").input_ids == Chat(folder).encode("你好<|im_end|> the")


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda lines, config: lines.append(b"AAAA x"), "is not base64 and a rank"),
        (lambda lines, config: lines.pop(3), "its ranks are not 0, 1, 2"),
        (lambda lines, config: config.pop("auto_map"), "no tokenizer in auto_map"),
        (
            lambda lines, config: config["auto_map"].update(
                AutoTokenizer=["x/y--tokenization_other.T", None]
            ),
            "tokenization_other.T",
        ),
    ],
)
def test_files_that_are_not_read(change, named, made, tmp_path):
    shutil.copytree(made[1], tmp_path / "m")
    lines = (tmp_path / "m" / "tiktoken.model").read_bytes().splitlines()
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    change(lines, config)
    (tmp_path / "m" / "tiktoken.model").write_bytes(b"\n".join(lines))
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    for read in (Chat, load_tokenizer):
        with pytest.raises(UserError) as error:
            read(str(tmp_path / "m"))
        assert (
            named in str(error.value)
            and "tiktoken.model" in str(error.value)
            and "\n" not in str(error.value)
        )
