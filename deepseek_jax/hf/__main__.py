"""Hugging Face checkpoints in and out:

  python -m deepseek_jax.hf import SRC WORKDIR     a run's folder from a checkpoint, for train.py and generate
  python -m deepseek_jax.hf export WORKDIR DST     a checkpoint from a run, for transformers and others
  python -m deepseek_jax.hf export WORKDIR DST --adapter     what a LoRA run has trained, for PEFT

Import checks the checkpoint and copies it to WORKDIR/hf, without FP8. `train.py --workdir=WORKDIR` begins
with it, and generate speaks with it. Export writes the dtypes that the checkpoint came with, float32 where
there was none. Without --adapter it adds what a LoRA run has trained to its base.
"""

if __name__ == "__main__":
    from deepseek_jax.runtime.huge_pages import use_huge_pages

    use_huge_pages()  # first of all: it starts the program again

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.checkpoint.kind import TensorReader
from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import DTYPES, Config
from deepseek_jax.errors import UserError
from deepseek_jax.hf import (
    adapter_export,
    base,
    configuration,
    exporter,
    names,
    provenance,
    reader,
    tokenizer_files,
)
from deepseek_jax.hf.tensors import HfTensors
from deepseek_jax.hf.tokenizer_files import Companions, contents_of, tokenizer_of
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.run import importer
from deepseek_jax.tensorfile.files import FILE_BYTES
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
        default=FILE_BYTES / 1e9,
        metavar="GB",
        help="of one file (default %(default)g)",
    )
    one.add_argument(
        "--tokenizer",
        type=arguments.path,
        metavar="PATH",
        help="the run's tokenizer.json, if it is not where config.data.tokenizer says any more",
    )
    one.add_argument(
        "--adapter",
        action="store_true",
        help="of a LoRA run the adapter alone, as PEFT writes it (default: merged into its base)",
    )
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.command == "import":
        bytes_, model = importer.import_(args.source, args.workdir)
    elif args.adapter:
        bytes_, model = export_adapter(args.workdir, args.target, args.step)
    else:
        bytes_, model = export(
            args.workdir, args.target, args.step, args.dtype, args.max_shard_size, args.tokenizer
        )
    seconds = time.perf_counter() - begun
    print(f"{args.command}: {model}, {bytes_ / 1e9:.3g} GB in {seconds:.1f} s")
    return 0


def export_adapter(workdir: str, target: str, step: int | None = None) -> tuple[int, str]:
    """Writes what a LoRA run has trained, as adapter_export.export."""
    saved = from_config_dict(workdirs.read_config(workdir))
    folder = workdirs.checkpoints(workdir, saved)
    with contextlib.closing(
        Checkpointer(folder, read_only=True, options=saved.checkpoint)
    ) as checkpoints:
        return adapter_export.export(workdir, target, saved, checkpoints, step)


def export(
    workdir: str,
    target: str,
    step: int | None = None,
    dtype: str | None = None,
    gigabytes: float = FILE_BYTES / 1e9,
    tokenizer: str | None = None,
) -> tuple[int, str]:
    """Writes a run's model as a checkpoint.

    In memory is a part of an array and the one read ahead: a chunk of the run's checkpoint (256 MB at most of
    sharded ones, 64 MB of others), or a layer of what was imported.

    Args:
      workdir: of the run.
      target: the folder to make.
      step: of the run's checkpoint; None: the newest.
      dtype: of all tensors but the selection bias; None: as they came, else float32.
      gigabytes: 10^9 bytes of one file, at most.
      tokenizer: the run's, if it is not where its options say any more.

    Returns:
      The bytes written and the family.

    Raises:
      UserError: there is no run or checkpoint, no family has such a model, its tokenizer.json is gone, or
      the target cannot be written.
    """
    saved = from_config_dict(workdirs.read_config(workdir))
    folder = workdirs.checkpoints(workdir, saved)
    notes = provenance.read_notes(workdir)
    family = notes.family if notes else configuration.find_family(saved.model)
    leaves = _leaves(saved, family)
    source = checkpoints = None
    if step is None and provenance.is_untrained(workdir, folder, saved.checkpoint.local_dir):
        imported = os.path.join(workdir, provenance.FOLDER)
        source = reader.open_source(imported)[0]
        companions = Companions(imported)
        get = _from_import(source)
    else:
        checkpoints = Checkpointer(folder, read_only=True, options=saved.checkpoint)
        contents = contents_of(checkpoints.read_extra(step))
        spec = tokenizer_of(workdir, saved, contents, tokenizer)
        companions = tokenizer_files.of_run(saved, workdir, spec)
        if saved.lora.r:
            get = _from_base(base.open_run(workdir, saved, checkpoints, step))
        else:
            stored = checkpoints.source(step)
            _check_shapes(stored, leaves, folder, workdir)
            get = _from_checkpoint(stored)
    what = exporter.Export(
        model=saved.model,
        family=family,
        leaves=leaves,
        get=get,
        companions=companions,
        notes=notes,
        dtype=dtype,
        file_bytes=int(gigabytes * 1e9),
        source=source,
    )
    exporter.export(target, what)
    if source:
        source.close()
    if checkpoints:
        checkpoints.close()
    written = [name for name in os.listdir(target) if name.endswith(".safetensors")]
    return sum(os.path.getsize(os.path.join(target, name)) for name in written), family


def _leaves(saved: Config, family: str) -> list[names.Leaf]:
    """The arrays of a run's model."""
    run, mesh = config_for(saved.model, None)
    with jax.set_mesh(mesh):
        _, params, bias = abstract_model(run)
    return [leaf for state in (params, bias) for leaf in names.leaves(state, family, run.model)]


def _from_import(source: HfTensors) -> Callable[[names.Leaf], Iterable[reader.Part]]:
    """Arrays of what was imported, in their own dtype where all of their tensors have one."""

    def get(leaf: names.Leaf) -> Iterable[reader.Part]:
        dtypes = {source.stored_dtype(name) for name in names.tensors(leaf, source.tensors)}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        return reader.parts_of(source, leaf, dtype)

    return get


def _from_base(opened: base.AdaptedBase) -> Callable[[names.Leaf], Iterable[reader.Part]]:
    """Arrays of a LoRA run's base with what it has trained, float32."""

    def get(leaf: names.Leaf) -> Iterable[reader.Part]:
        return reader.parts_of(opened.source, leaf, np.dtype(np.float32), opened.adapter)

    return get


def _from_checkpoint(stored: TensorReader) -> Callable[[names.Leaf], Iterable[reader.Part]]:
    """Arrays of a run's checkpoint, in the parts that are quick to read."""

    def get(leaf: names.Leaf) -> Iterable[reader.Part]:
        name = _name_of(leaf)
        return ((stored.read(name, index), index) for index in stored.parts(name))

    return get


def _name_of(leaf: names.Leaf) -> str:
    """What a run's checkpoint calls an array."""
    is_bias = leaf.path.endswith("e_score_correction_bias")
    return f"{'bias' if is_bias else 'params'}/{leaf.path}"


def _check_shapes(
    stored: TensorReader, leaves: list[names.Leaf], folder: str, workdir: str
) -> None:
    for leaf in leaves:
        found = stored.shapes.get(_name_of(leaf))
        if found is None or found.shape != leaf.shape:
            raise UserError(
                f"the checkpoint in {folder} is of another model than {workdir}/config.json: {leaf.path} is "
                f"{found or 'absent'} and not {list(leaf.shape)}. Name the --step of one that this "
                f"config.json is of."
            )


if __name__ == "__main__":
    sys.exit(exit_code("hf", main))
