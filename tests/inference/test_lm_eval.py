"""The model for lm-evaluation-harness against transformers.

With the harness where it is installed, else with tests/support/lm_eval_stub.py.
"""

import importlib
import os
import shutil
import sys
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import transformers

from deepseek_jax.errors import UserError
from tests.support import lm_eval_stub
from tests.support.evaluation import log_p


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def adapter(made):
    with pytest.MonkeyPatch.context() as m:
        lm_eval_stub.install(m)
        m.delitem(sys.modules, "deepseek_jax.inference.lm_eval", raising=False)
        module = importlib.import_module("deepseek_jax.inference.lm_eval")
        yield (
            module,
            module.DeepseekJaxLM(str(made[1]), batch_size=4, max_length=48, expert=2, device="cpu"),
        )


@pytest.fixture(scope="module")
def tokenizer(made):
    return transformers.AutoTokenizer.from_pretrained(made[1])


def test_loglikelihood(adapter, made, tokenizer):
    theirs, lm = made[0], adapter[1]
    pairs = [("hello", " world"), ("be kind ", "and 你好"), ("", "hello"), ("kind " * 60, "sunny")]
    found = lm.loglikelihood([request(*p) for p in pairs])
    for (context, continuation), (ll, is_greedy) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        ids = tokenizer(context + continuation).input_ids
        count = len(ids) - max(1, len(tokenizer(stripped).input_ids))
        ids = ids[-49:]
        ps = log_p(theirs, ids[:-1])
        np.testing.assert_allclose(
            ll, sum(ps[i - 1, ids[i]] for i in range(len(ids) - count, len(ids))), rtol=1e-5
        )
        assert is_greedy == all(
            ps[i - 1].argmax() == ids[i] for i in range(len(ids) - count, len(ids))
        )
    ids = tokenizer("hello world").input_ids
    best = int(log_p(theirs, ids)[-1].argmax())
    tokens = [(("", ""), ids, [best]), (("", ""), ids, [best, 5]), (("", ""), ids, [best + 1])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(tokens, disable_tqdm=True)] == [
        True,
        False,
        False,
    ]
    assert lm.batch_size == 4 and lm.eot_token_id == 1 and lm.prefix_token_id == 0


def test_rolling(adapter, made, tokenizer):
    """Every token once, the last window with 48 tokens to read."""
    theirs, lm = made[0], adapter[1]
    texts = ["Kind and sunny: " * 12, "x", "hello world"]
    for text, ll in zip(texts, lm.loglikelihood_rolling([request(t) for t in texts]), strict=True):
        ids = [
            0,
            *tokenizer(text).input_ids,
        ]  # the harness puts bos before what the tokenizer gives
        expected, done = 0.0, 0
        while done < len(ids) - 1:
            end = min(done + 48, len(ids) - 1)
            ps = log_p(theirs, ids[max(0, end - 48) : end])
            expected += sum(ps[i - 1 - max(0, end - 48), ids[i]] for i in range(done + 1, end + 1))
            done = end
        np.testing.assert_allclose(ll, expected, rtol=1e-5)


def test_generate(adapter, tokenizer, monkeypatch):
    """Prompts, limits and stops as they reach the model, and what becomes of its answers."""
    module, lm = adapter
    calls = []

    def generate(prompts, max_tokens, temperature, stop_ids, seed):
        calls.append((prompts, max_tokens, temperature, set(stop_ids)))
        return [
            [*tokenizer(" sunny, be kind. x", add_special_tokens=False).input_ids, 1][:max_tokens]
            for _ in prompts
        ]

    monkeypatch.setattr(lm._model, "generate", generate, raising=False)
    long = "hello " * 99
    one, two = (
        {"until": [".", "\n"], "max_gen_toks": 40},
        {"until": "kind", "max_gen_toks": 41, "do_sample": True, "temperature": 0.5},
    )
    requests = [
        request("hello", one),
        request("world", two),
        request(long, one),
        request("hello", {"until": [], "max_gen_toks": 2}),
    ]
    answers = lm.generate_until(requests)
    first = tokenizer.decode(
        tokenizer(" sunny, be kind. x", add_special_tokens=False).input_ids[:2]
    )
    assert answers == [" sunny, be kind", " sunny, be ", " sunny, be kind", first]
    ids = tokenizer(" sunny", add_special_tokens=False).input_ids
    assert lm._until([*ids, 0, *ids], ["<s>"]) == " sunny"  # special tokens too
    assert lm._until([*ids, 0, *ids], ["x"]) == " sunny sunny"
    by_limit = {c[1]: c for c in calls}
    assert by_limit[40][0] == [
        tokenizer(long).input_ids[-8:],
        tokenizer("hello").input_ids,
    ]  # long ones first, cut to leave room
    assert by_limit[40][2] == 0 and by_limit[41][2] == 0.5 and by_limit[40][3] == {1}
    for options, message in (
        ({"max_gen_toks": 48}, "leaves no room"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 4}, "top_k=4 is not known"),
    ):
        with pytest.raises(UserError, match=message):
            lm.generate_until([request("a", options)])


def test_chat(adapter, made):
    module, lm = adapter
    with pytest.raises(UserError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} [/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    file = made[1] / "chat_template.jinja"
    file.write_text(template)
    try:
        lm = module.DeepseekJaxLM(str(made[1]))
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I say "}]
        assert lm.apply_chat_template(messages[:1]) == "[user] x [/][assistant] "
        # As transformers continues it, with the space that ends it.
        continued = lm.apply_chat_template(messages, add_generation_prompt=False)
        assert continued == "[user] x [/][assistant] I say "
        assert lm.chat_template(True) == template and lm.chat_template(False) is None
        (made[1] / "additional_chat_templates").mkdir()
        (made[1] / "additional_chat_templates" / "short.jinja").write_text(
            "{{ messages[0].content }}"
        )
        lm = module.DeepseekJaxLM(str(made[1]))
        assert lm.chat_template("short") == "{{ messages[0].content }}"
        assert lm.apply_chat_template(messages[:1]) == "x"
    finally:
        shutil.rmtree(made[1] / "additional_chat_templates", ignore_errors=True)
        file.unlink()


def test_bad_arguments(adapter, made):
    make, folder = adapter[0].DeepseekJaxLM, str(made[1])
    for message, arguments in (
        ("max_length=65", {"max_length": 65}),
        ("batch_size=none", {"batch_size": "none"}),
        ("'experts=2' is not AXIS=SIZE", {"experts": 2}),
        ("is not a folder", {"pretrained": folder + "/nothing"}),
    ):
        with pytest.raises(UserError, match=message):
            make(**{"pretrained": folder, **arguments})


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "deepseek_jax.inference.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'deepseek_jax\[lm-eval\]'"):
        importlib.import_module("deepseek_jax.inference.lm_eval")
