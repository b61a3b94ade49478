"""Hugging Face checkpoints in and out:

  python -m deepseek_jax.hf import SRC WORKDIR          a run's folder from a checkpoint, for train.py and generate
  python -m deepseek_jax.hf export WORKDIR DST          a checkpoint from a run, for transformers and what else reads these

Import makes WORKDIR/checkpoints/0 (weights only, float32), WORKDIR/config.json and WORKDIR/hf. `train.py --workdir=WORKDIR` goes on from there
with that model. Export writes the dtypes that the checkpoint came with, float32 where there was none.
"""

import argparse
import dataclasses
import os
import sys
import time

import jax

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config import Config, Data, UserError, exit_code, from_config_dict
from deepseek_jax.hf import configuration, exporting, names, reading, start
from deepseek_jax.hf.model import config_for
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import abstract_model, make_layout, to_tree


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deepseek_jax.hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("import", help="a run's folder from a checkpoint")
    one.add_argument("source", metavar="SRC", help="folder with config.json and safetensors files, as on the hub")
    one.add_argument("workdir", metavar="WORKDIR", help="folder to make")
    one = commands.add_parser("export", help="a checkpoint from a run")
    one.add_argument("workdir", metavar="WORKDIR", help="folder of a run of train.py, or of import")
    one.add_argument("target", metavar="DST", help="folder to make")
    one.add_argument("--step", type=int, help="checkpoint to read (default: the newest)")
    one.add_argument("--dtype", choices=exporting.DTYPES, help="of all tensors but the selection bias (default: as they came, else float32)")
    one.add_argument("--max-shard-size", type=float, default=exporting.FILE_BYTES / 1e9, metavar="GB", help="of one file (default %(default)g)")
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.command == "import":
        bytes_, model = import_(args.source, args.workdir)
    else:
        bytes_, model = export(args.workdir, args.target, args.step, args.dtype, args.max_shard_size)
    seconds = time.perf_counter() - begun
    print(f"{args.command}: {model}, {bytes_ / 1e9:.3g} GB in {seconds:.1f} s")
    return 0


def import_(source_folder: str, workdir: str) -> tuple[int, str]:
    """Makes WORKDIR from a checkpoint, on all devices of this process.

    Returns:
      The checkpoint's bytes and its family.

    Raises:
      UserError: it cannot be read, or the folder holds a run already.
    """
    checkpoints = os.path.join(workdir, "checkpoints")
    if os.path.exists(os.path.join(workdir, "config.json")) or os.path.isdir(checkpoints) and any(n.isdigit() for n in os.listdir(checkpoints)):
        raise UserError(f"{workdir} holds a run already. Name a new folder.")
    source, model, family = reading.open_source(source_folder)
    run, mesh = config_for(model, None)
    with jax.set_mesh(mesh):
        layout = make_layout(run, mesh)
        params, bias = reading.state_of(source, run, family, layout)
    workdirs.prepare(workdir, run)
    start.write_notes(source, model, family, workdir)
    writer = Checkpointer(checkpoints, keep=0)
    writer.save(0, to_tree({"params": params, "bias": bias}), {"tokens_seen": 0})
    writer.wait()
    writer.close()
    tokenizer = os.path.join(os.path.abspath(workdir), start.FOLDER, "tokenizer.json")
    data = Data(tokenizer=tokenizer) if os.path.exists(tokenizer) else Data()
    workdirs.write_config(workdir, Config(model=model, data=data))
    source.close()
    return sum(t.nbytes for t in source.tensors.values()), family


def export(workdir: str, target: str, step: int | None = None, dtype: str | None = None, gigabytes: float = 5.0) -> tuple[int, str]:
    """Writes a run's model as a checkpoint, one array of it in memory at a time.

    Returns:
      The bytes written and the family.

    Raises:
      UserError: there is no run or checkpoint, no family has such a model, or the target cannot be written.
    """
    saved = from_config_dict(workdirs.read_config(workdir))
    notes = start.read_notes(workdir)
    family = notes.family if notes else configuration.find_family(saved.model)
    run, mesh = config_for(saved.model, None)
    checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"), keep=0, read_only=True)
    with jax.set_mesh(mesh):
        layout = make_layout(dataclasses.replace(run, moe=saved.moe), mesh)
        wanted = layout.abstract_sharded()
        shapes = {names.path_of(p): (top, s) for top, state in (("params", wanted.params), ("bias", wanted.bias))
                  for p, s in jax.tree_util.tree_leaves_with_path(state)}

        def get(leaf: names.Leaf) -> jax.Array:
            top, shape = shapes[leaf.path]
            tree: dict = {}
            node = tree.setdefault(top, {})
            *parents, last = leaf.path.split("/")
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = shape
            return jax.tree.leaves(checkpoints.restore_params(tree, step))[0]

        _, params, bias = abstract_model(run)
        leaves = [*names.leaves(params, family, run.model), *names.leaves(bias, family, run.model)]
        files = os.path.join(workdir, start.FOLDER) if notes else None
        dtypes = {} if dtype or notes is None else notes.dtypes
        tokenizer = None if saved.data.tokenizer == "bytes" else saved.data.tokenizer
        exporting.export(target, run.model, family, leaves, get, dtypes, dtype or "float32", files, notes and notes.model, tokenizer,
                         int(gigabytes * 1e9))
    checkpoints.close()
    return sum(os.path.getsize(os.path.join(target, f)) for f in os.listdir(target) if f.endswith(".safetensors")), family


if __name__ == "__main__":
    sys.exit(exit_code("hf", main))
