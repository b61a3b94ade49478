"""make sft: the model that it makes of a GGUF file, the task, and its stages, at toy size."""

import json
import sys

import numpy as np
import pytest

from benchmarks.learning import arithmetic, sft_demo, smollm2
from benchmarks.repository import blocks, figures
from deepseek_jax import hf
from deepseek_jax.data.chat import Chat
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import header

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
HEADS, KV_HEADS = 4, 2


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A small Llama of random weights, as llama.cpp would have it: some in 4 bits, the others as they are."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(272)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet(), "he", "ll", "12", "Ġh"]
    tokens += [f"<pad{i}>" for i in range(272 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 269)
    writer.add_token_merges(["h e", "l l", "1 2", "Ġ h"])
    for name, value in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(value)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (272, 64), "output_norm": (64,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in LAYER_SHAPES.items()}
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        values = rng.normal(1 if len(shape) == 1 else 0, 0.1, shape).astype(np.float32)
        packed = len(shape) == 2 and "blk" in name
        data = gguf.quantize(values, kind) if packed else values
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind if packed else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LAYER_SHAPES = {
    "attn_norm": (64,),
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_output": (64, 64),
    "ffn_norm": (64,),
    "ffn_gate": (96, 64),
    "ffn_up": (96, 64),
    "ffn_down": (64, 96),
}


def alphabet():
    import tokenizers

    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_the_model_of_a_gguf_file_is_that_of_transformers(gguf_file, tmp_path):
    """Every tensor, the logits; a digit is a token of its own; the template and the stop token."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    count = smollm2.write_folder(gguf_file, tmp_path / "model")
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    assert count == sum(p.numel() for p in theirs.parameters())
    ids = [3, 40, 7, 200, 12, 99, 5]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    # float32 sums of 64 products in another order
    np.testing.assert_allclose(hf.load(tmp_path / "model")([ids]), expected, rtol=0, atol=2e-5)
    stored = header.read(tmp_path / "model" / "model.safetensors", "")
    tied = {name for name in theirs.state_dict() if name != "lm_head.weight"}
    assert stored.keys() == tied
    chat = Chat(str(tmp_path / "model"))
    assert chat.render([{"role": "user", "content": "hello 12"}], add_generation_prompt=False) == (
        "<|im_start|>user\nhello 12<|im_end|>\n"
    )
    split = [chat.tokenizer.id_to_token(i) for i in chat.encode("hello 12")]
    assert split == ["he", "ll", "o", "Ġ", "1", "2"] and chat.stop_ids == {2}


def test_another_architecture_is_refused(gguf_file, tmp_path, monkeypatch):
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    keys["tokenizer.ggml.pre"] = "llama-bpe"

    class Field:
        def __init__(self, value):
            self.contents = lambda: value

    class Other:
        fields = {name: Field(value) for name, value in keys.items()}

    monkeypatch.setattr(gguf, "GGUFReader", lambda _: Other)
    with pytest.raises(UserError, match="llama-bpe"):
        smollm2.write_folder(gguf_file, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_worked_answers():
    """Intermediate sums and the result, negative ones too; the last number of a text."""

    def answer(expression):
        return arithmetic.worked(arithmetic.Problem("", "", expression))

    assert answer("15 - 43 + 7") == "15 - 43 = -28\n-28 + 7 = -21\n<answer>-21</answer>"
    assert answer("9 + 0") == "9 + 0 = 9\n<answer>9</answer>"
    assert arithmetic.last_number("so 1,200 - 5 is -5.") == "-5"
    assert arithmetic.last_number("none") is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Something like reasoning-gym: whoever imports it as a package wants others, its two modules do not."""
    top = tmp_path / "site" / "reasoning_gym"
    (top / "arithmetic").mkdir(parents=True)
    for folder in (top, top / "arithmetic"):
        (folder / "__init__.py").write_text("import package_that_is_not_there\n")
    (top / "utils.py").write_text(
        "import re\n"
        "def extract_answer(text):\n"
        "    found = re.findall('<answer>(.*?)</answer>', text)\n    return found[-1] if found else None\n"
    )
    (top / "arithmetic" / "chain_sum.py").write_text(
        "import dataclasses\nfrom reasoning_gym import utils\n"
        "@dataclasses.dataclass\nclass ChainSumConfig:\n    seed: int\n    size: int\n    min_terms: int\n"
        "    max_terms: int\n    min_digits: int\n    max_digits: int\n"
        "class ChainSumDataset:\n"
        "    def __init__(self, config):\n        self.config = config\n"
        "    def __iter__(self):\n"
        "        for i in range(min(self.config.size, 600)):\n"
        "            a, b = (self.config.seed + i) % 50, i % 3\n"
        "            yield {'question': f'{a} + {b} =', 'answer': str(a + b), 'metadata': "
        "{'expression': f'{a} + {b}'}}\n"
        "    def score_answer(self, answer, entry):\n        return float(answer == entry['answer'])\n"
    )
    monkeypatch.syspath_prepend(str(top.parent))
    for name in [m for m in sys.modules if m.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    yield top
    for name in [m for m in sys.modules if m.split(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


def test_no_held_out_problem_is_learnt(package):
    """Nor does any come twice; a worked answer has the full mark, and another none."""
    task = arithmetic.Task()
    held_out = task.held_out(20)
    learn = task.to_learn(100, 0, held_out)
    questions = [p.question for p in [*held_out, *learn]]
    assert len(set(questions)) == 120
    assert all(task.score(arithmetic.worked(p), p) == 1 for p in learn)
    assert task.score("12", learn[0]) == 0
    with pytest.raises(UserError, match="fewer"):
        task.to_learn(200, 0, held_out)


class Recorded(sft_demo.Demo):
    """A demo whose commands are noted and answered: the model before is wrong, the others are not."""

    commands: list = []
    fails = ""

    def make_model(self):
        pass

    def make_data(self):
        questions = [{} for _ in self.problems]
        sft_demo.write_lines(self.folder / sft_demo.HELD_OUT, questions)
        sft_demo.write_lines(self.folder / sft_demo.CHECKED, questions[: sft_demo.BATCH])
        return 7, 1234

    def figures(self, name):
        return {"learns": "1 of 2"}

    def command(self, *words, grows=None, lines=0):
        self.commands.append(words)
        if self.fails and self.fails in " ".join(words):
            raise sft_demo.CommandFailed("it failed", 3)
        if "deepseek_jax.generate" in words:
            learnt = not words[2].endswith(sft_demo.MODEL) or "--adapter" in words[3]
            asked = self.problems[:lines]
            said = [arithmetic.worked(p) if learnt else f"It is {p.answer}" for p in asked]
            said[0] = "?"
            rows = [{"text": t, "finish_reason": "stop" if learnt else "length"} for t in said]
            sft_demo.write_lines(grows, rows)
        if "export" in words:
            folder = self.folder / words[4].rpartition("/")[2]
            folder.mkdir()
            adapter = "--adapter" in words
            (folder / ("adapter_config.json" if adapter else "config.json")).touch()


def test_the_stages_go_on_where_they_were_stopped(package, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_demo, "BATCH", 4)
    Recorded.commands, Recorded.fails = [], "lora"
    with pytest.raises(sft_demo.CommandFailed) as failed:
        Recorded(tmp_path / "run", 1000, 10).run()
    assert failed.value.ended_with == 3
    done = len(Recorded.commands)
    Recorded.fails = ""
    result = Recorded(tmp_path / "run", 1000, 10).run()
    again = Recorded.commands[done:]
    assert not any("before" in " ".join(words) for words in again), "the first answers are kept"
    assert [words[2] for words in again if words[0] == "train.py"] == [
        f"--workdir={tmp_path / 'run' / 'lora'}"
    ]
    before, full, lora = result["rows"]
    assert (before["accuracy"], before["last_number_right"], before["stopped"]) == (0, 0.9, 0)
    assert full["accuracy"] == lora["accuracy"] == 0.9 and full["stopped"] == 1
    same = result["exports_answer_the_same"]
    assert same == {"full-export": True, "lora-export": True, "lora-adapter": True}
    assert result["minutes"] > 0 and full["seconds"] > 0
    text = sft_demo.text(result)
    assert "90%" in text and text.count("the same answers to 4 questions") == 3
    table = blocks.sft_demo_table(result, "[here](there)")
    assert table.count("\n| ") == 4 and "90% full" in figures.sft_demo(result)
    json.dumps(result)
    with pytest.raises(UserError, match="begun with --tokens=1000 --held-out=10"):
        Recorded(tmp_path / "run", 2000, 10).run()


def test_a_page_shows_the_result_between_its_marks(tmp_path, monkeypatch):
    page = "before\n<!-- figure sft_demo: make docs -->\nold\n<!-- end of figure -->\nafter\n"
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert "No result is kept yet" in figures.shown(page)
    kept = {"result": [1], "machine": {"cores": 2}, "commit": "abc"}
    (tmp_path / "sft_demo.json").write_text(json.dumps(kept))
    monkeypatch.setitem(figures.BLOCKS, "sft_demo", lambda result, link: f"{result} {link}")
    new = figures.shown(page)
    assert "old" not in new and "[1] [2 cores, abc](../benchmarks/results/sft_demo.json)" in new
    assert new.startswith("before\n") and new.endswith("after\n") and figures.shown(new) == new
