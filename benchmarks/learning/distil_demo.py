"""Half of a mixture's experts are pruned, and what that cost is won back: by cross-entropy, by
distillation, and by distillation that teaches the router too, at equal tokens.

  python -m benchmarks distil_demo [--workdir=runs/distil] [--steps=100] [--seeds=3] [--scale=1]
                                   [--teacher=runs/tiny] [--picture=FILE.svg] [--json]

`make distil` runs it, offline. The teacher is a run of configs/tiny.py on Python's standard library:
that of `make train` if it is there, else one is trained. REAP scores its experts on training text
and keeps 4 of 8. Each seed reads the training text in another order, and all that differs within a
seed is the objective; losses are of the same held-out text. Every stage is a command that is printed
before it runs, so that it can be repeated by hand. The same command again goes on where it was
stopped. --scale below 1 is a rehearsal with so much of every number of steps.

Exit code 1 if the losses are not those that the docstring of configs/post/distil.py states, or if
distillation wins by less than it says; other --steps, --seeds and --scale are not compared.
"""

import json
import pathlib
import sys
from typing import Any

from benchmarks import ROOT
from benchmarks.learning import distil_figures
from benchmarks.learning.stages import CommandFailed, Stages, metrics
from benchmarks.support.report import Parser, report
from deepseek_jax.cli import arguments
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.data.sources import open_corpora, split
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.run import commandline
from deepseek_jax.train import workdir as workdirs

CONFIG, TINY = "configs/post/distil.py", "configs/tiny.py"
MADE_BY_TRAIN = "runs/tiny"  # where `make train` leaves the teacher
EXPERTS = 4  # that are kept, of 8
CALIBRATION_TOKENS = 100_000
CALIBRATION = "calibration.jsonl"
EVALUATIONS = 8  # along a run
# Of every run: those of configs/tiny.py, but for the learning rate.
TRAINING: dict[str, Any] = {
    "data.path": "stdlib",
    "data.eval_fraction": 0.02,
    "train.epochs": 0,
    "train.batch_size": 8,
    "train.sequence_length": 256,
    "train.dtype": "float32",
    "train.remat": "none",
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 10,
    "optimizer.b2": 0.95,
    "checkpoint.every_steps": 100,
    "checkpoint.keep": 1,
    "eval.batches": 16,
}
# From the teacher to the text: a student that is near its teacher has more to learn from the text, and this
# teacher has seen little of it. With alpha constant the teacher's loss is a bound, and cross-entropy on
# enough text passes it.
DISTILLED: dict[str, Any] = {
    "objective": "distill",
    "distill.alpha": 0.9,
    "distill.alpha_schedule": "linear",
    "distill.alpha_final": 0.0,
    "distill.temperature": 1.0,
}
# What each way has on top.
WAYS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"objective": "pretrain"},
    "distilled": DISTILLED | {"distill.router_weight": 0.0},
    "distilled, router": DISTILLED | {"distill.router_weight": 0.05},
}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--workdir", type=arguments.path, default="runs/distil", help="Folder of all that it makes."
    )
    parser.add_argument("--steps", type=int, default=100, help="Each run learns for.")
    parser.add_argument("--seeds", type=int, default=3, help="Orders of the text, for each way.")
    parser.add_argument("--scale", type=float, default=1.0, help="Of every number of steps.")
    parser.add_argument(
        "--teacher",
        type=arguments.path,
        default="",
        help=f"A finished run of {TINY}; none: {MADE_BY_TRAIN} if it is one, else it is trained.",
    )
    parser.add_argument(
        "--picture", type=arguments.path, default="", help="WORKDIR/distil.svg if none is named."
    )
    own = parser.parse_args()
    folder = pathlib.Path(own.workdir)
    demo = Demo(folder, own.steps, own.seeds, own.scale, own.teacher)
    try:
        result = demo.run()
    except CommandFailed as failed:
        print(f"distil_demo: {failed}", file=sys.stderr)
        return failed.ended_with
    svg = pathlib.Path(own.picture or folder / "distil.svg")
    svg.write_text(distil_figures.drawn(result), encoding="utf-8")
    print(f"picture        {svg}", file=sys.stderr)
    report(own, result, distil_figures.text)
    if any(getattr(own, name) != parser.get_default(name) for name in ("steps", "seeds", "scale")):
        return 0
    wrong = distil_figures.differences(result, (ROOT / CONFIG).read_text(encoding="utf-8"))
    print("\n".join(wrong) or f"as {CONFIG} states", file=sys.stderr)
    return int(bool(wrong))


class Demo(Stages):
    """The stages.

    Args:
      folder: of all that they make.
      steps: of each run after pruning.
      seeds: of each way.
      scale: of every number of steps.
      teacher: a finished run of configs/tiny.py; "": as the flag says.

    Raises:
      UserError: the teacher that was named is none.
    """

    def __init__(self, folder: pathlib.Path, steps: int, seeds: int, scale: float, teacher: str):
        self._tiny = config_of(f"--config={TINY}")
        self._teacher_steps = scaled(self._tiny.train.steps, scale)
        self._steps = scaled(steps, scale)
        self._calibration_tokens = scaled(CALIBRATION_TOKENS, scale)
        self._seeds = range(1, seeds + 1)  # 0 is the teacher's
        found = self.find_teacher(teacher, folder / "teacher")
        super().__init__(folder, {"steps": steps, "seeds": seeds, "scale": scale})
        self._teacher = found

    def run(self) -> dict[str, Any]:
        self.begin()
        self.train_teacher()
        self.prune()
        before = self.measured_before()
        runs = {
            way: [self.curve(way, seed, before["eval_loss"]) for seed in self._seeds]
            for way in WAYS
        }
        return {
            "steps": self._steps,
            "tokens": self._steps * self._tokens_a_step,
            "teacher_tokens": self._teacher_steps * self._tokens_a_step,
            "experts": [self._tiny.model.n_routed_experts, EXPERTS],
            "seeds": list(self._seeds),
            "teacher": before["eval_teacher_loss"],
            "pruned": before["eval_loss"],
            "ways": {
                way: distil_figures.summary(curves, runs["cross-entropy"])
                for way, curves in runs.items()
            },
            "curves": runs,
            "options": {
                way: TRAINING | {k: v for k, v in options.items()} for way, options in WAYS.items()
            },
            "minutes": self.minutes,
        }

    @property
    def _tokens_a_step(self) -> int:
        return self._tiny.train.batch_size * self._tiny.train.sequence_length

    # ---- stages

    def find_teacher(self, named: str, own: pathlib.Path) -> pathlib.Path:
        if named:
            if not self.is_teacher(pathlib.Path(named)):
                raise UserError(
                    f"--teacher={named} is not a finished run of {TINY} of {self._teacher_steps} steps. "
                    f"Leave it out, and one is trained."
                )
            return pathlib.Path(named)
        there = ROOT / MADE_BY_TRAIN
        return there if not own.exists() and self.is_teacher(there) else own

    def is_teacher(self, workdir: pathlib.Path) -> bool:
        """Whether it is a run of configs/tiny.py that has come to its end."""
        if not (workdir / "config.json").exists() or not (workdir / "metrics.jsonl").exists():
            return False
        found, tiny = from_config_dict(workdirs.read_config(str(workdir))), self._tiny
        same = all(getattr(found, s) == getattr(tiny, s) for s in ("model", "moe", "optimizer"))
        same = same and found.train.steps == self._teacher_steps and found.data.path == "stdlib"
        last = [row["step"] for row in metrics(workdir) if "eval_loss" in row][-1:]
        return same and last == [self._teacher_steps]

    def train_teacher(self) -> None:
        if not self.is_teacher(self._teacher):
            self.stage(
                "teacher",
                lambda: self.command(
                    "train.py",
                    f"--config={TINY}",
                    f"--workdir={self._teacher}",
                    f"--config.train.steps={self._teacher_steps}",
                ),
            )

    def prune(self) -> None:
        """The teacher with the half of its experts that REAP keeps, as a folder of Hugging Face."""
        if (self.folder / "pruned" / "config.json").exists():
            return
        self.stage("calibration", self.write_calibration)
        self.stage(
            "prune",
            lambda: self.command(
                "-m",
                "deepseek_jax.compress",
                "prune",
                str(self._teacher),
                str(self.folder / "pruned"),
                "--method=reap",
                f"--experts={EXPERTS}",
                f"--text={self.folder / CALIBRATION}",
                f"--tokens={self._calibration_tokens}",
                f"--sequence-length={self._tiny.train.sequence_length}",
                "--dtype=float32",
            ),
        )

    def write_calibration(self) -> None:
        """Training documents, from all over the text: what is held out must not choose experts."""
        tokenizer = load_tokenizer("bytes")
        (corpus,) = open_corpora(self._tiny, tokenizer)
        train, _ = split(corpus, self._tiny.data.eval_fraction)
        every = max(1, train.size // (4 * self._calibration_tokens))
        with open(self.folder / CALIBRATION, "w", encoding="utf-8") as f:
            for start, length in zip(train.starts[::every], train.lengths[::every], strict=True):
                ids = train.tokens[int(start) : int(start + length) - 1]  # without its eos
                f.write(json.dumps({"text": tokenizer.decode(ids.tolist())}) + "\n")

    def train(self, name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """One run of train.py, which resumes by itself. Returns its evaluations."""
        workdir, steps = self.folder / name, options["train.steps"]
        kept = self.folder / f"{name}.jsonl"
        if not kept.exists():
            teacher = {"distill.teacher": str(self._teacher)}
            given = TRAINING | (teacher if options["objective"] == "distill" else {}) | options
            self.stage(
                name,
                lambda: self.command(
                    "train.py",
                    f"--config={CONFIG}",
                    f"--workdir={workdir}",
                    f"--config.init_from={self.folder / 'pruned'}",
                    *(f"--config.{option}={value}" for option, value in given.items()),
                ),
            )
            rows = [row for row in metrics(workdir) if "eval_loss" in row]
            kept.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        assert rows[-1]["step"] == steps, f"{name} was not measured at its end"
        return rows

    def measured_before(self) -> dict[str, Any]:
        """Teacher and student before the first step: of a step too small to change a weight."""
        unmoved = {"train.steps": 1, "optimizer.learning_rate": 1e-12, "optimizer.warmup_steps": 0}
        return self.train("before", WAYS["distilled"] | unmoved)[-1]

    def curve(self, way: str, seed: int, before: float) -> list[list[float]]:
        """[step, held-out loss] of one run, from `before` on."""
        name = f"{way.replace(', ', '-')}-{seed}"
        every = max(1, self._steps // EVALUATIONS)
        own = {"train.steps": self._steps, "eval.every_steps": every, "seed": seed}
        rows = self.train(name, WAYS[way] | own)
        return [[0, before], *([row["step"], row["eval_loss"]] for row in rows)]


def config_of(*flags: str) -> Config:
    return commandline.read_config(commandline.parse(["distil_demo", *flags]))


def scaled(steps: int, scale: float) -> int:
    return max(2, round(steps * scale))
