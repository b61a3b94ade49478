"""What one GPU reaches, within ten minutes: training, the grouped expert product, attention; written to benchmarks/results/.

  make gpu-bench EXTRAS=cuda12                or, where JAX has a GPU:
  python -m benchmarks gpu_bench [--toy] [--out=benchmarks/results/gpu_bench]

train      configs/v2_lite.py with as many layers as the compiled step says fit, bfloat16, sequences of 4,096: tokens/s, share of
           989 TFLOP/s, and the tokens/s that the whole model would have at that rate; natural and balanced routing, and cuDNN
           attention; the three largest costs of the profile
peer       transformers' DeepseekV2 in PyTorch, the same layers and tokens on the same card (if torch with CUDA is installed)
experts    the grouped product in bfloat16 at V2-Lite's and V3's shapes: equal slots, ragged_dot, tokamax and Pallas where installed
attention  cuDNN against blocks and plain softmax at query width 192, value width 128

--toy does all of it at toy size, on a CPU in seconds; it is the default where there is no GPU, and then nothing is written
unless --out is given. A part that fails or takes too long is named in the table and does not stop the others.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from deepseek_jax import arguments
from deepseek_jax.plan import options

ROOT = pathlib.Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "gpu_bench"
SECONDS = {"train": 270, "peer": 120, "experts": 90, "attention": 80}  # of every part, at most: together below ten minutes
# Each part has the card to itself. What XLA does on a GPU by BUILD.md's flags is given to the compiler by compile_on.
GPU_ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
BARS = {"tokens_per_s_of_the_whole_model": 24_000, "times_of_the_peer": 2.0}


def main() -> int:
    parser = options.Parser(__doc__)
    parser.add_argument("--toy", action="store_true", help="Toy size, in this process.")
    parser.add_argument("--out", type=arguments.path, help="Where to write NAME.json and NAME.md; benchmarks/results/gpu_bench if it is no toy.")
    parser.add_argument("--part", choices=("train", "experts", "attention"), help="One part, as JSON: what this program calls itself with.")
    own = parser.parse_args()
    if own.part:
        print(json.dumps(part(own.part, own.toy)))
        return 0
    toy = own.toy or not has_gpu()
    result = run(toy)
    out = own.out or (None if toy else OUT)
    if out:
        write(result, pathlib.Path(out))
    print(json.dumps(result, indent=2) if own.json else table(result))
    return 0


def has_gpu() -> bool:
    """Asked in another process: one that has asked holds the card's memory."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "gpu"


def part(name: str, toy: bool) -> dict[str, Any]:
    """One part, in this process."""
    from benchmarks import gpu_parts  # imports JAX, which the process that starts the parts must not

    return {"train": gpu_parts.train, "experts": gpu_parts.experts, "attention": gpu_parts.attentions}[name](toy)


def run(toy: bool) -> dict[str, Any]:
    """All parts: the toy's in this process, others each in its own."""
    started = time.perf_counter()
    call = part if toy else _in_own_process
    result: dict[str, Any] = {"toy": toy, "bars": {}}
    result["train"] = call("train", toy)
    t = result["train"]
    if "failed" in t:
        result["peer"] = {"not_measured": "training failed"}
    else:
        arguments = [str(t[k]) for k in ("layers", "batch_size", "sequence_length")]
        result["peer"] = _python(["-m", "benchmarks.gpu_peer", *arguments, *(["--toy"] if toy else [])], SECONDS["peer"])
    for name in ("experts", "attention"):
        result[name] = call(name, toy)
    result["took_s"] = time.perf_counter() - started
    runs = [r for r in t.get("runs", []) if "tokens_per_s" in r]
    if runs and not toy:
        best = max(runs, key=lambda r: r["tokens_per_s"])
        reached = {"tokens_per_s_of_the_whole_model": best["tokens_per_s_of_the_whole_model"]}
        if "tokens_per_s" in result["peer"]:
            reached["times_of_the_peer"] = runs[0]["tokens_per_s"] / result["peer"]["tokens_per_s"]
        result["bars"] = {k: {"bar": BARS[k], "reached": v, "met": v >= BARS[k]} for k, v in reached.items()}
    return result


def _in_own_process(name: str, toy: bool) -> dict[str, Any]:
    return _python(["-m", "benchmarks", "gpu_bench", f"--part={name}"], SECONDS[name])


def _python(arguments: list[str], seconds: float) -> dict[str, Any]:
    """The last line that a Python program prints, as JSON; or why there is none."""
    print(f"{' '.join(arguments)} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=seconds, cwd=ROOT,
                              env=os.environ | GPU_ENVIRONMENT)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["exit code " + str(done.returncode)])[-1][:300]}
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {seconds} s"}
    except (IndexError, json.JSONDecodeError) as e:
        return {"failed": f"printed no JSON: {e}"}


def write(result: dict[str, Any], out: pathlib.Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".md").write_text(table(result))


def table(r: dict[str, Any]) -> str:
    """Markdown."""
    t = r["train"]
    lines = [f"# One {t.get('device', 'GPU')}{', toy size' if r['toy'] else ''}", ""]
    if "failed" in t:
        lines.append(f"train failed: {t['failed']}")
    else:
        lines += [f"configs/v2_lite.py, {t['layers']} of {t['layers_of_the_model']} layers, bfloat16, {t['batch_size']} sequences of "
                  f"{t['sequence_length']:,}.", "",
                  "| routing | attention | tokens/s | of 989 TFLOP/s | whole model's tokens/s | bytes | rounds |", "|---|---|---|---|---|---|---|"]
        for run in t["runs"]:
            said = [f"failed: {run['failed']}"] + [""] * 4 if "failed" in run else [
                f"{run['tokens_per_s']:,.0f}", f"{run['share_of_peak']:.1%}", f"{run['tokens_per_s_of_the_whole_model']:,.0f}",
                f"{run['bytes'] / 1e9:,.1f} GB", str(run["dispatch_rounds"])]
            lines.append(f"| {run['routing']} | {run['attention']} | {' | '.join(said)} |")
        for cost in t["runs"][0].get("largest_costs", []):
            lines.append(f"\nCost: {cost['share']:.1%}, {cost['ms']:.2f} ms a step: {cost['instruction']} ({cost['from']})")
    p = r["peer"]
    why = p.get("not_measured") or p.get("failed")
    said = f"not measured: {why}" if why else f"{p['tokens_per_s']:,.0f} tokens/s ({p['experts']})"
    lines += ["", f"transformers in PyTorch: {said}", ""]
    lines += _experts(r["experts"]) + _attention(r["attention"])
    for name, bar in r["bars"].items():
        lines.append(f"{'met' if bar['met'] else 'MISSED'}: {name} {bar['reached']:,.1f}, bar {bar['bar']:,}")
    return "\n".join(lines) + "\n"


def _experts(e: dict[str, Any]) -> list[str]:
    if "failed" in e:
        return [f"experts failed: {e['failed']}", ""]
    lines = ["| grouped product | method | forward, TFLOP/s | both gradients, TFLOP/s |", "|---|---|---|---|"]
    for row in e["rows"]:
        for method, rate in row["tflops"]["forward"].items():
            both = row["tflops"]["both"].get(method)
            lines.append(f"| {row['shape']} | {method}{' (fastest forward)' if row['fastest']['forward'] == method else ''} | {rate:,.3g} | "
                         f"{'' if both is None else f'{both:,.3g}'} |")
        lines += [f"| {row['shape']} | {method} | not measured: {why} | |" for method, why in row["not_measured"].items()]
    return [*lines, ""]


def _attention(a: dict[str, Any]) -> list[str]:
    if "failed" in a:
        return [f"attention failed: {a['failed']}", ""]
    lines = [f"| attention, {a['heads']} heads {a['qk']}/{a['v']} | method | forward | forward + backward |", "|---|---|---|---|"]
    for row in a["rows"]:
        for name, t in row["both_s"].items():
            lines.append(f"| {row['length']:,} | {name} | {row['forward_s'][name] * 1e3:,.3g} ms | {t * 1e3:,.3g} ms |")
        lines += [f"| {row['length']:,} | {name} | failed: {why} | |" for name, why in row["failed"].items()]
    return [*lines, ""]
