"""What `show` and `verify` of `python -m deepseek_jax.distill` do."""

from typing import Any

from deepseek_jax.cli.progress import Bar
from deepseek_jax.cli.texts import gb, plural
from deepseek_jax.distill import manifest as manifests
from deepseek_jax.distill import shards
from deepseek_jax.distill.manifest import Manifest

Answer = tuple[int, Any, list[str]]  # exit code, result as JSON has it, lines of text


def describe(manifest: Manifest) -> list[str]:
    """What a cache is, line by line."""
    m = manifest
    scales = ", ".join(f"{t:g}" for t in m.temperatures)
    mesh = " x ".join(f"{a} {n}" for a, n in m.program["mesh"].items() if n > 1) or "one device"
    return [
        f"{'rows':<15}{m.rows:,} of {m.length:,} tokens: {m.train_rows:,} of training, {m.eval_rows:,} held "
        "out",
        f"{'record':<15}{m.token_bytes} bytes per token: {m.top} ids of {m.id_bytes} bytes, logits of "
        f"float16, log-sum-exp at {scales}",
        f"{'size':<15}{gb(m.total_bytes)} in {plural(m.shards, 'shard')} of "
        f"{plural(m.rows_per_shard, 'row')}",
        f"{'teacher':<15}{m.teacher[:19]}, {m.vocab_size:,} words, {m.dtype}",
        f"{'program':<15}{m.program['rows_per_call']} rows per call on {mesh} ({m.program['platform']})",
        f"{'tokenizer':<15}{m.contents['tokenizer'][:19]}",
    ]


def show(folder: str) -> Answer:
    found = manifests.read(folder, "DIR")
    gone = shards.missing(folder, found)
    there = found.shards - len(gone)
    lines = [
        *describe(found),
        *(f"{name:<23}{value}" for name, value in sorted(found.options.items())),
        f"{'complete':<15}{there:,} of {found.shards:,} shards",
        f"{'made by':<15}{found.command}",
    ]
    result = {
        "rows": found.rows,
        "sequence_length": found.length,
        "top_k": found.top,
        "temperatures": list(found.temperatures),
        "token_bytes": found.token_bytes,
        "bytes": found.total_bytes,
        "shards": found.shards,
        "complete": there,
        "teacher": found.teacher,
        "dtype": found.dtype,
        "program": dict(found.program),
        "options": dict(found.options),
        "contents": found.contents,
        "command": found.command,
    }
    return 0, result, lines


def verify(folder: str) -> Answer:
    found = manifests.read(folder, "DIR")
    gone = set(shards.missing(folder, found))
    bad = []
    there = [i for i in range(found.shards)]
    with Bar("Comparing", found.total_bytes, True) as bar:
        for size, file, what in shards.verify(folder, found, there):
            bar.advance(size)
            if what:
                bad.append({"file": file, "what": what})
    state = "good"
    if bad:
        state = "not complete" if all(b["what"] == "missing" for b in bad) else "damaged"
    lines = [f"{folder}: {state}", *(f"  {b['file']}: {b['what']}" for b in bad)]
    if bad:
        stems = sorted({b["file"].partition(".")[0] for b in bad if b["what"] != "missing"})
        first = f"remove {', '.join(f'{s}.*' for s in stems)}, then " if stems else ""
        lines.append(f"  {first}run: {found.command}")
    result = {"state": state, "bad": bad, "missing": len(gone), "command": found.command}
    return int(bool(bad)), result, lines
