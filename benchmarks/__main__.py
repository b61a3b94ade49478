"""Programs that measure and print.

python -m benchmarks NAME [options]      python -m benchmarks NAME --help
"""

import importlib
import sys

from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError
from deepseek_jax.runtime.huge_pages import use_huge_pages

# Folder -> name -> what it measures. The module has the name, in gpu/ without "gpu_".
GROUPS = {
    "speed": {
        "step": "time of a train step and its share of the best matmul; --peer: beside PyTorch",
        "sft": "fine-tuning on short chats, packed, beside TRL's SFTTrainer, which pads",
        "distill": "what a teacher costs a step: online, by its likeliest words, from a cache",
        "advise": "the advisor's first choice beside other plans, on virtual devices of this CPU",
        "predicted": "predicted step times beside measured ones, on virtual devices of this CPU",
        "floor": "the parts of a step on a CPU, and the least that each could cost",
        "overhead": "what the training loop costs beside the compiled step",
        "attention": "attention against plain softmax attention: time and temporary bytes by length",
        "moe": "routed experts against a dense chain, ragged_dot and a loop over experts",
        "vocabulary": "the chunked loss against whole logits: time and temporary bytes",
        "compile": "compile time of 61 layers against 8",
        "generate": "generation beside transformers in PyTorch: prefill and decoding, tokens per second",
        "pack": "packing tokenised chats into rows, beside TRL: seconds and memory",
        "hf_copy": "import and export of a Hugging Face checkpoint beside a plain copy of its bytes",
    },
    "memory": {
        "strategies": "memory, communication and step time of every sharding strategy",
        "fits": "bytes of LoRA and of distillation on GPUs that are not here, as their compiler allots them",
        "levers": "memory and step time with every memory lever: dtypes, remat, offload, optimizers, ...",
        "collectives": "what one layer communicates, beside the least it could",
        "compression": "loss and bytes of gradients summed in float32, bfloat16 and int8",
    },
    "durability": {
        "storm": "kills and stops runs by the dozen and counts what was lost (make storm)",
        "checkpoint": "what asynchronous saves cost training, and the time and memory of restoring",
        "corruption": "damages every kind of file of a checkpoint and counts what restoring makes of it",
        "fuzz": "random mutations of files for everything that parses a checkpoint (make fuzz)",
        "fuzz_options": "random options that validation accepts must make a train step (make fuzz-options)",
    },
    "gpu": {
        "gpu_bench": "what a GPU reaches: training, grouped expert products, attention (make gpu-bench)",
        "gpu_roofline": "predicted speed of V2-Lite on 1 and 8 GPUs that are not here (plan --roofline)",
        "gpu_aot": "compiles steps for H200s and checks their collectives (make gpu-aot)",
    },
    "learning": {
        "tiny": "trains configs/tiny.py whole and checks its loss (make prove)",
        "fp8": "the loss with experts in FP8 beside the same run without",
        "distil_demo": "half of the experts pruned, and won back: cross-entropy, distillation (make distil)",
        "sft_demo": "a real chat model learns sums, whole and by LoRA: marks before and after (make sft)",
        "picture": "draws the loss and the expert load of a run from its metrics.jsonl",
    },
    "repository": {
        "measures": "the repository's own measures: width, imports, parameters, files",
        "figures": "writes the figures of docs/ from results/ (make docs)",
    },
}
ABOUT = {name: about for group in GROUPS.values() for name, about in group.items()}


def module_of(name: str) -> str:
    """The module of a program; its `main` runs it."""
    group = next(group for group, names in GROUPS.items() if name in names)
    return f"benchmarks.{group}.{name.removeprefix('gpu_')}"


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        lines = [__doc__ or ""]
        for group, names in GROUPS.items():
            lines += [f"{group}/", *(f"  {name:<12}  {about}" for name, about in names.items()), ""]
        print("\n".join(lines).rstrip())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in ABOUT:
        raise UserError(f"{name!r} is not a benchmark. Choose one of: {', '.join(ABOUT)}.")
    sys.argv = [f"benchmarks {name}", *rest]
    return importlib.import_module(module_of(name)).main()


if __name__ == "__main__":
    use_huge_pages()  # as train.py does
    sys.exit(exit_code("benchmarks", lambda: main(sys.argv[1:])))
