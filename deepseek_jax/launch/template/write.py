"""The text of a file, from a `Job` and the *.jinja file of its kind."""

import functools
import json
import os
import re
import shlex
from typing import Any

import jinja2

from deepseek_jax.errors import UserError
from deepseek_jax.launch.template.job import KINDS, Job, check, format_time

_FILES = {
    "slurm": "slurm.sbatch",
    "jobset": "jobset.yaml",
    "rayjob": "rayjob.yaml",
    "ssh": "ssh.sh",
}


def write(kind: str, job: Job) -> str:
    """The file.

    Args:
      kind: one of KINDS.

    Raises:
      UserError: the job cannot be said in a file of this kind.
    """
    if kind not in KINDS:
        raise UserError(f"{kind!r} is not a kind of file. Choose of {', '.join(KINDS)}.")
    check(job, kind)
    variables = dict(job.variables)
    if not job.gpus_per_node:
        variables.setdefault("JAX_PLATFORMS", "cpu")
    return (
        _environment()
        .get_template(f"{_FILES[kind]}.jinja")
        .render(
            job=job,
            variables=variables,
            program=program(job),
            ray=_ray(job),
            own_node=_own(job, "--exclusive", "--mem-per-cpu"),
            own_memory=_own(job, "--mem"),
            own_output=_own(job, "--output"),
            volume=_volume(job),
        )
    )


def _volume(job: Job) -> str:
    """/runs of /runs/v3; "" of a workdir that needs none, s3://bucket/v3."""
    return "/" + job.workdir.split("/")[1] if job.workdir.startswith("/") else ""


def _own(job: Job, *options: str) -> bool:
    """Whether the job has one of these options of sbatch already."""
    return any(d.startswith(options) for d in job.directives)


def program(job: Job) -> list[str]:
    """What each process runs."""
    workdir = [f"--workdir={job.workdir}"] if job.workdir else []
    return [*_interpreter(job), *job.command, *workdir]


def _interpreter(job: Job) -> list[str]:
    """Nothing before a program of its own, as deepseek-jax is. -u: no line waits in a buffer."""
    first = job.command[0]
    return [job.python, "-u"] if first == "-m" or first.endswith(".py") else []


def _ray(job: Job) -> list[str]:
    """What the driver of a RayJob runs."""
    return [
        job.python,
        "-m",
        "deepseek_jax.launch",
        "ray",
        f"--num_workers={job.nodes}",
        f"--gpus_per_worker={job.gpus_per_node}",
        f"--storage_path={os.path.dirname(job.workdir)}",
        f"--name={os.path.basename(job.workdir)}",
        f"--max_failures={job.max_restarts}",
        *job.command,
    ]


def _quoted(text: str) -> str:
    """For bash; also where = or , could be taken for a comparison or a list, as shellcheck does."""
    quoted = shlex.quote(text)
    return f"'{text}'" if quoted == text and re.match("=|.*,", text) else quoted


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
        undefined=jinja2.StrictUndefined,
        comment_start_string="<#",  # bash has ${#list[@]}
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = environment.filters
    filters["sh"] = _quoted
    filters["sh_all"] = shlex.join
    filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)  # YAML reads JSON
    filters["slurm_time"] = format_time
    return environment
