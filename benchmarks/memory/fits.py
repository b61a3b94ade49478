"""What a GPU that is not here would hold: bytes of steps as XLA's compiler for an H200 allots them.

  .venv-gpu-aot/bin/python -m benchmarks fits lora_v2_lite|distil_qwen3_30b [--only=int8] [--json]

lora_v2_lite: LoRA of rank 16 on every expert of DeepSeek-V2-Lite, on one GPU of 80 GB, by what its
base is held in. distil_qwen3_30b: Qwen3-30B-A3B teaches a student of half its experts on 8 H200s, by
what the teacher is held in, with the full vocabulary, and beside it the student alone. Only shapes
are needed, no weights. Each row takes some minutes and some GB of memory; a row that --out=FILE has
already is not compiled again, and says of which commit it is. Needs JAX's GPU compiler (make plan
installs it).
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import jax

from benchmarks.support.report import Parser, report
from deepseek_jax.cli import texts
from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration
from deepseek_jax.plan import options, topology
from deepseek_jax.plan import report as plan_report

HARDWARE = topology.HARDWARE["h200"]


class Case(NamedTuple):
    """Some steps to compile.

    Attributes:
      devices: GPUs. memory: bytes of each that a program may plan with.
      config: a config file. given: options of all rows.
      rows: further options of each, by name.
    """

    about: str
    devices: int
    memory: int
    config: str
    given: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]


# config.json of Qwen/Qwen3-30B-A3B, as far as it says shapes and mathematics.
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
STUDENT_EXPERTS = 64

CASES = {
    "lora_v2_lite": Case(
        "DeepSeek-V2-Lite, LoRA r=16 on every linear map and expert, 4 x 2,048 tokens in 4 micro-batches",
        1,
        80_000_000_000,
        "configs/v2_lite.py",
        (
            "--config.mesh.data=1",
            "--config.mesh.expert=1",
            "--config.train.batch_size=4",
            "--config.train.accumulation=4",
            "--config.train.sequence_length=2048",
            "--config.lora.r=16",
        ),
        {name: (f"--config.lora.base_dtype={name}",) for name in ("bfloat16", "int8", "nf4")},
    ),
    "distil_qwen3_30b": Case(
        "Qwen3-30B-A3B teaches a student with 64 of its 128 experts, 16 x 2,048 tokens in 2 micro-batches",
        8,
        141_000_000_000,
        "configs/post/distil.py",
        (
            "--config.data.path=stdlib",
            "--config.mesh.fsdp=8",
            "--config.train.steps=100",
            "--config.train.dtype=bfloat16",
            "--config.train.batch_size=16",
            "--config.train.accumulation=2",
            "--config.train.sequence_length=2048",
            "--config.train.remat=full",
        ),
        {
            "student alone": ("--config.objective=pretrain",),
            "teacher bfloat16": (
                "--config.distill.teacher={teacher}",
                "--config.distill.teacher_dtype=bfloat16",
            ),
            "teacher int8": (
                "--config.distill.teacher={teacher}",
                "--config.distill.teacher_dtype=int8",
            ),
        },
    ),
}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("case", choices=sorted(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--only", default="", help="The rows whose names have this word.")
    jax.config.update("jax_platforms", "cpu")
    own = parser.parse_args()
    if not topology.has_gpu_compiler():
        raise UserError(
            f"JAX's CUDA plugin is missing. Run make plan, or install it: {topology.INSTALL}."
        )
    case = CASES[own.case]
    result: dict[str, Any] = {
        "about": case.about,
        "devices": case.devices,
        "memory": case.memory,
        "rows": kept_rows(own),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name in case.rows:
            if own.only not in name or name in result["rows"]:
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            row = measure(case, name, pathlib.Path(scratch))
            result["rows"][name] = row | {"commit": own.commit}
            report(own, result, text)
    return 0


def kept_rows(own: Any) -> dict[str, Any]:
    """The rows that --out has."""
    if not own.out or not pathlib.Path(own.out).exists():
        return {}
    return json.loads(pathlib.Path(own.out).read_text(encoding="utf-8"))["result"]["rows"]


def measure(case: Case, name: str, scratch: pathlib.Path) -> dict[str, Any]:
    """Bytes of a GPU in the step of one row."""
    config = config_of(case, name, scratch)
    devices = topology.gpu_devices(HARDWARE, case.devices, 8)
    mesh, layout = topology.lay_out(config, devices)
    stored = layout.bytes_per_device(mesh)
    found = plan_report.of_program(topology.compile_step(config, mesh, layout), mesh, HARDWARE)
    m, c = found["memory"], found["compile"]
    return {
        "stored": stored,
        "arguments": m["arguments"],
        "temporaries": m["temporaries"],
        "total": m["total"],
        "fits": m["total"] <= case.memory,
        "received": found["bytes"],
        "compile_seconds": c["lower_seconds"] + c["compile_seconds"],
    }


def config_of(case: Case, name: str, scratch: pathlib.Path) -> Config:
    """The options of a row. The teacher is a folder with a config.json and no weights."""
    given = [flag.format(teacher=scratch) for flag in (*case.given, *case.rows[name])]
    if case.config.endswith("distil.py"):
        (scratch / "config.json").write_text(json.dumps(QWEN3_30B), encoding="utf-8")
        student = configuration.to_model(QWEN3_30B | {"num_experts": STUDENT_EXPERTS})
        given += [
            f"--config.model.{field.name}={getattr(student, field.name)}"
            for field in dataclasses.fields(student)
            if getattr(student, field.name) != getattr(ModelConfig(), field.name)
        ]
    _, config = options.read(options.Parser(), [f"--config={case.config}", *given])
    return config


def text(r: dict[str, Any]) -> str:
    rows = [["", "stored", "temporaries", "total", "fits"]]
    for name, row in r["rows"].items():
        stored = texts.gb(row["arguments"])
        fits = "yes" if row["fits"] else "NO"
        rows.append([name, stored, texts.gb(row["temporaries"]), texts.gb(row["total"]), fits])
    gpus = texts.plural(r["devices"], "GPU")
    return f"{r['about']}; {gpus} of {texts.gb(r['memory'])}\n{texts.table(rows, '  ')}"
