"""Rows -> the token files of the cache, in bounded batches, with a report of every row that is left out."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from mswift.data.batch import Sample
from mswift.data.cache import StoreWriter
from mswift.data.formats import DataFile, Row, read_rows
from mswift.data.rows import to_conversation, to_document
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate
from mswift.data.tokenizer import Tokenizer, encode, end_token_id
from mswift.errors import DataError

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4_000_000
_NAMED_ROWS = 10


@dataclass(frozen=True)
class SftOptions:
    """Options that decide the tokens of a conversation."""

    max_length: int
    truncation_strategy: Literal["delete", "right", "raise"]
    system: str | None


@dataclass
class FileReport:
    """What became of the rows of one file."""

    name: str
    limit: int | None
    rows: int = 0
    samples: int = 0
    ignored_fields: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    """Samples whose end was cut."""
    left_out: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> numbers of the rows (from 1)."""

    def leave_out(self, reason: str, row: int) -> None:
        """Count a row that is not trained on."""
        self.left_out.setdefault(reason, []).append(row)

    def line(self) -> str:
        """The report in one line."""
        parts = [f"{self.name}: {self.rows:,} rows"]
        if self.limit is not None and self.rows < self.limit:
            parts.append(f"{self.limit:,} were asked for")
        if self.samples:
            parts.append(f"{self.samples:,} samples")
        if self.cut:
            parts.append(f"{self.cut:,} of them cut at the end")
        for reason, rows in self.left_out.items():
            named = ", ".join(map(str, rows[:_NAMED_ROWS])) + (", ..." if len(rows) > _NAMED_ROWS else "")
            parts.append(f"{len(rows):,} left out ({reason}: row {named})")
        if self.ignored_fields:
            fields = ", ".join(f"{name} ({count:,})" for name, count in sorted(self.ignored_fields.items()))
            parts.append(f"fields not used: {fields}")
        return "; ".join(parts)


def write_documents(
    writer: StoreWriter, files: Sequence[DataFile], tokenizer: Tokenizer, progress: bool
) -> Mapping[str, Any]:
    """The stream of all documents, each ended by the end token (once, if its text already ends with it)."""
    end = end_token_id(tokenizer)
    reports = []
    for file in files:
        reports.append(report := FileReport(file.path.name, file.limit))
        for batch in _batches(file, report, progress):
            texts = [to_document(row, f"{file.path}, row {number}") for number, row in batch]
            for (number, _), ids in zip(batch, encode(tokenizer, texts), strict=True):
                if not ids:
                    report.leave_out("empty", number)
                    continue
                writer.add(np.array(ids if ids[-1] == end else [*ids, end], dtype=np.int32))
        _require_rows(report, file)
    if writer.num_tokens < 2:
        raise DataError(f"{_names(files)}: every document is empty, there is nothing to train on; write text in them")
    return {"files": [asdict(report) for report in reports]}


def write_conversations(
    writer: StoreWriter,
    files: Sequence[DataFile],
    tokenizer: Tokenizer,
    options: SftOptions,
    progress: bool,
    model_positions: int | None = None,
) -> Mapping[str, Any]:
    """One sample per rendering of each row, cut or left out by `options.truncation_strategy`."""
    template = ChatTemplate(tokenizer)
    reports = []
    shortest: int | None = None
    for file in files:
        reports.append(report := FileReport(file.path.name, file.limit))
        ignored: Counter[str] = Counter()
        for batch in _batches(file, report, progress):
            renderings, numbers = [], []
            for number, row in batch:
                where = f"{file.path}, row {number}"
                conversation = to_conversation(row, where, options.system)
                ignored.update(conversation.ignored)
                found = template.render(conversation, where)
                renderings += found
                numbers += [number] * len(found)
            places = [f"{file.path}, row {number}" for number in numbers]
            for sample, number, where in zip(tokenize(tokenizer, renderings, places), numbers, places, strict=True):
                shortest = min(len(sample.tokens), shortest or len(sample.tokens))
                if (kept := _fit(sample, options, report, number, where)) is not None:
                    writer.add_sample(kept)
                    report.samples += 1
        report.ignored_fields = dict(ignored)
        _require_rows(report, file)
    if writer.num_tokens == 0:
        assert shortest is not None  # there are rows, and each is at least one sample
        longest = model_positions or shortest
        raise DataError(
            f"{_names(files)}: no sample fits in --max_length {options.max_length}; the shortest has {shortest} tokens"
            + (
                f": --max_length {shortest} takes it"
                if shortest <= longest
                else f", the model takes {longest} (max_position_embeddings): split the rows, or cut them with "
                f"--truncation_strategy right --max_length {longest}"
            )
        )
    return {"files": [asdict(report) for report in reports]}


def _fit(sample: Sample, options: SftOptions, report: FileReport, number: int, where: str) -> Sample | None:
    """The sample in at most max_length tokens, or None where it is left out."""
    length, limit = len(sample.tokens), options.max_length
    if length <= limit:
        return sample
    if options.truncation_strategy == "raise":
        raise DataError(
            f"{where} has {length} tokens, --max_length is {limit}: --max_length {length} takes it, "
            "--truncation_strategy delete leaves it out, --truncation_strategy right cuts its end"
        )
    if options.truncation_strategy == "delete":
        report.leave_out(f"longer than --max_length {limit}", number)
        return None
    if not sample.loss_mask[:limit].any():
        report.leave_out(f"nothing to learn in the first {limit} tokens", number)
        return None
    report.cut += 1
    return Sample(sample.tokens[:limit], sample.loss_mask[:limit])


def _batches(file: DataFile, report: FileReport, progress: bool) -> Iterator[list[tuple[int, Row]]]:
    """Numbered rows (from 1) in batches of bounded size; counts them in the report."""
    rows = tqdm(read_rows(file), desc=f"tokenise {file.path.name}", unit=" rows", disable=None if progress else True)
    batch: list[tuple[int, Row]] = []
    characters = 0
    for number, row in enumerate(rows, start=1):
        report.rows = number
        batch.append((number, row))
        characters += sum(len(str(value)) for value in row.values())
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _require_rows(report: FileReport, file: DataFile) -> None:
    if not report.rows:
        raise DataError(
            f"{file.path} holds no rows: the data set is empty; write at least one row or name another file"
        )


def _names(files: Sequence[DataFile]) -> str:
    return ", ".join(str(file.path) for file in files)
