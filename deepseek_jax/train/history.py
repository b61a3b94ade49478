"""Which rows of the data a step reads: a pure function of the step and of the options that each start of the
run had.

The options of one start would not do: with another batch size the rows before a step are others than those
that were read. Checkpoints keep the list (in `extra`), and so does WORKDIR/config.json, for readers.
"""

import dataclasses
from typing import Any, NamedTuple

from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.option import options_of
from deepseek_jax.config.options import (
    Config,
    DataConfig,
    DistillConfig,
    SftConfig,
    TrainConfig,
)
from deepseek_jax.data import contents as contents_
from deepseek_jax.data.contents import Contents, check_tokenizer
from deepseek_jax.data.sources import split_paths
from deepseek_jax.errors import UserError
from deepseek_jax.train.optimizer import first_sequence, sequences_at

_TRAIN = ("batch_size", "accumulation", "batch_ramp_start", "batch_ramp_steps", "sequence_length")
_SFT = [
    o.name.removeprefix("sft.") for o in options_of(SftConfig, "sft") if o.on_resume == "new pass"
]
_NOT_OF_ROWS = "on_change"  # of config.data


class Stretch(NamedTuple):
    """Steps that were read with the same options."""

    first_step: int  # steps that were done before
    # the first to be read, in the global order without the rows that rollbacks left out; 0 begins an order
    first_row: int
    options: Config  # seed, objective, data, what of train and sft decides on rows; the rest at its defaults
    contents: (
        Contents | None
    )  # of the data; None: written by an earlier version, which did not look


class History(NamedTuple):
    """Stretches by their first step, which is 0 for the first one."""

    stretches: tuple[Stretch, ...] = ()

    @classmethod
    def of_json(cls, value: list[dict[str, Any]]) -> "History":
        """What `to_json` made.

        Raises:
          UserError: it has an option that this version does not know.
        """
        return cls(
            tuple(
                Stretch(
                    s["first_step"], s["first_row"], from_config_dict(s["options"]), s["contents"]
                )
                for s in value
            )
        )

    @classmethod
    def of_config(cls, config: Config) -> "History":
        """Of a run whose data were not looked at, if it never had other options than these."""
        return cls((Stretch(0, 0, _of_rows(config), None),))

    @classmethod
    def of_options(cls, options: dict[str, Any]) -> "History":
        """As `of_config`, of a config.json; what this version does not know is left out.

        Raises:
          UserError: an option has the wrong type.
        """

        def pick(section, names):
            return {k: v for k, v in options.get(section, {}).items() if k in names}

        known = {
            "data": pick("data", [f.name for f in dataclasses.fields(DataConfig)]),
            "train": pick("train", _TRAIN),
        }
        return cls.of_config(from_config_dict(known | {"seed": options.get("seed", 0)}))

    def to_json(self) -> list[dict[str, Any]]:
        return [s._asdict() | {"options": _to_json(s.options)} for s in self.stretches]

    def at(self, step: int) -> Stretch:
        """That of the step after `step` finished ones."""
        return next(s for s in reversed(self.stretches) if s.first_step <= step)

    def order(self, step: int) -> tuple[int, Stretch]:
        """The first step of the order that it reads, and the last stretch of that order, which knows best
        where the data lie.
        """
        i = self.stretches.index(self.at(step))
        first = next(j for j in range(i, -1, -1) if not self.stretches[j].first_row)
        last = next(
            (j for j in range(i, len(self.stretches) - 1) if not self.stretches[j + 1].first_row),
            len(self.stretches) - 1,
        )
        return self.stretches[first].first_step, self.stretches[last]

    def first_row(self, step: int) -> int:
        """The first row of the step after `step` finished ones, where the rows that rollbacks left out do not
        count.
        """
        s = self.at(step)
        return (
            s.first_row + first_sequence(s.options, step) - first_sequence(s.options, s.first_step)
        )

    def count(self, step: int) -> int:
        """How many rows that step reads."""
        return sequences_at(self.at(step).options, step)

    def tokens(self, steps: int) -> int:
        """Tokens in the rows of the first `steps` steps."""
        ends = [s.first_step for s in self.stretches[1:]] + [
            max(steps, self.stretches[-1].first_step)
        ]
        total = 0
        for s, end in zip(self.stretches, ends, strict=True):
            first, last = (first_sequence(s.options, min(n, steps)) for n in (s.first_step, end))
            total += (last - first) * s.options.train.sequence_length
        return total

    def resumed(
        self, step: int, config: Config, contents: Contents | None, earlier: "History | None" = None
    ) -> "History":
        """The list for going on after `step` steps with these options and data.

        Other batch sizes, ramps and accumulation go on with the next row. What makes other rows (seed,
        sequence length, held-out share, mixture, the data themselves) is refused, or with
        config.data.on_change=new_pass begins a new order, at its row 0.

        Args:
          earlier: what is known otherwise of the steps before, for checkpoints of an earlier version, which
          have no list.

        Raises:
          UserError: the rows would be others, or the tokenizer is another one.
        """
        now = _of_rows(config)
        if not step:
            return History((Stretch(0, 0, now, contents),))
        known = self if self.stretches else earlier or History.of_config(config)
        kept = tuple(s for s in known.stretches if s.first_step < step)
        last = kept[-1]
        check_tokenizer(
            last.contents, contents["tokenizer"] if contents else None, config.data.tokenizer
        )
        what = _difference(last, now, contents)
        if what and config.data.on_change != "new_pass":
            raise UserError(
                f"{what} of the checkpoint of step {step}, so its rows are others, and which were "
                f"read is not known. Set it as it was, or config.data.on_change=new_pass to begin "
                f"a new pass over the data as they are now."
            )
        if not what and (now, contents) == (last.options, last.contents):
            return History(kept)
        return History(
            (*kept, Stretch(step, 0 if what else History(kept).first_row(step), now, contents))
        )

    def begins_order(self, step: int) -> bool:
        """Whether the rows that were read before `step` are of another order."""
        return self.stretches[-1][:2] == (step, 0)


def _difference(last: Stretch, now: Config, contents: Contents | None) -> str:
    before = last.options
    for name, was, is_now in (
        ("seed", before.seed, now.seed),
        ("train.sequence_length", before.train.sequence_length, now.train.sequence_length),
        ("data.eval_fraction", before.data.eval_fraction, now.data.eval_fraction),
        ("data.split", before.data.split, now.data.split),
    ):
        if was != is_now:
            return f"config.{name}={is_now} differs from {was or repr(was)}"
    if what := contents_.difference(
        last.contents, contents, split_paths(now.data.path, "config.data.path")
    ):
        return f"{what}, that"
    if last.contents and contents and last.contents["weights"] != contents["weights"]:

        def shares(c):
            return ",".join(f"{w:.4g}" for w in c["weights"])

        return (
            f"config.data.weights={now.data.weights!r} mixes by {shares(contents)} and not "
            f"{shares(last.contents)}, those"
        )
    return ""


def _of_rows(config: Config) -> Config:
    data = dataclasses.replace(config.data, **{_NOT_OF_ROWS: getattr(DataConfig(), _NOT_OF_ROWS)})
    train = TrainConfig(**{name: getattr(config.train, name) for name in _TRAIN})
    sft = SftConfig(**{name: getattr(config.sft, name) for name in _SFT})
    distill = DistillConfig(data=config.distill.data)
    return Config(
        seed=config.seed,
        objective=config.objective,
        data=data,
        train=train,
        sft=sft,
        distill=distill,
    )


def _to_json(options: Config) -> dict[str, Any]:
    data = {k: v for k, v in dataclasses.asdict(options.data).items() if k != _NOT_OF_ROWS}
    train = {name: getattr(options.train, name) for name in _TRAIN}
    out = {"seed": options.seed, "data": data, "train": train}
    if options.objective != "pretrain":
        out["objective"] = options.objective
    if options.objective == "distill":
        out["distill"] = {"data": options.distill.data}
    if options.reads_examples:
        out["sft"] = {name: getattr(options.sft, name) for name in _SFT}
    return out
