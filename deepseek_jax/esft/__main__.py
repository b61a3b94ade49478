"""Expert-specialised fine-tuning (ESFT, arXiv:2407.01906): train the experts alone that a task uses.

  python -m deepseek_jax.esft score MODEL --data=FILE --out=experts.json --score=gate --top-p=0.2
      which experts MODEL sends a task's tokens to, layer by layer, and the most used as a table
  python train.py --config=... --config.init_from=MODEL --config.esft.experts=experts.json
      trains these experts and nothing else

MODEL is a checkpoint of Hugging Face or the folder of a run; FILE as config.data.path: texts, token files, or
examples in any format of fine-tuning (chats by the model's template), by what its first row is. The table is
ESFT's expert_cfg.json with the scores beside it. An expert's score is its share in its layer: of the weights
that tokens give to their experts (gate), or of their choices (token). Experts are taken in falling score
until their sum reaches top_p. DeepSeek's script divides by the sum over layers instead: its top_p is another.

Exit codes: 0 done; 2 a mistake, said in one line.
"""

if __name__ == "__main__":
    from deepseek_jax.runtime.huge_pages import use_huge_pages

    use_huge_pages()  # before all other work: it starts the program again

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.cli.texts import human
from deepseek_jax.config.options import DTYPES, CompileConfig
from deepseek_jax.config.paths import check_output
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.documents import find_files, split_paths
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.esft import scores
from deepseek_jax.hf.provenance import model_files
from deepseek_jax.inference.opener import Opened, open_model, parse_mesh
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.runtime import compile_cache
from deepseek_jax.train import expert_table
from deepseek_jax.train.expert_table import ExpertTable

SEQUENCE = 4096  # tokens, where the model takes as many: ESFT's
BATCH_TOKENS = 4096  # of a batch per device, unless the user says how many sequences there are


def parser() -> arguments.Parser:
    top = arguments.Parser(prog="python -m deepseek_jax.esft", description=__doc__)
    p = top.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser(
        "score", description=__doc__
    )
    p.add_argument("model", type=arguments.path, metavar="MODEL", help="folder with the model")
    p.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    p.add_argument(
        "--data", type=arguments.path_list, required=True, metavar="FILE", help="the task's texts"
    )
    p.add_argument("--out", type=arguments.path, required=True, metavar="FILE", help="the table")
    p.add_argument(
        "--score", choices=scores.SCORES, default="gate", help="share of what (default %(default)s)"
    )
    p.add_argument(
        "--top-p",
        "--top_p",
        type=float,
        default=0.2,
        help="of a layer's scores (default %(default)s)",
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=1 << 17,
        help="that are read, drawn at random; 0: all (default %(default)s, the paper's)",
    )
    p.add_argument("--seed", type=int, default=0, help="of that draw (default %(default)s)")
    p.add_argument(
        "--shared-experts",
        "--train_shared_experts",
        action="store_true",
        help="train these as well",
    )
    p.add_argument(
        "--non-expert-modules",
        "--train_non_expert_modules",
        action="store_true",
        help="train all that is no expert as well",
    )
    p.add_argument(
        "--sequence-length", type=int, help=f"tokens of a sequence (default: {SEQUENCE})"
    )
    p.add_argument("--batch-size", type=int, help="sequences of a batch, over the whole mesh")
    p.add_argument("--mesh", help="devices, as fsdp=2,expert=4 (default: one)")
    p.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of weights and computation")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p={args.top_p} is not above 0 and at most 1. Set it to 0.2.")
    texts = (f.path for s in split_paths(args.data, "--data") for f in find_files(s, "--data"))
    check_output("--out", args.out, [*texts, *model_files(args.model)])
    compile_cache.use_cache(
        CompileConfig().cache_dir, warn=lambda line: print(line, file=sys.stderr)
    )
    opened = open_model(args.model, args.step, args.dtype, parse_mesh(args.mesh))
    model = opened.model.config
    if not model.has_experts:
        raise UserError(f"{args.model} has no routed experts. Name a mixture-of-experts model.")
    used = _usage(opened, args)
    layers, scores_LE = expert_table.expert_layers(model), used.scores(args.score)
    table = ExpertTable(
        {
            n: scores.chosen(scores_E, args.top_p)
            for n, scores_E in zip(layers, scores_LE, strict=True)
        },
        args.shared_experts,
        args.non_expert_modules,
    )
    expert_table.write(
        args.out,
        table,
        {
            "score": args.score,
            "top_p": args.top_p,
            "tokens": used.tokens,
            "model": args.model,
            "data": args.data,
            "scores": {
                str(n): [round(float(s), 8) for s in scores_E]
                for n, scores_E in zip(layers, scores_LE, strict=True)
            },
        },
    )
    print(text(table, scores_LE, used.tokens))
    print(f"wrote          {args.out}")
    return 0


def _usage(opened: Opened, args: argparse.Namespace) -> scores.Usage:
    model = opened.model
    longest = model.config.max_position_embeddings
    length = args.sequence_length or min(SEQUENCE, longest)
    if not 1 < length <= longest:
        raise UserError(
            f"--sequence-length={length} is not between 2 and the model's max_position_embeddings={longest}."
        )
    shards = math.prod(model.mesh.shape[axis] for axis in BATCH_AXES)
    wanted = args.batch_size or shards * max(1, BATCH_TOKENS // length)
    batch = max(1, -(-wanted // shards)) * shards
    if opened.folder is not None:
        path, special = tokenizer_folder.find(opened.folder) or "", False
    else:
        assert opened.run is not None
        path, special = (
            opened.tokenizer or opened.run.data.tokenizer,
            opened.run.data.special_tokens,
        )
    if not path:
        raise UserError(
            f"{args.model} has no {tokenizer_folder.JSON}. Put the model's beside its config.json."
        )
    tokenizer = load_tokenizer(path, special_tokens=special)
    config = scores.data_config(model, args.data, path, length, args.seed)
    return scores.usage(model, scores.packed(config, tokenizer, args.tokens, batch))


def text(table: ExpertTable, scores_LE: np.ndarray, tokens: int) -> str:
    """A table for people: how many experts every layer trains, and their share of the score."""
    counts = [len(chosen) for chosen in table.experts.values()]
    lines = [f"read           {human(tokens)} tokens"]
    for (layer, chosen), scores_E in zip(table.experts.items(), scores_LE, strict=True):
        share = float(np.sum(scores_E[list(chosen)]))
        first = ", ".join(map(str, chosen[:12])) + (", ..." if len(chosen) > 12 else "")
        lines.append(
            f"{f'layer {layer}':<15}{len(chosen):>3} of {len(scores_E)} experts, {share:.1%} of the score: "
            f"{first}"
        )
    total = sum(counts)
    lines.append(
        f"experts        {total} of {scores_LE.size} ({total / scores_LE.size:.1%}), "
        f"{min(counts)} to {max(counts)} of a layer"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code("esft", main))
