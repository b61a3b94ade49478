"""Folders of runs that never ran, with all that a report shows: made in milliseconds, the same every time."""

import json
import math
import pathlib
from typing import Any

import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.train import load_history, starts
from deepseek_jax.train.load_history import LoadHistory

Row = dict[str, Any]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\u2028\"'&amp;<!--"


def folder(path: pathlib.Path, steps: int = 100, layers: int = 3, experts: int = 8) -> pathlib.Path:
    """The folder of a run that has not begun.

    Args:
      layers: of the model, the first of which has no experts.
    """
    path.mkdir(parents=True)
    config = Config().to_json()
    config["model"] |= {
        "first_k_dense_replace": 1,
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
    }
    config["train"]["steps"] = steps
    (path / "config.json").write_text(json.dumps(config | {"last_step": steps}))
    return path


def rows_of(steps: int, every: int = 1, seed: int = 0, start: int = 0) -> list[Row]:
    """Rows as a run logs them, with evaluations at every tenth of the run."""
    rng = np.random.default_rng(seed)
    out: list[Row] = []
    for step in range(start + every, steps + 1, every):
        done = step / steps
        loss = 1.6 + 3.2 * math.exp(-9 * done) + rng.normal(0, 0.05)
        out.append(
            {
                "step": step,
                "loss": round(loss, 6),
                "lm_loss": round(loss - 0.01, 6),
                "balance_loss": round(1 + 0.3 * math.exp(-5 * done) + rng.normal(0, 0.005), 6),
                "lr": 3e-3 * min(step / (0.05 * steps + 1), math.cos(1.4 * done) ** 2),
                "grad_norm": round(float(rng.lognormal(-0.5, 0.25)), 7),
                "skipped_steps": 0,
                "step_time_s": round(float(rng.gamma(400, 0.001)), 6),
                "tokens_per_sec": round(float(rng.normal(41234.5, 600)), 2),
                "tokens_seen": step * 16384,
                "utilisation": round(float(rng.normal(0.41, 0.01)), 4),
                "memory_gb": round(61.2 + min(done, 0.3), 4),
                "max_violation": round(0.2 + 4 * math.exp(-12 * done) + rng.random() * 0.1, 6),
                "routing_entropy": round(0.999 - 0.2 * math.exp(-12 * done), 6),
                "dispatch_rounds": 1 + (done < 0.1),
                "device_imbalance": round(0.1 + rng.random() * 0.05, 6),
                "left_device_share": round(0.75 + rng.normal(0, 0.002), 6),
                "dropped_tokens": 0,
            }
        )
        if step % max(steps // 10, 1) < every:
            held = loss + 0.08
            out.append(
                {
                    "step": step,
                    "eval_loss": held,
                    "eval_tokens": 8192,
                    "eval_bits_per_byte": held / 0.69,
                }
            )
    return out


def append(path: pathlib.Path, rows: list[Row]) -> None:
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)


def write_load(path: pathlib.Path, steps: int, layers: int, experts: int, every: int = 1) -> None:
    """expert_load.npy of a run whose experts become balanced but for one."""
    rng = np.random.default_rng(1)
    kind = load_history.record(layers, experts)
    history = LoadHistory(str(path / load_history.NAME), kind, 0, every)
    skew_LE = rng.normal(0, 1, (layers, experts))
    for step in range(every, steps + 1, every):
        spread_LE = skew_LE * math.exp(-8 * step / steps) + rng.normal(0, 0.08, (layers, experts))
        spread_LE[layers // 2, 1] -= 2.5 * (step > 0.6 * steps)
        share_LE = np.exp(spread_LE)
        history.add(step, np.rint(16384 * share_LE / share_LE.sum(axis=1, keepdims=True)))
    history.close()


def whole(path: pathlib.Path, steps: int = 400, text: str = "cluster-3") -> pathlib.Path:
    """A run with everything: two starts, a spike, NaN rows with a rollback, checkpoints, eight devices of two
    processes, a profile and answers.

    Args:
      text: stands wherever a user may give a name.
    """
    folder(path, steps, layers=6, experts=16)
    config = json.loads((path / "config.json").read_text())
    config["data"]["path"] = config["log"]["run_name"] = text
    (path / "config.json").write_text(json.dumps(config))
    half, bad = steps // 2, 7 * steps // 10
    rows = rows_of(steps)
    for row in rows:
        if "lr" in row and bad <= row["step"] < bad + 3:
            del row["loss"], row["lm_loss"], row["grad_norm"]
            row["rows"] = [[8 * row["step"] - 8, 8 * row["step"]]]
        if "lr" in row and row["step"] >= bad:
            row["skipped_steps"] = min(row["step"] - bad + 1, 3)
    spike = {"step": half + 20, "spike_loss": 4.25, "median_loss": 1.8, "deviations": 31.5}
    rows.append(spike | {"rows": [[8 * half + 152, 8 * half + 160]]})
    rollback = {"step": bad + 3, "rollback": 1, "rolled_back_from": bad + 13}
    rows.append(rollback | {"skipped_rows": [[8 * bad, 8 * bad + 104]]})
    for row in rows:
        if row["step"] == half + 20 and "loss" in row:
            row["loss"] = 4.25
    append(path, sorted(rows, key=lambda r: (r["step"], "rollback" not in r)))
    write_load(path, steps, 5, 16)
    about = {
        "time": 1.8e9,
        "mesh": [
            ["data", 1],
            ["stage", 1],
            ["fsdp", 2],
            ["expert", 4],
            ["context", 1],
            ["tensor", 1],
        ],
        "processes": starts.in_runs([0, 0, 0, 0, 1, 1, 1, 1]),
        "across": ["fsdp"],
        "device_kind": "NVIDIA H200",
        "strategy": "full_shard",
        "dispatch": "all_to_all",
        "parameters": 1_890_000,
        "active": 1_060_000,
        "bytes_per_device": {"parameters": 3.1e9, "gradients": 3.1e9, "optimizer": 6.2e9},
        "data": f"{text}: 731 documents, 12.1M tokens",
        "versions": {"deepseek_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.7"},
    }
    starts.add(str(path), about | {"step": 0, "reached": 0})
    changed = [f"config.log.run_name: a -> {text}"]
    starts.add(
        str(path),
        about | {"step": half, "reached": half + 37, "sequence": 8 * half, "changed": changed},
    )
    (path / "processes").mkdir()
    for number in range(2):
        said = {
            "process": number,
            "host": f"{text}-{number}",
            "pid": 4000 + number,
            "state": "ended",
        }
        said |= {"step": steps, "time": 1.8e9 + number, "memory_gb": 61.5}
        (path / "processes" / f"{number:05d}.json").write_text(json.dumps(said))
    (path / "profile").mkdir()
    parts = {
        "attention": 0.012,
        "experts": 0.031,
        "dispatch": 0.008,
        "loss": 0.004,
        "optimizer": 0.006,
    }
    each = {
        n: {"forward": s / 3, "recompute": 0.0, "backward": 2 * s / 3} for n, s in parts.items()
    }
    (path / "profile" / "summary.json").write_text(json.dumps({"steps": "10 to 14", "parts": each}))
    (path / "answers").mkdir()
    for step in (half, steps):
        answer = {
            "prompt": f"What is {text}?",
            "answer": f"{text}\nof step {step}",
            "reference": "2",
        }
        (path / "answers" / f"{step}.jsonl").write_text(json.dumps(answer) + "\n")
    sample = json.dumps({"step": steps, "text": f"def {text}():\n    return"})
    (path / "samples.jsonl").write_text(sample + "\nnot JSON\n")
    for step in (half, steps):
        state = path / "checkpoints" / str(step) / "state"
        state.mkdir(parents=True)
        (state / "a").write_bytes(b"12345")
    return path
