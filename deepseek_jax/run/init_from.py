"""The beginning of a run from a Hugging Face checkpoint: options of its model, weights, notes for an export.

What lies in WORKDIR/hf/ is said in hf/provenance.py.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from deepseek_jax.config import lora_targets, paths, stages
from deepseek_jax.config.options import Config, LoraConfig, RopeScaling, changes_shapes
from deepseek_jax.data import hub_cache, tokenizer_folder
from deepseek_jax.distill import checks
from deepseek_jax.errors import UserError
from deepseek_jax.hf import adapter, names, peft, reader
from deepseek_jax.hf.configuration import find_family
from deepseek_jax.hf.provenance import FOLDER, has_weights, read_notes, write_notes
from deepseek_jax.hf.tensors import HfTensors
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.run import base
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import Layout, TrainState, state_around

OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json")  # which this version does not train with


def with_what_is_known(config: Config, workdir: str | None, argv: Sequence[str] = ()) -> Config:
    """The options with what is known of weights, model and tokenizer.

    A run in the workdir, an import into it or `config.init_from` say so.

    Args:
      config: the options so far.
      workdir: of the run.
      argv: the command line.

    Raises:
      UserError: as `with_model_of_source` and `checks.with_cache`; or the checkpoint has a tokenizer, but no
        tokenizer.json.
    """
    before = workdirs.options(workdir) if workdir else {}
    if (
        workdir
        and not config.init_from
        and not has_weights(workdir)
        and read_notes(workdir) is not None
    ):
        # The run began with a checkpoint: a start before the first of its own must not draw random
        # weights.
        config = dataclasses.replace(config, init_from=str(before.get("init_from") or ""))
    config = _with_adapter(with_model_of_source(config, workdir, argv), before)
    if config.data.tokenizer == "auto":
        tokenizer = _known_tokenizer(config, workdir, before)
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, tokenizer=tokenizer)
        )
    config = checks.with_cache(stages.read(config))
    return paths.absolute_config(config)  # runs of earlier versions kept paths as they were given


def _with_adapter(config: Config, before: dict[str, Any]) -> Config:
    """The options with those of LoRA that config.lora.adapter sets.

    Args:
      before: the options of the run in the workdir, for an adapter that is gone by now.

    Raises:
      UserError: the adapter cannot be read or is not of this model, or an option that it sets has another
        value.
    """
    given = config.lora.adapter
    if not given:
        return config
    if not os.path.isdir(os.path.expanduser(given)) and before.get("lora", {}).get("r"):
        return dataclasses.replace(config, lora=LoraConfig(**before["lora"]))
    family = find_family(config.model)
    found = peft.read(given, config.model, family)
    if config.lora.r not in (0, found.lora.r):
        raise UserError(
            f"config.lora.r={config.lora.r} differs from r={found.lora.r} of config.lora.adapter={given}. "
            f"Leave config.lora.r out: the adapter sets it."
        )
    ours = dataclasses.replace(
        config.lora,
        r=found.lora.r,
        alpha=found.lora.alpha,
        use_rslora=found.lora.use_rslora,
        target_modules=",".join(adapter.targets_of(found, config.model, family)),
        modules_to_save=found.lora.modules_to_save,
    )
    _check_same(config, ours)
    return dataclasses.replace(config, lora=ours)


def _check_same(config: Config, ours: LoraConfig) -> None:
    """Raises UserError: an option of LoRA is set to other than the adapter's."""
    given, defaults, model = config.lora, LoraConfig(), config.model

    def meant(lora: LoraConfig, name: str) -> Any:
        if name == "target_modules":
            return set(lora_targets.targets(model, lora.target_modules))
        return set(lora.saved) if name == "modules_to_save" else getattr(lora, name)

    for name in ("alpha", "use_rslora", "target_modules", "modules_to_save"):
        value = getattr(given, name)
        if value != getattr(defaults, name) and meant(given, name) != meant(ours, name):
            raise UserError(
                f"config.lora.{name}={value} differs from {getattr(ours, name)} of config.lora.adapter="
                f"{given.adapter}. Leave config.lora.{name} out: the adapter sets it."
            )


def _known_tokenizer(config: Config, workdir: str | None, before: dict[str, Any]) -> str:
    """What config.data.tokenizer=auto stands for: `bytes` or a path."""
    ours = os.path.join(os.path.abspath(workdir), FOLDER) if workdir else ""
    kept = tokenizer_folder.find(ours) if ours else None
    of_run = before.get("data", {}).get("tokenizer", "auto")
    if workdir and of_run != "auto" and workdirs.has_checkpoints(workdir, config):
        gone = of_run != "bytes" and not os.path.exists(os.path.expanduser(of_run))
        return kept if gone and kept else of_run
    source = config.init_from and os.path.abspath(os.path.expanduser(config.init_from))
    if source and os.path.isdir(source):
        source = hub_cache.folder_of(source)
    for folder in filter(None, (source, ours)):
        if path := tokenizer_folder.find(folder):
            return path
        if others := [
            name for name in OTHER_TOKENIZERS if os.path.exists(os.path.join(folder, name))
        ]:
            raise UserError(
                f"config.data.tokenizer is not set, and {folder} has {others[0]} but no "
                f"{tokenizer_folder.JSON}. Set it to a {tokenizer_folder.JSON} of that model."
            )
    return "bytes" if of_run == "auto" else of_run


def with_model_of_source(config: Config, workdir: str | None, argv: Sequence[str] = ()) -> Config:
    """The options with the model of `config.init_from`, or of the checkpoint imported into the workdir.

    Options of the model on the command line act where they change no shape, and must agree elsewhere. What a
    config file says of the model does not count.

    Args:
      config, workdir, argv: as `with_what_is_known`.

    Raises:
      UserError: the checkpoint cannot be read, or an option on the command line differs from it.
    """
    if workdir and not config.init_from and has_weights(workdir):
        config = dataclasses.replace(config, init_from=os.path.join(workdir, FOLDER))
    notes = read_notes(workdir) if workdir else None
    if config.init_from and (notes is None or os.path.isdir(os.path.expanduser(config.init_from))):
        where = f"config.init_from={config.init_from}"
        model = reader.open_source(config.init_from)[1]
    elif notes is not None:
        where = f"{workdir}/{FOLDER}"
        model = notes.model
    else:
        return config
    given = [m[1] for m in (re.match(r"--?config\.model\.([\w.]+)=", a) for a in argv) if m]
    for option in given:
        first, _, second = option.partition(".")
        ours, theirs = getattr(config.model, first), getattr(model, first)
        if changes_shapes(f"model.{first}") and ours != theirs:
            raise UserError(
                f"config.model.{option}={ours} differs from {theirs} of {where}. Leave it out: that "
                f"checkpoint sets config.model."
            )
        if isinstance(theirs, RopeScaling):
            ours = dataclasses.replace(theirs, **{second: getattr(ours, second)})
        model = dataclasses.replace(model, **{first: ours})
    return dataclasses.replace(config, model=model)


def open_for_training(config: Config, workdir: str) -> HfTensors | None:
    """The checkpoint of `config.init_from` with all names and shapes checked.

    Returns:
      None where the run has begun and the checkpoint is gone.

    Raises:
      UserError: it cannot be read or does not fit, or its notes would replace a folder that is
        somebody else's.
    """
    if not config.init_from:
        raise UserError(
            f"config.lora.r={config.lora.r} and config.init_from='': there is no base to adapt. Set "
            f"config.init_from to the folder of a Hugging Face checkpoint."
        )
    folder = os.path.join(workdir, FOLDER)
    if os.path.lexists(folder) and not has_weights(workdir) and read_notes(workdir) is None:
        raise UserError(
            f"--workdir={workdir} holds a folder {FOLDER} that is not of a run of train.py. Name "
            f"another --workdir, or move it away."
        )
    if not os.path.isdir(os.path.expanduser(config.init_from)) and read_notes(workdir) is not None:
        return None
    source, _, family = reader.open_source(config.init_from)
    _, params, bias = abstract_model(dataclasses.replace(config, lora=LoraConfig()))
    leaves = [
        leaf for state in (params, bias) for leaf in names.leaves(state, family, config.model)
    ]
    reader.check(source, config.model, leaves)
    return source


def initial_state(
    source: HfTensors | None, config: Config, layout: Layout, workdir: str
) -> TrainState:
    """A state of step 0 with the weights of what `open_for_training` found; writes WORKDIR/hf.

    Raises:
      UserError: it cannot be read.
    """
    if source is None:
        raise UserError(
            f"config.init_from={config.init_from} is not there, and {workdir} holds no checkpoint to go on "
            f"from. Name the folder of the Hugging Face checkpoint."
        )
    _, model, family = reader.open_source(config.init_from)
    if config.lora.r:
        params, bias = base.read(source, config, family, layout.model, everything=True)
        params = nnx.merge_state(params, base.factors(config, layout.model, family))
    else:
        params, bias = reader.state_of(source, config, family, layout.model)
    folder = os.path.join(workdir, FOLDER)
    if jax.process_index() == 0 and not has_weights(workdir):
        temporary = paths.scratch(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        write_notes(source, model, family, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    source.close()
    return state_around(config, layout, params, bias)
