"""What `python -m deepseek_jax.distill cache` does: from a command line to the shards of one worker."""

import argparse
import contextlib
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from deepseek_jax.cli.texts import gb, human, plural
from deepseek_jax.cluster import gpus
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.config.validation import validate
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.fields import INPUTS, RECORD
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.open import open_data
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.distill import checks, commands, identity, maker, manifest, shards
from deepseek_jax.distill.manifest import Manifest
from deepseek_jax.distill.program import RecordProgram, devices_of_batch
from deepseek_jax.errors import UserError
from deepseek_jax.objectives.base import Frozen
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import commandline, init_from
from deepseek_jax.run.teacher import Teacher, open_teacher
from deepseek_jax.runtime import compile_cache
from deepseek_jax.train import workdir as workdirs
