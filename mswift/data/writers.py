"""Rows -> the token files of the cache, in bounded batches, with a report of every row that is left out."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from mswift.agent.formats import FORMATS
from mswift.config.agents import AgentTemplate
from mswift.data.batch import Sample
from mswift.data.cache import StoreWriter
from mswift.data.formats import Record, Row, required_row
from mswift.data.loss_scale import PLAIN, LossScale
from mswift.data.report import FileReport, rejection
from mswift.data.rows import Conversation, to_conversation, to_document
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import Part, Source
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate, Rendering
from mswift.data.tokenizer import Tokenizer, encode, end_token_id
from mswift.data.truncation import Strategy, fit
from mswift.errors import DataError

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class RowOptions:
    """Options that decide which rows there are and what their columns are called."""

    selection: Selection = field(default_factory=Selection)
    columns: tuple[tuple[str, str], ...] = ()
    """(name in the file, name that is meant)."""


@dataclass(frozen=True)
class SftOptions:
    """Options that decide the tokens of a conversation."""

    max_length: int
    truncation_strategy: Strategy
    system: str | None
    loss_scale: LossScale = PLAIN
    agent_template: AgentTemplate | None = None


class _Rows:
    """The rows of all sources in batches; bad ones are counted and written down, or raised (`strict`)."""

    def __init__(
        self, writer: StoreWriter, sources: Sequence[Source], options: RowOptions, strict: bool, progress: bool
    ) -> None:
        self._writer, self._sources, self._options = writer, sources, options
        self._strict, self._progress = strict, progress
        self._columns = Counter[str]()
        self._reports: list[FileReport] = []
        self._ends: list[tuple[int, int]] = []

    def batches(self) -> Iterator[tuple[FileReport, list[Record]]]:
        """Batches of readable rows, source by source. DataError: a source without rows, or with none that is good."""
        for index, source in enumerate(self._sources):
            reports: list[FileReport] = []
            limit = source.count if len(source.parts) == 1 else None
            for part, size, records in selected_parts(source, index, self._options.selection):
                reports.append(report := FileReport(part.name, limit, size))
                for batch in _batches(self._readable(records, report), part, self._progress):
                    yield report, batch
            self._reports += reports
            self._ends.append((self._writer.num_pieces, self._writer.num_tokens))
            _require_rows(source, reports, self._options.selection)

    @contextmanager
    def rejecting(self, report: FileReport, record: Record) -> Iterator[None]:
        """A DataError inside the block rejects the row."""
        try:
            yield
        except DataError as error:
            if self._strict:
                raise
            self._writer.reject(rejection(report, record.number, record.row, error))

    def report(self) -> dict[str, Any]:
        """For the index: every file's report, and where each source ends: (pieces, tokens)."""
        return {"files": [asdict(report) for report in self._reports], "source_ends": self._ends}

    def unused_columns(self) -> list[str]:
        """Names in --columns that no row has."""
        return [name for name, _ in self._options.columns if not self._columns[name]]

    def _readable(self, records: Iterator[Record], report: FileReport) -> Iterator[Record]:
        for record in records:
            report.rows += 1
            with self.rejecting(report, record):
                row = required_row(record)
                self._columns.update(name for name, _ in self._options.columns if name in row)
                yield Record(record.number, record.where, renamed_row(row, self._options.columns, record.where))


def renamed_row(row: Row, columns: Sequence[tuple[str, str]], where: str) -> Row:
    """The row with the names of --columns."""
    renamed = dict(row)
    for name, meant in columns:
        if name in renamed:
            if row.get(meant) not in (None, "", []):
                raise DataError(f"{where}: --columns calls `{name}` `{meant}`, and the row has a `{meant}` besides")
            renamed[meant] = renamed.pop(name)
    return renamed


def write_documents(
    writer: StoreWriter,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: RowOptions,
    *,
    strict: bool,
    progress: bool,
) -> Mapping[str, Any]:
    """The stream of all documents, each ended by the end token (once, if its text already ends with it)."""
    end = end_token_id(tokenizer)
    rows = _Rows(writer, sources, options, strict, progress)
    for report, batch in rows.batches():
        texts: list[str] = []
        numbers: list[int] = []
        for record in batch:
            with rows.rejecting(report, record):
                texts.append(to_document(record.row or {}, record.where))
                numbers.append(record.number)
        for number, ids in zip(numbers, encode(tokenizer, texts), strict=True):
            if not ids:
                report.leave_out("empty", number)
                continue
            writer.add(np.array(ids if ids[-1] == end else [*ids, end], dtype=np.int32))
    if writer.num_tokens < 2:
        raise DataError(f"{_names(sources)}: every document is empty, there is nothing to train on; write text in them")
    return rows.report() | {"unused_columns": rows.unused_columns()}


def write_conversations(
    writer: StoreWriter,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: RowOptions,
    sft: SftOptions,
    *,
    strict: bool,
    progress: bool,
    model_positions: int | None = None,
) -> Mapping[str, Any]:
    """One sample per rendering of each row, cut or left out by `sft.truncation_strategy`."""
    template = ChatTemplate(tokenizer, sft.loss_scale)
    agent = FORMATS[sft.agent_template] if sft.agent_template else None
    rows = _Rows(writer, sources, options, strict, progress)
    shortest: int | None = None
    for report, batch in rows.batches():
        rendered: list[tuple[Record, list[Rendering]]] = []
        for record in batch:
            with rows.rejecting(report, record):
                conversation = to_conversation(record.row or {}, record.where, sft.system, agent=agent)
                rendered.append((record, template.render(conversation, record.where)))
                _count_ignored(report, conversation)
        for record, samples in _tokenized(rows, report, tokenizer, rendered):
            for sample in samples:
                shortest = min(len(sample.tokens), shortest or len(sample.tokens))
                for kept in fit(sample, sft.max_length, sft.truncation_strategy, report, record.number, record.where):
                    writer.add_sample(kept)
                    report.samples += 1
    if writer.num_tokens == 0:
        assert shortest is not None  # there are good rows, and each is at least one sample
        raise _nothing_fits(_names(sources), sft.max_length, shortest, model_positions)
    return rows.report() | {"unused_columns": rows.unused_columns()}


def _tokenized(
    rows: _Rows, report: FileReport, tokenizer: Tokenizer, rendered: Sequence[tuple[Record, list[Rendering]]]
) -> list[tuple[Record, list[Sample]]]:
    """Samples of each row; where one row of the batch cannot be tokenised, all are tried one by one."""
    renderings = [rendering for _, found in rendered for rendering in found]
    try:
        samples = iter(tokenize(tokenizer, renderings, [record.where for record, found in rendered for _ in found]))
        return [(record, [next(samples) for _ in found]) for record, found in rendered]
    except DataError:
        if len(rendered) > 1:
            return [pair for one in rendered for pair in _tokenized(rows, report, tokenizer, [one])]
        with rows.rejecting(report, rendered[0][0]):
            raise
        return []


def _count_ignored(report: FileReport, conversation: Conversation) -> None:
    for name in conversation.ignored:
        report.ignored_fields[name] = report.ignored_fields.get(name, 0) + 1


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


def _batches(records: Iterator[Record], part: Part, progress: bool) -> Iterator[list[Record]]:
    """Rows in batches of bounded size."""
    batch: list[Record] = []
    characters = 0
    for record in tqdm(records, desc=f"tokenise {part.name}", unit=" rows", disable=None if progress else True):
        batch.append(record)
        characters += sum(len(str(value)) for value in (record.row or {}).values())
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
