"""Programs that measure and print.

  python -m benchmarks NAME [options]      python -m benchmarks NAME --help

  strategies    memory, communication and step time of every sharding strategy
  collectives   what one layer communicates under every strategy and dispatch method, beside the least it could
  attention     attention against plain softmax attention: time and temporary bytes by sequence length
  moe           routed experts against a dense chain, ragged_dot and a loop over experts
  gpu_bench     what a GPU reaches: training, grouped expert products, attention (make gpu-bench)
  gpu_aot       compiles steps for H200s and checks their collectives (make gpu-aot)
  tiny          trains configs/tiny.py whole and checks its loss (make prove)
"""

import importlib
import sys

from deepseek_jax.config import UserError, exit_code

NAMES = ("strategies", "collectives", "attention", "moe", "gpu_bench", "gpu_aot", "tiny")


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in NAMES:
        raise UserError(f"{name!r} is not a benchmark. Choose one of: {', '.join(NAMES)}.")
    sys.argv = [f"benchmarks {name}", *rest]
    return importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    sys.exit(exit_code("benchmarks", lambda: main(sys.argv[1:])))
