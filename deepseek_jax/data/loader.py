"""The loader: global training rows in an order that is a pure function of (seed, row index), and held-out
rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from deepseek_jax.cli.texts import human, plural
from deepseek_jax.config import held_out
from deepseek_jax.config.options import Config
from deepseek_jax.data import contents
from deepseek_jax.data.documents import DataNotes
from deepseek_jax.data.fields import (
    RECORD,
    TEXT,
    Fields,
    Rows,
    join_rows,
    padding_row,
    stack_rows,
)
from deepseek_jax.data.order import derive_seed
from deepseek_jax.data.packing import PackedRows
from deepseek_jax.data.sources import Corpus, Documents, divided, open_corpora, parse_weights
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError

PACK, SHUFFLE = 1, 2  # purposes of derived seeds
# held-out rows do not depend on config.seed: losses of runs with different seeds can be compared
EVAL_SEED = 0


class Span(NamedTuple):
    """A piece of a document in a row."""

    source: str  # as in config.data.path
    document: int  # its number there, from 0, in file order
    first_token: int  # tokens of the document before this piece
    tokens: int
    text: str
    # of examples: how many of its tokens are trained on, and the text in pieces that are and that are not
    trained: int | None = None
    parts: tuple[tuple[str, bool], ...] = ()


class Places:
    """In place of rows: (source, row)."""

    def __init__(self, source: int, count: int):
        self._source = source
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._source, int(index)


def in_global_order(
    sources: Sequence[Any], weights: Sequence[float], seed: int
) -> grain.MapDataset:
    """The items of all sources in the global training order, without end: those of each in a new order every
    epoch, mixed by weight.
    """
    # Shuffling before repeating: grain reseeds the shuffle every epoch and reads any index without the
    # ones before.
    shuffled = [
        grain.MapDataset.source(items).shuffle(seed=derive_seed(seed, SHUFFLE, i)).repeat()
        for i, items in enumerate(sources)
    ]
    # Grain spreads the sources evenly, with weights rounded to within one percent.
    return grain.MapDataset.mix(shuffled, weights) if len(shuffled) > 1 else shuffled[0]


def interleave(counts: list[int]) -> np.ndarray:
    """int64 [sum(counts), 2]: (source, row) of every row, each source spread evenly, so that a prefix is a
    fair sample.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    row = np.concatenate([np.arange(n) for n in counts])
    share = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return np.stack([source, row], axis=1)[np.argsort(share, kind="stable")]


def bad_id(rows: Rows, size: int) -> int | None:
    """A token id of some rows that is none of 0 to size - 1, if there is one. The embedding and tables by id
    would not complain.
    """
    ids = [rows[name] for name in ("tokens", "targets", "next_tokens") if name in rows]
    if not rows["tokens"].size:
        return None
    if (least := rows["tokens"].min()) < 0:
        return int(least)
    most = max(a.max() for a in ids)
    return int(most) if most >= size else None


class Loader:
    """Opens, checks and splits the corpora of a config.

    Every process makes its own and sees the same rows: nothing here knows of hosts.

    Args:
      config: reads data, model.vocab_size, train.batch_size, train.sequence_length and seed.
      tokenizer: of `config.data.tokenizer`.
      progress: show a bar on stderr if it takes long.
      fields: what batches have; of packed text all that there is by default.

    Attributes:
      num_train_rows: rows of one pass over every source. num_eval_rows: held-out rows, 0 for eval_fraction=0.
      train_tokens, eval_tokens: tokens in the documents of each side.
      description: the data in a few words. contents: what a later start compares.
      notes: lines about what was left out or changed.


    Raises:
      UserError: a source is missing, empty, unreadable or not what its name says, or all together are too
        short.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        progress: bool = False,
        fields: Fields = TEXT,
    ):
        c, length, mask = config, config.train.sequence_length, config.data.document_mask
        self.tokenizer = tokenizer
        self._config = config
        self._fields = fields
        known = PackedRows.fields | RECORD
        if missing := [name for name in fields if name not in known]:
            raise UserError(
                f"config.data.path={config.data.path!r} gives no {', '.join(missing)}, which the objective "
                f"of this run reads: packed text has {', '.join(known)}."
            )
        weights = parse_weights(config)  # before the reading, which may take long
        notes = DataNotes()
        corpora = open_corpora(config, tokenizer, progress, notes)
        sides = [divided(corpus, c.data) for corpus in corpora]
        self.notes = notes.lines() + _unread(config, corpora, sides)
        train = [
            PackedRows(t, length, derive_seed(c.seed, PACK, i), mask)
            for i, (t, _) in enumerate(sides)
        ]
        self._eval = [
            PackedRows(e, length, derive_seed(EVAL_SEED, PACK, i), mask, pad_last=True)
            for i, (_, e) in enumerate(sides)
        ]
        self.train_tokens = sum(train.size for train, _ in sides)
        self.eval_tokens = sum(out.size for _, out in sides)
        self.num_train_rows = sum(map(len, train))
        self.num_eval_rows = sum(map(len, self._eval))
        self._check_size(corpora, sides, train)
        weights = weights or [t.size / self.train_tokens for t, _ in sides]
        self.description = _describe(corpora, sides, weights, tokenizer)
        self.contents = contents.of(corpora, tokenizer, weights)
        self._eval_order = interleave([len(rows) for rows in self._eval])
        self._sources = corpora
        self._rows = train
        self._order = in_global_order(
            [Places(i, len(rows)) for i, rows in enumerate(train)], weights, c.seed
        )
        self._firsts = np.cumsum([0, *map(len, train)]).tolist()  # records of each source

    def train_rows(self, start: int, count: int) -> Rows:
        """Rows start to start + count - 1 of the infinite global training order.

        Returns:
          The fields of the loader, [count, ...]; see PackedRows.row.

        Raises:
          UserError: a token file has ids that the tokenizer has not.
        """
        return self._stack([self._row(*self._order[i]) for i in range(start, start + count)])

    def record_rows(self, start: int, count: int) -> Rows:
        """Rows whose `record` is start to start + count - 1: each once, in an order that nothing changes; see
        data/fields.py RECORD. Beyond the last, rows of padding.
        """
        rows = []
        for i in range(start, min(start + count, self.num_train_rows)):
            source = int(np.searchsorted(self._firsts, i, "right")) - 1
            rows.append(self._row(source, i - self._firsts[source]))
        first = max(start - self.num_train_rows, 0)
        return join_rows(self._stack(rows), self.eval_rows(first, count - len(rows)))

    def origin(self, index: int) -> list[Span]:
        """Where the inputs of row `index` of the global training order come from, document by document."""
        source, row = self._order[index]
        corpus, out = self._sources[source], []
        for start, count, into in self._rows[source].spans(row):
            document = int(np.searchsorted(corpus.offsets, start, "right")) - 1
            tokens = np.asarray(corpus.tokens[start : start + count])
            before = corpus.tokens[start - min(into, 32) : start]
            out.append(
                Span(corpus.name, document, into, count, self.tokenizer.decode(tokens, before))
            )
        return out

    def eval_rows(self, start: int, count: int) -> Rows:
        """Held-out rows start to start + count - 1, [count, ...] each; beyond the last, rows of padding."""
        rows = []
        for i in range(start, start + count):
            if i < self.num_eval_rows:
                source, row = self._eval_order[i]
                record = np.array(self.num_train_rows + i, np.int32)
                rows.append(self._eval[source].row(int(row)) | {"record": record})
            else:
                rows.append(padding_row(self._fields, self._config.train.sequence_length))
        return self._stack(rows)

    def _row(self, source: int, row: int) -> Rows:
        record = np.array(self._firsts[source] + row, np.int32)
        return self._rows[source].row(row) | {"record": record}

    def _stack(self, rows: list[Rows]) -> Rows:
        size = self.tokenizer.vocab_size
        out = stack_rows(rows, self._fields, self._config.train.sequence_length)
        # Start-up trusts the sidecar of a token file; a damaged file must not reach the model.
        if (bad := bad_id(out, size)) is not None:
            raise UserError(
                f"config.data.path={self._config.data.path!r} has the token id {bad}, but "
                f"config.data.tokenizer={self._config.data.tokenizer!r} has {size} ids: the "
                f"token file is damaged. Tokenize again."
            )
        return out

    def _check_size(
        self,
        corpora: list[Corpus],
        sides: list[tuple[Documents, Documents]],
        train: list[PackedRows],
    ) -> None:
        c, batch, s = (
            self._config,
            self._config.train.batch_size,
            self._config.train.sequence_length,
        )
        held = f"besides the {self.eval_tokens} held out with {held_out.option(c.data)}"
        repair = "Give more text, or lower config.train.batch_size or config.train.sequence_length."
        for corpus, (documents, _), rows in zip(corpora, sides, train, strict=True):
            if not len(rows):
                raise UserError(
                    f"config.data.path={corpus.name!r} has {documents.size} training tokens ({held}), but "
                    "one "
                    f"sequence of config.train.sequence_length={s} needs {s + 1}. {repair}"
                )
        if self.num_train_rows < batch:
            raise UserError(
                f"config.data.path={c.data.path!r} has {self.train_tokens} training tokens ({held}), but "
                "one batch "
                f"of config.train.batch_size={batch} x sequence_length={s} needs {batch * s + 1}. {repair}"
            )


def _unread(
    config: Config, corpora: list[Corpus], sides: list[tuple[Documents, Documents]]
) -> list[str]:
    """What config.data.split leaves to neither side."""
    every = sum(np.count_nonzero(np.diff(corpus.offsets)) for corpus in corpora)
    left = every - sum(len(side.starts) for pair in sides for side in pair)
    if not config.data.split or not left:
        return []
    return [f"{held_out.option(config.data)}: {plural(int(left), 'document')} that nothing reads"]


def _describe(
    corpora: list[Corpus],
    sides: list[tuple[Documents, Documents]],
    weights: list[float],
    tokenizer: Tokenizer,
) -> str:
    texts = []
    for corpus, (train, out), weight in zip(corpora, sides, weights, strict=True):
        total, count = train.size + out.size, len(train.starts) + len(out.starts)
        share = f"{weight:.0%} " if len(corpora) > 1 else ""
        if len(corpus.offsets) == 2:
            held = f"the last {human(out.size)} held out" if out.size else "none held out"
            texts.append(f"{share}{corpus.name}: 1 document, {human(total)} tokens ({held})")
        else:
            texts.append(
                f"{share}{corpus.name}: {count:,} documents, {human(total)} tokens "
                f"({len(out.starts):,} documents, {human(out.size)} tokens held out)"
            )
    return "; ".join(texts) + f"; tokenizer {tokenizer.name[:14]}, {tokenizer.vocab_size:,} ids"
