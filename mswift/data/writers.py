"""Rows -> the token files of the cache, batch by batch in order, with a report of every row that is left out."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from tqdm import tqdm

from mswift.data.cache import StoreWriter
from mswift.data.encoding import (
    Batch,
    Columns,
    ConversationEncoder,
    DocumentEncoder,
    Encoded,
    Encoder,
    Position,
    SftOptions,
)
from mswift.data.formats import Record
from mswift.data.pool import in_order
from mswift.data.report import FileReport
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import Source
from mswift.data.tokenizer import Tokenizer
from mswift.errors import DataError

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class RowOptions:
    """Options that decide which rows there are and what their columns are called."""

    selection: Selection = field(default_factory=Selection)
    columns: Columns = ()
    """(name in the file, name that is meant)."""


@dataclass(frozen=True)
class HowToWrite:
    """What decides no byte: whether a bad row is an error, whether a bar is shown, and how many processes tokenise."""

    strict: bool = False
    progress: bool = False
    num_proc: int = 1


@dataclass(frozen=True)
class _PartBegins:
    report: FileReport


@dataclass(frozen=True)
class _SourceEnds:
    source: Source


_Step = _PartBegins | Batch | _SourceEnds
_Split = Callable[[Record, str], Iterator[Batch]]
"""A row that is more than a batch -> its batches; none of a row that is not."""


class _Writing:
    """The state of a build: what was written and reported so far."""

    def __init__(self, writer: StoreWriter, columns: Columns, selection: Selection) -> None:
        self._writer, self._columns, self._selection = writer, columns, selection
        self._reports: list[FileReport] = []
        self._ends: list[tuple[int, int]] = []
        self._of_source = 0
        self._found = Counter[str]()
        self.shortest: int | None = None

    def take(self, step: _Step, encoded: Encoded | None) -> None:
        """What comes next. DataError: a source without rows, or with none that is good."""
        if isinstance(step, _PartBegins):
            self._reports.append(step.report)
        elif isinstance(step, _SourceEnds):
            self._ends.append((self._writer.num_pieces, self._writer.num_tokens))
            _require_rows(step.source, self._reports[self._of_source :], self._selection)
            self._of_source = len(self._reports)
        else:
            assert encoded is not None
            self._append(encoded)

    def _append(self, encoded: Encoded) -> None:
        for tokens in encoded.pieces[:-1]:
            self._writer.add(tokens)
        if encoded.pieces:
            self._writer.add(encoded.pieces[-1], goes_on=encoded.goes_on)
        for sample in encoded.samples:
            self._writer.add_sample(sample)
        self._writer.reject(encoded.rejected)
        self._reports[-1].merge(encoded.report)
        self._found += encoded.columns
        self.shortest = min((n for n in (self.shortest, encoded.shortest) if n is not None), default=None)

    def checkpoint_if_due(self, position: Position) -> None:
        """Let a build that is killed go on from here."""
        if not self._writer.is_due():
            return
        state = {
            "position": asdict(position),
            "files": [asdict(report) for report in self._reports],
            "source_ends": self._ends,
            "of_source": self._of_source,
            "columns": dict(self._found),
            "shortest": self.shortest,
        }
        self._writer.checkpoint(state)

    def resume(self) -> Position | None:
        """Take up the state of an interrupted build; where it goes on, None at the beginning."""
        state = self._writer.resumed
        if state is None:
            return None
        self._reports = [FileReport.load(report) for report in state["files"]]
        self._ends = [(pieces, tokens) for pieces, tokens in state["source_ends"]]
        self._of_source, self._found = state["of_source"], Counter(state["columns"])
        self.shortest = state["shortest"]
        return Position(**state["position"])

    def report(self) -> dict[str, Any]:
        """For the index: every file's report, where each source ends (pieces, tokens), names that no row has."""
        return {
            "files": [asdict(report) for report in self._reports],
            "source_ends": self._ends,
            "unused_columns": [name for name, _ in self._columns if not self._found[name]],
        }


def write_rows(
    writer: StoreWriter,
    files: Iterable[tuple[str, Iterator[Record]]],
    encoder: DocumentEncoder | ConversationEncoder,
    columns: Columns,
    how: HowToWrite,
) -> Mapping[str, Any]:
    """Some rows of files (each by its name), read as they are needed; there may be none that is good."""
    split: _Split = encoder.split if isinstance(encoder, DocumentEncoder) else lambda *_: iter(())

    def steps() -> Iterator[_Step]:
        for name, records in files:
            yield _PartBegins(FileReport(name, None))
            yield from _batches(records, name, split, Position())

    writing = _Writing(writer, columns, Selection())
    for step, encoded in in_order(steps(), encoder, how.num_proc):
        writing.take(step, encoded)
    return writing.report()


def write_documents(
    writer: StoreWriter, sources: Sequence[Source], tokenizer: Tokenizer, options: RowOptions, how: HowToWrite
) -> Mapping[str, Any]:
    """The stream of all documents, each ended by the end token (once, if its text already ends with it)."""
    encoder = DocumentEncoder(tokenizer, options.columns, strict=how.strict)
    writing = _write(writer, sources, encoder, encoder.split, options, how)
    if writer.num_tokens < 2:
        raise DataError(f"{_names(sources)}: every document is empty, there is nothing to train on; write text in them")
    return writing.report()


def write_conversations(
    writer: StoreWriter,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: RowOptions,
    sft: SftOptions,
    how: HowToWrite,
    *,
    model_positions: int | None = None,
) -> Mapping[str, Any]:
    """One sample per rendering of each row, cut or left out by `sft.truncation_strategy`."""
    encoder = ConversationEncoder(tokenizer, options.columns, sft, strict=how.strict)
    writing = _write(writer, sources, encoder, lambda *_: iter(()), options, how)
    if writer.num_tokens == 0:
        assert writing.shortest is not None  # there are good rows, and each is at least one sample
        raise _nothing_fits(_names(sources), sft.max_length, writing.shortest, model_positions)
    return writing.report()


def _write(
    writer: StoreWriter,
    sources: Sequence[Source],
    encoder: Encoder,
    split: _Split,
    options: RowOptions,
    how: HowToWrite,
) -> _Writing:
    writing = _Writing(writer, options.columns, options.selection)
    steps = _steps(sources, options.selection, split, writing.resume())
    with tqdm(desc="tokenise", unit=" rows", disable=None if how.progress else True) as bar:
        for step, encoded in in_order(steps, encoder, how.num_proc):
            writing.take(step, encoded)
            if encoded is not None and isinstance(step, Batch):
                bar.update(encoded.report.rows)
                writing.checkpoint_if_due(step.end)
            elif isinstance(step, _PartBegins):
                bar.set_description(f"tokenise {step.report.name}")
    return writing


def _steps(
    sources: Sequence[Source], selection: Selection, split: _Split, start: Position | None = None
) -> Iterator[_Step]:
    """Batches of rows, source by source and file by file; those from `start` on."""
    for index, source in enumerate(sources):
        if start is not None and index < start.source:
            continue
        limit = source.count if len(source.parts) == 1 else None
        for number, (part, size, records) in enumerate(selected_parts(source, index, selection)):
            at = Position(index, number)
            if start is None or at > start:
                yield _PartBegins(FileReport(part.name, limit, size))
            elif number == start.part:
                at = start
            else:
                if source.count is not None:  # how many are left for the next file
                    deque(records, maxlen=0)
                continue
            yield from _batches(records, part.name, split, at)
        yield _SourceEnds(source)


def _batches(records: Iterator[Record], file: str, split: _Split, at: Position) -> Iterator[Batch]:
    """Rows from `at` on, in batches of bounded size."""
    batch: list[Record] = []
    characters = 0
    for record in islice(records, at.rows, None):
        is_long = False
        for number, piece in enumerate(split(record, file), start=1):
            if not is_long and batch:
                yield Batch(file, batch, end=at)
                batch, characters = [], 0
            is_long = True
            assert piece.piece is not None
            if number > at.pieces:
                after = replace(at, rows=at.rows + 1, pieces=0) if piece.piece.is_last else replace(at, pieces=number)
                yield replace(piece, end=after)
        at = replace(at, rows=at.rows + 1, pieces=0)
        if is_long:
            continue
        batch.append(record)
        characters += sum(len(str(value)) for value in (record.row or {}).values())
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield Batch(file, batch, end=at)
            batch, characters = [], 0
    if batch:
        yield Batch(file, batch, end=at)


def _nothing_fits(names: str, max_length: int, shortest: int, model_positions: int | None) -> DataError:
    longest = model_positions or shortest
    remedy = (
        f": --max_length {shortest} takes it"
        if shortest <= longest
        else f", the model takes {longest} (max_position_embeddings): split the rows, or cut them with "
        f"--truncation_strategy right --max_length {longest}"
    )
    return DataError(
        f"{names}: no sample fits in --max_length {max_length}; the shortest has {shortest} tokens{remedy}"
    )


def _require_rows(source: Source, reports: Sequence[FileReport], selection: Selection) -> None:
    name = str(source.parts[0]) if len(source.parts) == 1 else source.spec
    if not (total := sum(report.rows for report in reports)):
        if selection.split_ratio:
            raise DataError(
                f"{name}: --split_dataset_ratio {selection.split_ratio:g} leaves no row for {selection.part}; take "
                "another share, name the files of --val_dataset, or add rows"
            )
        raise DataError(f"{name} holds no rows: the data set is empty; write at least one row or name another file")
    if sum(report.rejected.rows for report in reports) == total:
        reason = next(reason for report in reports for reason in report.reasons)
        raise DataError(f"{name}: none of its {total:,} rows can be used; the first: {reason}")


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(str(part) for source in sources for part in source.parts)
