"""Programs that measure and print.

python -m benchmarks NAME [options]      python -m benchmarks NAME --help
"""

import importlib
import sys

from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError
from deepseek_jax.runtime.huge_pages import use_huge_pages

ABOUT = {  # what each measures; its module has the name
    "step": "the time of a train step, and its share of this machine's matmul peak; --peer: beside transformers in PyTorch",
    "floor": "the parts of a step on a CPU, and the least that each could cost",
    "strategies": "memory, communication and step time of every sharding strategy",
    "levers": "memory and step time with every memory lever: dtypes, remat, accumulation, offload, optimizers, compression",
    "collectives": "what one layer communicates under every strategy and dispatch method, beside the least it could",
    "storm": "kills and stops runs by the dozen and counts what was lost (make storm)",
    "overhead": "what the training loop costs beside the compiled step",
    "attention": "attention against plain softmax attention: time and temporary bytes by sequence length",
    "moe": "routed experts against a dense chain, ragged_dot and a loop over experts",
    "vocabulary": "the loss of chunks of tokens against whole logits: time and temporary bytes by tokens and vocabulary",
    "compile": "compile time of 61 layers against 8",
    "generate": "generation beside transformers' in PyTorch: tokens per second of prefill and decoding",
    "gpu_bench": "what a GPU reaches: training, grouped expert products, attention (make gpu-bench)",
    "gpu_aot": "compiles steps for H200s and checks their collectives (make gpu-aot)",
    "compression": "loss curve and bytes between replicas of gradients summed in float32, bfloat16 and int8",
    "checkpoint": "what asynchronous saves cost training, and the time and memory of restoring",
    "hf_copy": "import and export of a Hugging Face checkpoint beside a plain copy of its bytes",
    "corruption": "damages every kind of file of a checkpoint and counts what restoring makes of it",
    "fuzz": "random mutations of files for everything that parses a checkpoint (make fuzz)",
    "fuzz_options": "random options that validation accepts: each must make a train step (make fuzz-options)",
    "tiny": "trains configs/tiny.py whole and checks its loss (make prove)",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(
            "\n".join([__doc__ or "", *(f"  {name:<12}  {about}" for name, about in ABOUT.items())])
        )
        return 0
    name, rest = argv[0], argv[1:]
    if name not in ABOUT:
        raise UserError(f"{name!r} is not a benchmark. Choose one of: {', '.join(ABOUT)}.")
    sys.argv = [f"benchmarks {name}", *rest]
    return importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    use_huge_pages()  # as train.py does
    sys.exit(exit_code("benchmarks", lambda: main(sys.argv[1:])))
