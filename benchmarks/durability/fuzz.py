"""Feeds random mutations of good files to everything that parses a checkpoint (make fuzz).

  python -m benchmarks fuzz [--seconds=60] [--seed=0]

The parsers of safetensors heads and indexes, manifests, pieces.json, Orbax's tree and `extra` get
valid files with bytes changed, cut, repeated, exchanged between files, numbers made huge and keys
doubled. A parser may take a file or refuse it as bad or newer; anything else, and any call that
takes a second or 64 MB, is a failure. Prints executions and failures; exit code 1 if there are any.
"""

import json
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from etils import epath

from deepseek_jax.checkpoint import integrity, local, manifest, sharded
from deepseek_jax.checkpoint.manifest import Manifest
from deepseek_jax.plan import options
from deepseek_jax.tensorfile import bounded_json, header
from deepseek_jax.tensorfile.arrays import TensorSpec
from deepseek_jax.tensorfile.bounded_json import BadFile

SLOW, LARGE = 1.0, 1 << 26  # seconds and bytes of one call
_WORDS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"..",
    b"/etc/passwd",
    b"\\u0000",
    b"\xff",
    b"9223372036854775807",
    b"9223372036854775808",
    b"18446744073709551616",
    b'"a":1,"a":2',
    b"[" * 500,
    b"F64",
    b"BF16",
    b"\0" * 8,
)


def run(seconds: float, seed: int) -> tuple[int, list[str]]:
    """Calls the parsers for so many seconds: (calls made, a line for each failure)."""
    rng = np.random.default_rng(seed)
    failures: list[str] = []
    executions = 0
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        targets = _targets(epath.Path(folder))
        seeds = [raw for _, _, raws in targets for raw in raws]
        tracemalloc.start()
        try:
            while time.monotonic() < until:
                name, parse, raws = targets[executions % len(targets)]
                raw = _mutate(raws[int(rng.integers(len(raws)))], seeds, rng)
                tracemalloc.reset_peak()
                held, started = tracemalloc.get_traced_memory()[0], time.monotonic()
                problem = ""
                try:
                    parse(raw)
                except (BadFile, manifest.NewerFormat) as e:
                    problem = "a line break in the message" if "\n" in str(e) else ""
                except Exception as e:
                    problem = f"{type(e).__name__}: {e}"
                took, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1] - held
                problem = problem or (
                    f"{took:.1f} s"
                    if took > SLOW
                    else f"{peak / 1e6:.0f} MB"
                    if peak > LARGE
                    else ""
                )
                executions += 1
                if problem and len(failures) < 20:
                    failures.append(f"{name}: {problem[:200]} from {raw[:300]!r}")
        finally:
            tracemalloc.stop()
    return executions, failures


def _targets(folder: epath.Path) -> list[tuple[str, Callable[[bytes], object], list[bytes]]]:
    """Name, parser of bytes, and good files of each."""
    tensors = {
        "params/a": TensorSpec((2, 3), np.dtype(np.float32)),
        "step": TensorSpec((), np.dtype(np.int32)),
        "empty": TensorSpec((0, 7), np.dtype(np.uint8)),
    }
    data = bytes(sum(t.nbytes for t in tensors.values()))
    (folder / "file").write_bytes(header.encode(tensors) + data)
    good = (folder / "file").read_bytes()

    def as_file(parse: Callable[..., object], name: str = "file") -> Callable[[bytes], object]:
        def call(raw: bytes) -> object:
            (folder / name).write_bytes(raw)
            return parse(folder / name)

        return call

    def dump(value: object) -> bytes:
        return json.dumps(value).encode()

    index = dump(
        {
            "metadata": {"total_size": 28},
            "weight_map": {"params/a": "state-00001-of-00001.safetensors"},
        }
    )
    pieces = dump(
        {
            "params/a": {
                "dtype": "F32",
                "shape": [4, 3],
                "pieces": [[[0, 2], [0, 3]], [[2, 4], [0, 3]]],
            },
            "step": {"dtype": "I32", "shape": [], "pieces": [[]]},
        }
    )
    sealed = Manifest(
        "full",
        3,
        {"state/a": (5, "00000000"), "extra/metadata": (9, "12345678")},
        {"mesh": [["fsdp", 2]]},
    ).to_bytes()
    tree = dump(
        {
            "tree_metadata": {
                "('a',)": {
                    "key_metadata": [{"key": "a", "key_type": 2}],
                    "value_metadata": {"value_type": "jax.Array"},
                }
            }
        }
    )
    for name in (manifest.NAME, sharded.INDEX, integrity.EXTRA):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return [
        ("safetensors file", as_file(header.read), [good]),
        (
            "safetensors head",
            lambda raw: header.parse(raw, 8 + len(raw) + 28, "head"),
            [good[8:-28]],
        ),
        ("safetensors index", as_file(header.read_index), [index]),
        ("manifest", as_file(lambda path: manifest.read(folder), manifest.NAME), [sealed]),
        (
            "manifest, its checksum made good",
            lambda raw: as_file(lambda path: manifest.read(folder), manifest.NAME)(_reseal(raw)),
            [sealed],
        ),
        ("pieces", lambda raw: local.parse(bounded_json.parse(raw, "pieces.json")), [pieces]),
        ("tree", as_file(lambda path: sharded._names(folder), sharded.INDEX), [tree]),
        (
            "extra",
            as_file(lambda path: integrity.read_extra(folder), integrity.EXTRA),
            [dump({"tokens_seen": 5})],
        ),
    ]


def _reseal(raw: bytes) -> bytes:
    """A manifest with its checksum made good, so that mutations reach what is read after it."""
    try:
        value = json.loads(raw)
        value.pop("checksum", None)
        return manifest._sealed(value)
    except (ValueError, AttributeError, RecursionError):
        return raw


def _mutate(raw: bytes, seeds: list[bytes], rng: np.random.Generator) -> bytes:
    out = bytearray(raw)
    for _ in range(int(rng.integers(1, 6))):
        at, end = sorted(int(i) for i in rng.integers(0, len(out) + 1, 2))
        end = min(end, at + int(rng.integers(1, 40)))
        match int(rng.integers(8)):
            case 0:
                if at < len(out):
                    out[at] = int(rng.integers(256))
            case 1:
                del out[at:end]
            case 2:
                out[at:at] = out[at:end] * int(rng.integers(1, 4))
            case 3:
                out[at:end] = _WORDS[int(rng.integers(len(_WORDS)))]
            case 4:
                out[at:at] = _WORDS[int(rng.integers(len(_WORDS)))]
            case 5:
                other = seeds[int(rng.integers(len(seeds)))]
                start = int(rng.integers(0, len(other)))
                out[at:end] = other[start : start + 60]
            case 6:
                digits = [i for i, c in enumerate(out) if 48 <= c <= 57]
                if digits:
                    i = digits[int(rng.integers(len(digits)))]
                    out[i : i + 1] = str(int(2.0 ** rng.uniform(0, 70))).encode()
            case 7:
                out[:8] = struct.pack("<Q", int(rng.integers(0, 2**63)) >> int(rng.integers(0, 63)))
    return bytes(out)


def main() -> int:
    parser = options.Parser(__doc__, json=False)
    parser.add_argument("--seconds", type=float, default=60.0, help="How long.")
    parser.add_argument("--seed", type=int, default=0, help="Of the mutations.")
    args = parser.parse_args()
    executions, failures = run(args.seconds, args.seed)
    print("\n".join([*failures, f"{executions} executions, {len(failures)} failures"]))
    return int(bool(failures))
