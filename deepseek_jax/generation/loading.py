"""What to generate with: a Hugging Face checkpoint, or the folder of a run."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config import Config, Mesh, Train, UserError, from_config_dict
from deepseek_jax.generation import text
from deepseek_jax.generation.text import Codec
from deepseek_jax.hf import names, reading, start
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES, make_mesh
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import Layout, TrainState, from_tree, make_layout, to_tree
from deepseek_jax.validation import validate

DTYPES = ("float32", "bfloat16", "float16")
OF_GENERATION = ("data", "fsdp", "expert", "tensor")  # axes that a mesh may have


class Source(NamedTuple):
    """A model and its tokenizer."""

    config: Config
    layout: Layout
    mesh: jax.sharding.Mesh
    params: Any
    bias: Any
    codec: Codec


def mesh_of(option: str) -> dict[str, int]:
    """Devices by axis of "fsdp=2,expert=4"; {} of "".

    Raises:
      UserError: it is not of that form.
    """
    shape: dict[str, int] = {}
    for part in filter(None, option.replace(" ", "").split(",")):
        axis, _, number = part.partition("=")
        if axis not in OF_GENERATION or axis in shape or not number.isdigit() or not int(number):
            raise UserError(f"--mesh={option}: {part!r} is not one axis of {', '.join(OF_GENERATION)} and its number of devices. "
                            f"Set it to, for instance, fsdp=2,expert=4.")
        shape[axis] = int(number)
    return shape


def is_checkpoint(path: str) -> bool:
    """Whether a folder is a Hugging Face checkpoint, and not of a run; both have a config.json."""
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as f:
            return "model_type" in json.loads(f.read(1 << 24))
    except (OSError, ValueError, TypeError):
        return False


def open_source(path: str, step: int | None = None, mesh: Mapping[str, int] | None = None, dtype: str | None = None) -> Source:
    """Reads a model and its tokenizer.

    Args:
      path: a Hugging Face checkpoint, or the folder of a run. step: checkpoint of the run; None: the newest.
      mesh: devices along axes; None or empty: one device. dtype: of the weights and of computation; None: float32 on CPUs, bfloat16 elsewhere.

    Raises:
      UserError: the model or its tokenizer cannot be read, or the mesh does not divide it.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if not is_checkpoint(path):
        config, layout, on, state = load(path, step, mesh, dtype)
        return Source(config, layout, on, state.params, state.bias, text.of_run(path, config))
    if step is not None:
        raise UserError(f"--step={step} is of a run's checkpoints, and {path} is a Hugging Face checkpoint. Leave --step out.")
    codec = text.of_folder(path)
    source, model, family = reading.open_source(path)
    config = runnable(Config(model=model), mesh, dtype)
    on = make_mesh(config, devices_of(config))
    with jax.set_mesh(on):
        layout = make_layout(config, on)
        params, bias = reading.state_of(source, config, family, layout, dtype)
    source.close()
    return Source(config, layout, on, params, bias, codec)


def runnable(config: Config, mesh: Mapping[str, int] | None, dtype: str | None) -> Config:
    """Options with what training alone needs left out: any mesh divides the batch, and weights are on their devices."""
    shape = {a: 1 for a in AXES} | dict(mesh or {})
    length = min(config.model.max_position_embeddings, 512)
    train = Train(dtype=dtype or config.train.dtype, remat="full", batch_size=math.prod(shape[a] for a in BATCH_AXES),
                  sequence_length=max(length, config.model.num_nextn_predict_layers + 1))
    out = Config(model=config.model, data=config.data, moe=config.moe, mesh=Mesh(**shape), train=train, compile=config.compile,
                 checkpoint=config.checkpoint)
    validate(out)
    return out


def devices_of(config: Config) -> list[jax.Device]:
    """As many devices as the mesh has; all there are where that is fewer, for make_mesh to say so."""
    return jax.devices()[: math.prod(getattr(config.mesh, a) for a in AXES)]


def load(workdir: str, step: int | None, mesh: Mapping[str, int] | None = None,
         dtype: str | None = None) -> tuple[Config, Layout, jax.sharding.Mesh, TrainState]:
    """The model of a run, on one device or over a mesh.

    Args:
      dtype: of the computation, and of matrices but the router's; None: the run's computation and float32 weights.

    Raises:
      UserError: there is no run or checkpoint in the folder, or the mesh does not divide the model.
    """
    saved = workdirs.read_config(workdir)
    config = runnable(from_config_dict(saved), mesh, dtype)
    on = make_mesh(config, devices_of(config))
    with jax.set_mesh(on):
        layout = make_layout(config, on)
        wanted = layout.abstract_sharded()._replace(opt_state=(), step=None, bad_steps=None, skipped_steps=None, loss_scale=None, residual=None)
        folder = workdirs.checkpoints(workdir, config)
        if step is None and start.is_untrained(workdir, folder):
            source, _, family = reading.open_source(os.path.join(workdir, start.FOLDER))
            params, bias = reading.state_of(source, config, family, layout, dtype)
            source.close()
            return config, layout, on, wanted._replace(params=params, bias=bias)
        checkpointer = Checkpointer(folder, read_only=True)
        tree = checkpointer.restore_params(to_tree(wanted), step)
        checkpointer.close()
        state = from_tree(tree, wanted)
        return config, layout, on, state._replace(params=cast(state.params, dtype)) if dtype not in (None, "float32") else state


def cast(params: Any, dtype: str) -> Any:
    """Matrices of a state, but the router's, in a dtype; one after another, so that two copies of one alone are there at a time."""

    def one(path: Any, w: jax.Array) -> jax.Array:
        name = names.path_of(path)
        if w.ndim - name.startswith(("layers/", "dense_layers/")) < 2 or name.endswith("/gate/kernel"):
            return w
        return jax.jit(lambda w: w.astype(dtype), out_shardings=w.sharding, donate_argnums=0)(w)

    return jax.tree_util.tree_map_with_path(one, params)

