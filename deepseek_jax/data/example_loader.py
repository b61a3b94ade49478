"""The loader of fine-tuning: examples packed into rows, in an order that is a pure function of (seed, row
index), and held-out examples.

Examples are packed once, in the order of their files. An epoch is all of these rows in a new order, so that
which examples a step reads follows from the numbers of its rows.
"""

import numpy as np

from deepseek_jax.cli.texts import human
from deepseek_jax.config.options import Config, value_of
from deepseek_jax.data import contents, example_choice
from deepseek_jax.data.documents import DataNotes, split_paths
from deepseek_jax.data.example_packing import ExampleRows, Piece
from deepseek_jax.data.examples import Encoder, open_examples
from deepseek_jax.data.fields import (
    EXAMPLES,
    RECORD,
    Fields,
    Rows,
    join_rows,
    padding_row,
    stack_rows,
)
from deepseek_jax.data.loader import (
    EVAL_SEED,
    PACK,
    Places,
    Span,
    bad_id,
    in_global_order,
    interleave,
)
from deepseek_jax.data.order import derive_seed, permutation
from deepseek_jax.data.sources import parse_weights
from deepseek_jax.data.token_marks import marked
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError


class ExampleLoader:
    """Opens, checks, splits and packs the examples of a config. As `loader.Loader`, with `summary` besides.

    Every process makes its own and sees the same rows.

    Args:
      config: reads data, sft, train.batch_size, train.sequence_length and seed.
      tokenizer: of `config.data.tokenizer`.
      encoder: makes ids of rows.
      folder: where tokenised examples are kept for later starts; None: nowhere.
      progress: show bars on stderr of what takes long.
      fields: what batches have.

    Attributes:
      num_train_rows: rows of one epoch. num_eval_rows: held-out rows, 0 for eval_fraction=0.
      train_tokens, eval_tokens: tokens in the examples of each side, without what is cut off.
      encoder: made ids of their rows. description: the data in a few words. contents: what a later start
        compares.
      notes: lines about what was left out or changed in reading. summary: what is trained, line by line.

    Raises:
      UserError: a source is missing, unreadable or holds no examples; nothing is trained on; there are too
        few examples for a batch.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        encoder: Encoder,
        folder: str | None = None,
        progress: bool = False,
        fields: Fields = EXAMPLES,
    ):
        self.tokenizer = tokenizer
        self.encoder = encoder
        self._config = config
        self._fields = fields
        known = EXAMPLES | RECORD
        if missing := [name for name in fields if name not in known]:
            raise UserError(
                f"config.data.path={config.data.path!r} gives no {', '.join(missing)}, which the objective "
                f"of this run reads: rows of examples have {', '.join(known)}."
            )
        weights = parse_weights(config)  # before the reading, which may take long
        _check_epochs(config)
        notes = DataNotes()
        self._examples = open_examples(config, tokenizer, encoder, folder, progress, notes)
        encoder.format = (
            self._examples.facts.format
        )  # also where kept examples were not encoded now
        self.notes = [*notes.lines(), *self._examples.facts.notes]
        choice = example_choice.choose(self._examples, config, encoder.stop_ids)
        example_choice.check(choice, self._examples, config, tokenizer, encoder.stop_ids)
        # Without weights all sources are one: an epoch has every example once.
        sources = self._examples.sources
        edges = sources if weights else sources[[0, -1]]
        self._rows = self._pack(choice, edges, held_out=False)
        self._eval = self._pack(choice, edges, held_out=True)
        self._choice = choice
        self.train_tokens = sum(rows.tokens for rows in self._rows)
        self.eval_tokens = sum(rows.tokens for rows in self._eval)
        self.num_train_rows = sum(map(len, self._rows))
        self.num_eval_rows = sum(map(len, self._eval))
        self._check_size(edges)
        self._weights = weights or [1.0]
        self.contents = contents.of_examples(self._examples, tokenizer, self._weights, config)
        self.description = self._describe(weights)
        said = example_choice.summary(choice, self._examples, config, tokenizer, encoder.stop_ids)
        self.summary = [*said, self._rows_text()]
        self._order = in_global_order(
            [Places(i, len(rows)) for i, rows in enumerate(self._rows)], self._weights, config.seed
        )
        self._firsts = np.cumsum([0, *map(len, self._rows)]).tolist()  # records of each source
        self._eval_order = interleave([len(rows) for rows in self._eval])
        # In the order of packing the longest examples would come first, and evaluation may read a part only.
        self._eval_shuffles = [
            permutation(len(rows), derive_seed(EVAL_SEED, PACK, i))
            for i, rows in enumerate(self._eval)
        ]

    def train_rows(self, start: int, count: int) -> Rows:
        """Rows start to start + count - 1 of the infinite global training order.

        Returns:
          The fields of the loader, [count, ...]; see ExampleRows.row. `row`: int32 [count], the numbers of
          these rows.

        Raises:
          UserError: the kept examples have ids that the tokenizer has not.
        """
        rows = []
        for i in range(start, start + count):
            rows.append(self._row(*self._order[i]) | {"row": np.array(i, np.int32)})
        return self._stack(rows)

    def record_rows(self, start: int, count: int) -> Rows:
        """As `Loader.record_rows`; `row` is -1."""
        nothing = padding_row(EXAMPLES, self._config.train.sequence_length)
        rows = []
        for i in range(start, min(start + count, self.num_train_rows)):
            source = int(np.searchsorted(self._firsts, i, "right")) - 1
            rows.append(self._row(source, i - self._firsts[source]) | {"row": nothing["row"]})
        held_out = max(start - self.num_train_rows, 0)
        return join_rows(self._stack(rows), self.eval_rows(held_out, count - len(rows)))

    def eval_rows(self, start: int, count: int) -> Rows:
        """Held-out rows start to start + count - 1, [count, ...] each; beyond the last, rows of padding."""
        nothing = padding_row(EXAMPLES | RECORD, self._config.train.sequence_length)
        rows = []
        for i in range(start, start + count):
            if i < self.num_eval_rows:
                source, place = self._eval_order[i]
                row = self._eval[source].row(int(self._eval_shuffles[source][place]))
                record = np.array(self.num_train_rows + i, np.int32)
                rows.append(row | {"row": nothing["row"], "record": record})
            else:
                rows.append(nothing)
        return self._stack(rows)

    def _row(self, source: int, row: int) -> Rows:
        record = np.array(self._firsts[source] + row, np.int32)
        return self._rows[source].row(row) | {"record": record}

    def eval_examples(self, count: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """The first held-out examples, or all of them, whole: (ids int32 [n], scored bool [n]) of each."""
        out = []
        for example in self._choice.numbers(held_out=True)[:count].tolist():
            some = slice(*self._examples.offsets[example : example + 2].tolist())
            ids = self._examples.tokens[some].astype(np.int32)
            out.append((ids, self._examples.scored[some] != 0))
        return out

    def trained_stops(self) -> list[int]:
        """The stop tokens among the scored ones of the first thousand examples, the most frequent first."""
        end = int(self._examples.offsets[min(1000, len(self._choice.kept))])
        scored = self._examples.tokens[:end][self._examples.scored[:end] != 0]
        stops = scored[np.isin(scored, sorted(self.encoder.stop_ids))]
        ids, counts = np.unique(stops, return_counts=True)
        return ids[np.argsort(-counts, kind="stable")].tolist()

    def origin(self, index: int) -> list[Span]:
        """What row `index` of the global training order is made of, example by example, with what of it is
        trained on.
        """
        source, row = self._order[index]
        return [self._span(piece) for piece in self._rows[source].pieces(row)]

    def _span(self, piece: Piece) -> Span:
        examples, example = self._examples, piece.example
        source = int(np.searchsorted(examples.sources, example, "right")) - 1
        start = int(examples.offsets[example]) + piece.first
        ids = np.asarray(examples.tokens[start : start + piece.tokens])
        before = np.asarray(examples.tokens[start - min(piece.first, 32) : start])
        scored = examples.scored[start : start + piece.tokens] != 0
        parts = marked(self.tokenizer, ids, scored, before)
        return Span(
            split_paths(self._config.data.path, "config.data.path")[source],
            example - int(examples.sources[source]),
            piece.first,
            piece.tokens,
            "".join(text for text, _ in parts),
            int(scored.sum()),
            parts,
        )

    def _pack(
        self, choice: example_choice.Choice, edges: np.ndarray, held_out: bool
    ) -> list[ExampleRows]:
        out = []
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            numbers = choice.numbers(held_out, first, last)
            length, packing = self._config.train.sequence_length, self._config.sft.packing_strategy
            out.append(ExampleRows(self._examples, numbers, choice.kept[numbers], length, packing))
        return out

    def _stack(self, rows: list[Rows]) -> Rows:
        size = self.tokenizer.vocab_size
        out = stack_rows(rows, self._fields, self._config.train.sequence_length)
        if (bad := bad_id(out, size)) is not None:
            raise UserError(
                f"config.data.path={self._config.data.path!r} gave the token id {bad}, but "
                f"config.data.tokenizer={self._config.data.tokenizer!r} has {size} ids: the examples that "
                "were kept are damaged. Remove the folder examples of the workdir."
            )
        return out

    def _check_size(self, edges: np.ndarray) -> None:
        c, batch = self._config, self._config.train.batch_size
        repair = (
            "Give more examples, or lower config.train.batch_size or config.data.eval_fraction."
        )
        specs = split_paths(c.data.path, "config.data.path")
        for spec, rows in zip(specs if len(edges) > 2 else [c.data.path], self._rows, strict=True):
            if not len(rows):
                raise UserError(f"config.data.path={spec!r} has no example to train on. {repair}")
        if self.num_train_rows < batch:
            raise UserError(
                f"config.data.path={c.data.path!r} makes {self.num_train_rows} rows of "
                f"config.train.sequence_length={c.train.sequence_length}, but one batch of "
                f"config.train.batch_size={batch} needs as many. {repair}"
            )

    def _describe(self, weights: list[float] | None) -> str:
        examples, texts = self._examples, []
        specs = split_paths(self._config.data.path, "config.data.path")
        for i, spec in enumerate(specs):
            first, last = examples.sources[i : i + 2].tolist()
            tokens = int(examples.offsets[last] - examples.offsets[first])
            share = f"{weights[i]:.0%} " if weights and len(specs) > 1 else ""
            texts.append(f"{share}{spec}: {last - first:,} examples, {human(tokens)} tokens")
        name, size = self.tokenizer.name[:14], self.tokenizer.vocab_size
        return "; ".join(texts) + f"; tokenizer {name}, {size:,} ids"

    def _rows_text(self) -> str:
        length = self._config.train.sequence_length
        padding = 1 - self.train_tokens / (self.num_train_rows * length)
        return (
            f"an epoch is {self.num_train_rows:,} rows of {length} tokens, packing "
            f"{self._config.sft.packing_strategy}, {padding:.1%} padding"
        )


def _check_epochs(config: Config) -> None:
    if not config.data.weights.strip():
        return
    for option, instead in (
        ("train.epochs", "" if config.train.steps else "config.train.steps"),
        ("checkpoint.every_epochs", "config.checkpoint.every_steps"),
        ("eval.every_epochs", "config.eval.every_steps"),
    ):
        if value_of(config, option) and instead:
            raise UserError(
                f"config.{option}={value_of(config, option)} counts passes over the examples, and "
                f"config.data.weights={config.data.weights!r} mixes sources that end at different times. Set "
                f"{instead}, or config.data.weights=''."
            )
