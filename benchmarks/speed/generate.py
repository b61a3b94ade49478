"""Generation beside transformers' `generate` in PyTorch, on a CPU: tokens per second of prefill and
of decoding.

  python -m benchmarks generate [--model=FOLDER] [--batches=1,4] [--prompt=128] [--tokens=64]
                                [--turns=5] [--draft-tokens=N] [--json]

Both read the same checkpoint, in float32: FOLDER, or a DeepSeek-V3 of 105 million random
parameters, 16 experts per layer. They take turns, each turn with new prompts, and the likeliest token
is chosen. Prefill is the time to the first token; decoding the rest over the tokens after it.
Figures are medians; a ratio is the median over turns of theirs / ours. "the same" is the share of
tokens that are equal up to the first that differs: float32 sums in another order may choose
otherwise where two tokens are nearly as likely. PyTorch has one thread or as many as cores,
whichever was quicker before the turns. It needs torch and transformers (the extra `test`).
"""

import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.support import turns
from benchmarks.support.report import Parser, machine, report
from deepseek_jax import hf
from deepseek_jax.cli import arguments, texts
from deepseek_jax.cli.arguments import numbers
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine

BAR = 1.5  # times transformers' speed of decoding one text
SHAPE = dict(
    vocab_size=16384,
    hidden_size=512,
    num_hidden_layers=8,
    intermediate_size=1408,
    num_attention_heads=8,
    num_key_value_heads=8,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    moe_intermediate_size=384,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    q_lora_rank=None,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    max_position_embeddings=4096,
    num_nextn_predict_layers=0,
)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model",
        type=arguments.path,
        default="",
        help="A Hugging Face checkpoint (default: random weights).",
    )
    parser.add_argument(
        "--batches", type=numbers, default="1,4", help="Texts at once, separated by commas."
    )
    for name, default, about in (
        ("prompt", 128, "Tokens of a prompt."),
        ("tokens", 64, "Tokens of an answer."),
        ("turns", 5, "Turns to time."),
        ("draft-tokens", 0, "Drafts per step by multi-token prediction; 0: none."),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=about)
    own = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(own.model or random_model(folder), own.batches, own)
    report(own, result, text)
    return 0


def random_model(folder: str) -> str:
    """Saves a DeepSeek-V3 of random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**SHAPE)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


def measure(folder: str, batches: list[int], own: Any) -> dict[str, Any]:
    """Both programs in turns, for every size of batch."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None  # answers of a given length, from all tokens
    loaded = hf.load(folder)
    notes: list[str] = []
    placed = BoundModel(loaded.layout, loaded.params, loaded.bias, loaded.mesh)
    engine = Engine(placed, give=True, note=notes.append)
    rng, rows = np.random.default_rng(0), []
    threads: dict[int, int] = {}

    def of_theirs(prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
        started = time.perf_counter()
        with torch.no_grad():
            ids = torch.tensor(prompts)
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - started, out[:, len(prompts[0]) :].tolist()

    def of_ours(prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
        started = time.perf_counter()
        out = engine.generate(prompts, count, draft_tokens=own.draft_tokens)
        return time.perf_counter() - started, out

    for batch in batches:
        print(f"{batch} texts ...", file=sys.stderr)
        prompts = rng.integers(2, loaded.config.vocab_size, (batch, own.prompt)).tolist()
        threads[batch] = quickest_threads(
            functools.partial(of_theirs, prompts, 1 + own.tokens // 4)
        )
        times: dict[str, dict[str, list[float]]] = {
            name: {"prefill": [], "decode": []} for name in ("ours", "theirs")
        }
        same = []
        for turn in range(own.turns + 1):  # the first is to warm up
            prompts = rng.integers(2, loaded.config.vocab_size, (batch, own.prompt)).tolist()
            answers = {}
            for name, run in (("ours", of_ours), ("theirs", of_theirs)):
                first, _ = run(prompts, 1)
                whole, answers[name] = run(prompts, own.tokens)
                if turn:
                    times[name]["prefill"].append(first)
                    times[name]["decode"].append((whole - first) / (own.tokens - 1))
            pairs = zip(answers["ours"], answers["theirs"], strict=True)
            same += [
                next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), own.tokens)
                / own.tokens
                for x, y in pairs
            ]
        row = {"texts": batch, "threads": threads[batch], "same": statistics.mean(same)}
        for part, tokens in (("prefill", batch * own.prompt), ("decode", batch)):
            row[part] = {name: tokens / statistics.median(t[part]) for name, t in times.items()}
            row[part]["ratio"] = turns.ratio(
                {name: t[part] for name, t in times.items()}, "theirs", "ours"
            )
        rows.append(row)
    parameters = sum(p.numel() for p in theirs.parameters())
    return {
        "machine": machine()
        | {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "load": os.getloadavg()[0],
        },
        "model": own.model or "random DeepSeek-V3",
        "parameters": parameters,
        "prompt": own.prompt,
        "tokens": own.tokens,
        "cache": notes,
        "rows": rows,
        "drafts": engine.acceptance if own.draft_tokens else None,
        "bars": {
            f"decodes one text {BAR} times as fast": rows[0]["decode"]["ratio"] >= BAR
            if rows[0]["texts"] == 1
            else None
        },
    }


def quickest_threads(run: Callable[[], Any]) -> int:
    """Gives PyTorch the number of threads that is fastest: all cores, or one where other programs delay
    threads at their barriers."""
    import torch

    times = {}
    for count in sorted({1, machine()["cores"]}):
        torch.set_num_threads(count)
        run()
        started = time.perf_counter()
        run()
        times[count] = time.perf_counter() - started
    best = min(times, key=lambda count: times[count])
    torch.set_num_threads(best)
    return best


def text(r: dict[str, Any]) -> str:
    """The table for a person."""
    head = [
        "texts",
        "prefill",
        "transformers'",
        "ratio",
        "decode",
        "transformers'",
        "ratio",
        "the same",
        "its threads",
    ]
    lines = [head]
    for row in r["rows"]:
        names = ("ours", "theirs", "ratio")
        parts = [
            f"{row[part][name]:,.1f}" + ("" if name != "ratio" else " x")
            for part in ("prefill", "decode")
            for name in names
        ]
        lines.append([str(row["texts"]), *parts, f"{row['same']:.1%}", str(row["threads"])])
    m, said = r["machine"], {True: "met", False: "MISSED", None: "not measured"}
    more = [
        *r["cache"],
        *([r["drafts"]] if r["drafts"] else []),
        *(f"{said[met]}: {name}" for name, met in r["bars"].items()),
    ]
    return (
        f"{r['model']}, {r['parameters'] / 1e6:.0f} million parameters, float32, {m['cores']} "
        f"cores (load {m['load']:.1f}), prompts of "
        f"{r['prompt']} tokens, answers of {r['tokens']}; tokens per second\n\n{texts.table(lines)}\n\n"
        + "\n".join(more)
    )
