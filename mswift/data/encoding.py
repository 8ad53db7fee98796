"""A batch of rows -> tokens and a report of what was left out; in this process or in a worker, with the same result.

Nothing here depends on the batches before: an encoder is a pure function of its batch, and both can be pickled.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mswift.agent.formats import FORMATS
from mswift.config.agents import AgentTemplate
from mswift.data.batch import Sample
from mswift.data.documents import LongPiece, encode_piece, is_long, long_pieces
from mswift.data.formats import Record, Row, required_row
from mswift.data.loss_scale import PLAIN, LossScale
from mswift.data.report import FileReport, rejection
from mswift.data.rows import Conversation, to_conversation, to_document
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate, Rendering
from mswift.data.text_files import LongText
from mswift.data.tokenizer import Tokenizer, encode, end_token_id
from mswift.data.truncation import Strategy, fit
from mswift.errors import DataError

Columns = tuple[tuple[str, str], ...]
"""Pairs of (name in the file, name that is meant)."""


@dataclass(frozen=True)
class SftOptions:
    """Options that decide the tokens of a conversation."""

    max_length: int
    truncation_strategy: Strategy
    system: str | None
    loss_scale: LossScale = PLAIN
    agent_template: AgentTemplate | None = None


@dataclass(frozen=True, order=True)
class Position:
    """A place in the rows of all sources, from which tokenising can go on."""

    source: int = 0
    part: int = 0
    """File of the source."""
    rows: int = 0
    """Rows of the file that are done."""
    pieces: int = 0
    """Of the row after them, if it is a long document."""


@dataclass(frozen=True)
class Batch:
    """Rows of one file, or a piece of one long document."""

    file: str
    """Its name, as reports have it."""
    records: list[Record]
    piece: LongPiece | None = None
    columns: tuple[str, ...] = ()
    """Of a piece: names in --columns that its row has."""
    end: Position = Position()
    """What comes after it."""


@dataclass
class Encoded:
    """What became of a batch."""

    report: FileReport
    pieces: list[NDArray[np.int32]] = field(default_factory=list)
    """pt: documents, in order."""
    goes_on: bool = False
    """The last document goes on in the next batch."""
    samples: list[Sample] = field(default_factory=list)
    """sft."""
    rejected: bytes = b""
    """Lines of rejected.jsonl."""
    columns: Counter[str] = field(default_factory=Counter)
    """Rows that have a column which --columns names."""
    shortest: int | None = None
    """Tokens of the shortest sample before truncation."""


class Encoder(Protocol):
    """Raises DataError for the first bad row if it is strict."""

    def __call__(self, batch: Batch) -> Encoded: ...


class _Rows:
    """The rows of a batch; bad ones are noted, or raised (`strict`)."""

    def __init__(self, batch: Batch, columns: Columns, strict: bool) -> None:
        self._batch, self._columns, self._strict = batch, columns, strict
        self._errors: list[tuple[Record, DataError]] = []
        self.encoded = Encoded(FileReport(batch.file, None))
        self.report = self.encoded.report

    def __iter__(self) -> Iterator[tuple[Record, Row]]:
        """Readable rows by the names that are meant."""
        for record in self._batch.records:
            self.report.rows += 1
            with self.rejecting(record):
                row = required_row(record, streamed=True)
                self.encoded.columns.update(name for name, _ in self._columns if name in row)
                yield record, renamed_row(row, self._columns, record.where)

    @contextmanager
    def rejecting(self, record: Record) -> Iterator[None]:
        """A DataError inside the block rejects the row."""
        try:
            yield
        except DataError as error:
            if self._strict:
                raise
            self._errors.append((record, error))

    def finish(self) -> Encoded:
        """The result, with the bad rows in their order."""
        self._errors.sort(key=lambda pair: pair[0].number)
        lines = [rejection(self.report, record.number, record.row, error) for record, error in self._errors]
        self.encoded.rejected = b"".join(lines)
        return self.encoded


def renamed_row(row: Row, columns: Sequence[tuple[str, str]], where: str) -> Row:
    """The row with the names of --columns."""
    renamed = dict(row)
    for name, meant in columns:
        if name in renamed:
            if row.get(meant) not in (None, "", []):
                raise DataError(f"{where}: --columns calls `{name}` `{meant}`, and the row has a `{meant}` besides")
            renamed[meant] = renamed.pop(name)
    return renamed


class DocumentEncoder:
    """Documents, each ended by the end token (once, if its text already ends with it)."""

    def __init__(self, tokenizer: Tokenizer, columns: Columns, *, strict: bool) -> None:
        self._tokenizer, self._columns, self._strict = tokenizer, columns, strict
        self._end = end_token_id(tokenizer)

    def __call__(self, batch: Batch) -> Encoded:
        """Tokens of every document."""
        if batch.piece is not None:
            return self._piece(batch, batch.piece)
        rows = _Rows(batch, self._columns, self._strict)
        found: list[tuple[Record, str]] = []
        for record, row in rows:
            with rows.rejecting(record):
                text = to_document(row, record.where)
                found.append((record, text.read() if isinstance(text, LongText) else text))
        for (record, _), ids in zip(found, encode(self._tokenizer, [text for _, text in found]), strict=True):
            if ids:
                rows.encoded.pieces.append(self._ended(ids))
            else:
                rows.report.leave_out("empty", record.number)
        return rows.finish()

    def _piece(self, batch: Batch, piece: LongPiece) -> Encoded:
        ids = encode_piece(self._tokenizer, piece)
        tokens = self._ended(ids) if piece.is_last else np.array(ids, dtype=np.int32)
        report = FileReport(batch.file, None, rows=int(piece.is_last))
        return Encoded(report, [tokens], goes_on=not piece.is_last, columns=Counter(batch.columns))

    def _ended(self, ids: list[int]) -> NDArray[np.int32]:
        return np.array(ids if ids and ids[-1] == self._end else [*ids, self._end], dtype=np.int32)

    def split(self, record: Record, file: str) -> Iterator[Batch]:
        """The pieces of a long document; none of any other row."""
        try:
            row = renamed_row(required_row(record, streamed=True), self._columns, record.where)
            text = to_document(row, record.where)
        except DataError:
            return  # encoding rejects it
        if is_long(text):
            found = tuple(name for name, _ in self._columns if name in (record.row or {}))
            for piece in long_pieces(self._tokenizer, text, record.where):
                yield Batch(file, [], piece, found if piece.is_last else ())


class ConversationEncoder:
    """One sample per rendering of each row, cut or left out by the truncation strategy."""

    def __init__(self, tokenizer: Tokenizer, columns: Columns, options: SftOptions, *, strict: bool) -> None:
        self._tokenizer, self._columns, self._strict = tokenizer, columns, strict
        self._options = options
        self._template = ChatTemplate(tokenizer, options.loss_scale)

    def __call__(self, batch: Batch) -> Encoded:
        """Samples of every row."""
        rows = _Rows(batch, self._columns, self._strict)
        agent = FORMATS[self._options.agent_template] if self._options.agent_template else None
        rendered: list[tuple[Record, list[Rendering]]] = []
        for record, row in rows:
            with rows.rejecting(record):
                conversation = to_conversation(_whole(row), record.where, self._options.system, agent=agent)
                rendered.append((record, self._template.render(conversation, record.where)))
                _count_ignored(rows.report, conversation, self._options.loss_scale)
        for record, samples in self._tokenized(rows, rendered):
            for sample in samples:
                rows.encoded.shortest = min(len(sample.tokens), rows.encoded.shortest or len(sample.tokens))
                length, strategy = self._options.max_length, self._options.truncation_strategy
                rows.encoded.samples += fit(sample, length, strategy, rows.report, record.number, record.where)
        rows.report.samples = len(rows.encoded.samples)
        return rows.finish()

    def _tokenized(
        self, rows: _Rows, rendered: Sequence[tuple[Record, list[Rendering]]]
    ) -> list[tuple[Record, list[Sample]]]:
        """Samples of each row; where one row of the batch cannot be tokenised, all are tried one by one."""
        renderings = [rendering for _, found in rendered for rendering in found]
        places = [record.where for record, found in rendered for _ in found]
        try:
            samples = iter(tokenize(self._tokenizer, renderings, places))
            return [(record, [next(samples) for _ in found]) for record, found in rendered]
        except DataError:
            if len(rendered) > 1:
                return [pair for one in rendered for pair in self._tokenized(rows, [one])]
            with rows.rejecting(rendered[0][0]):
                raise
            return []


def _whole(row: Mapping[str, Any]) -> Row:
    return {name: value.read() if isinstance(value, LongText) else value for name, value in row.items()}


def _count_ignored(report: FileReport, conversation: Conversation, loss_scale: LossScale) -> None:
    for name in conversation.ignored - ({"channel"} if loss_scale.by_channel else set()):
        report.ignored_fields[name] = report.ignored_fields.get(name, 0) + 1
