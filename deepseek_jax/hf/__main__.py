"""Hugging Face checkpoints in and out:

  python -m deepseek_jax.hf import SRC WORKDIR          a run's folder from a checkpoint, for train.py and generate
  python -m deepseek_jax.hf export WORKDIR DST          a checkpoint from a run, for transformers and what else reads these

Import checks the checkpoint and copies it to WORKDIR/hf, without FP8. `train.py --workdir=WORKDIR` begins with it, and generate speaks with it.
Export writes the dtypes that the checkpoint came with, float32 where there was none.
"""

if __name__ == "__main__":
    from deepseek_jax.runtime.huge_pages import use_huge_pages

    use_huge_pages()  # first of all: it starts the program again

import os
import sys
import time
from collections.abc import Iterable

import jax
import numpy as np

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import DTYPES
from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration, exporter, names, provenance, reader, tokenizer_files
from deepseek_jax.hf.tokenizer_files import Companions, contents_of, tokenizer_of
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.run import importer
from deepseek_jax.train import workdir as workdirs


def main() -> int:
    parser = arguments.Parser(prog="python -m deepseek_jax.hf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("import", help="a run's folder from a checkpoint")
    one.add_argument(
        "source",
        type=arguments.path,
        metavar="SRC",
        help="folder with config.json and safetensors files, as on the hub",
    )
    one.add_argument("workdir", type=arguments.path, metavar="WORKDIR", help="folder to make")
    one = commands.add_parser("export", help="a checkpoint from a run")
    one.add_argument(
        "workdir",
        type=arguments.path,
        metavar="WORKDIR",
        help="folder of a run of train.py, or of import",
    )
    one.add_argument("target", type=arguments.path, metavar="DST", help="folder to make")
    one.add_argument("--step", type=int, help="checkpoint to read (default: the newest)")
    one.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of all tensors but the selection bias (default: as they came, else float32)",
    )
    one.add_argument(
        "--max-shard-size",
        type=float,
        default=exporter.FILE_BYTES / 1e9,
        metavar="GB",
        help="of one file (default %(default)g)",
    )
    one.add_argument(
        "--tokenizer",
        type=arguments.path,
        metavar="PATH",
        help="the run's tokenizer.json, if it is not where config.data.tokenizer says any more",
    )
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.command == "import":
        bytes_, model = importer.import_(args.source, args.workdir)
    else:
        bytes_, model = export(
            args.workdir, args.target, args.step, args.dtype, args.max_shard_size, args.tokenizer
        )
    seconds = time.perf_counter() - begun
    print(f"{args.command}: {model}, {bytes_ / 1e9:.3g} GB in {seconds:.1f} s")
    return 0


def export(
    workdir: str,
    target: str,
    step: int | None = None,
    dtype: str | None = None,
    gigabytes: float = 5.0,
    tokenizer: str | None = None,
) -> tuple[int, str]:
    """Writes a run's model as a checkpoint. In memory is a part of an array and the one read ahead: a chunk of the run's checkpoint (256 MB at most
    of sharded ones, 64 MB of others), or a layer of what was imported.

    Returns:
      The bytes written and the family.

    Raises:
      UserError: there is no run or checkpoint, no family has such a model, its tokenizer.json is gone, or
      the target cannot be written.
    """
    saved = from_config_dict(workdirs.read_config(workdir))
    folder = workdirs.checkpoints(workdir, saved)
    untrained = step is None and provenance.is_untrained(workdir, folder)
    notes = provenance.read_notes(workdir)
    family = notes.family if notes else configuration.find_family(saved.model)
    run, mesh = config_for(saved.model, None)
    source = reader.open_source(os.path.join(workdir, provenance.FOLDER))[0] if untrained else None
    checkpoints = None if untrained else Checkpointer(folder, read_only=True)
    stored = None if untrained else checkpoints.source(step)
    if untrained:
        companions = Companions(os.path.join(workdir, provenance.FOLDER))
    else:
        spec = tokenizer_of(workdir, saved, contents_of(checkpoints.read_extra(step)), tokenizer)
        companions = tokenizer_files.of_run(saved, workdir, spec)

    def name_of(leaf: names.Leaf) -> str:
        return (
            f"{'bias' if leaf.path.endswith('e_score_correction_bias') else 'params'}/{leaf.path}"
        )

    def get(leaf: names.Leaf) -> Iterable[reader.Part]:
        if stored is None:
            dtypes = {source.stored_dtype(name) for name in names.tensors(leaf, source.tensors)}
            return reader.parts_of(
                source, leaf, dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
            )
        return ((stored.read(name_of(leaf), index), index) for index in stored.parts(name_of(leaf)))

    with jax.set_mesh(mesh):
        _, params, bias = abstract_model(run)
        leaves = [*names.leaves(params, family, run.model), *names.leaves(bias, family, run.model)]
        for leaf in leaves if stored else ():
            found = stored.shapes.get(name_of(leaf))
            if found is None or found.shape != leaf.shape:
                raise UserError(
                    f"the checkpoint in {folder} is of another model than {workdir}/config.json: {leaf.path} is {found or 'absent'} and not "
                    f"{list(leaf.shape)}. Name the --step of one that this config.json is of."
                )
        dtypes = {} if dtype or notes is None else notes.dtypes
        exporter.export(
            target,
            run.model,
            family,
            leaves,
            get,
            dtypes,
            dtype or "float32",
            companions,
            notes and notes.model,
            int(gigabytes * 1e9),
            source,
        )
    for opened in filter(None, (source, checkpoints)):
        opened.close()
    return sum(
        os.path.getsize(os.path.join(target, f))
        for f in os.listdir(target)
        if f.endswith(".safetensors")
    ), family


if __name__ == "__main__":
    sys.exit(exit_code("hf", main))
