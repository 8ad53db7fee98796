"""Files -> numbered rows: jsonl, json, csv, tsv and txt (each also .gz or .zst), parquet and arrow.

Files are streamed: what is held is one row and a buffer. A row that cannot be read is a record with an error, and
reading goes on behind it; where a file is damaged so that what follows cannot be found, a DataError ends the reading.
A .json or .jsonl file holds an array of objects, one object a line, or (.json) objects one after the other. A .txt file
is one document: one row {"text": LongText}, which is read where its text is used. Text is UTF-8.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mswift.data.json_stream import checked_value, json_values
from mswift.data.text_files import Line, LongText, first_character, text_lines, text_pieces
from mswift.errors import DataError

Row = dict[str, Any]

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
ARROW_SUFFIXES = (".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
_MAX_CSV_FIELD = 2**31 - 1  # csv refuses fields over 131,072 characters otherwise


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file, or why it could not be read."""

    number: int
    """From 1, in its file."""
    where: str
    """The file and the row, as errors begin."""
    row: Row | None
    error: DataError | None = None


def format_of(path: Path) -> str | None:
    """The suffix that decides how `path` is read, ".jsonl" of "a.JSONL.gz"; None if it is not read."""
    compressed = path.suffix.lower() in COMPRESSIONS
    suffix = (Path(path.stem).suffix if compressed else path.suffix).lower()
    return suffix if suffix in TEXT_SUFFIXES or (suffix in ARROW_SUFFIXES and not compressed) else None


def read_file(path: Path) -> Iterator[Record]:
    """Every row in file order; DataError where the rest of the file cannot be read."""
    suffix = format_of(path)
    if suffix in ARROW_SUFFIXES:
        from mswift.data.arrow import arrow_file_rows

        values: Iterator[Any] = arrow_file_rows(path)
    elif suffix == ".txt":
        values = iter([{"text": LongText(path)}])
    elif suffix in (".csv", ".tsv"):
        values = _table_rows(path, "," if suffix == ".csv" else "\t")
    elif _one_value_a_line(path, suffix):
        values = _line_values(path)
    else:
        values = json_values(text_pieces(path), str(path))
    for number, value in enumerate(values, start=1):
        yield _record(path, number, value)


def has_offsets(path: Path) -> bool:
    """Whether `read_lines` reads it: JSON with a value a line, not compressed."""
    suffix = path.suffix.lower()
    return suffix in (".json", ".jsonl") and _one_value_a_line(path, suffix)


def read_lines(path: Path, row: int, line: int, offset: int) -> Iterator[tuple[Record, Line]]:
    """The rows behind `offset` bytes, which hold `row` rows in `line` lines; each with the line that it stands on."""
    lines = (found for found in text_lines(path, line, offset) if not found.blank)
    for number, found in enumerate(lines, start=row + 1):
        yield _record(path, number, _parse(found)), found


def _record(path: Path, number: int, value: Any) -> Record:
    where = f"{path}, row {number}"
    if isinstance(value, dict):
        return Record(number, where, value)
    if isinstance(value, DataError):
        return Record(number, where, None, value)
    reason = f"a row must be a JSON object, this is a {type(value).__name__}"
    return Record(number, where, None, DataError(f"{where}: {reason}"))


def required_row(record: Record, *, streamed: bool = False) -> Row:
    """The row; raises the error of one that could not be read. `streamed`: a LongText stays one."""
    if record.error is not None:
        raise record.error
    assert record.row is not None
    if streamed:
        return record.row
    return {name: value.read() if isinstance(value, LongText) else value for name, value in record.row.items()}


def count_rows(path: Path) -> int:
    """Number of records that `read_file` gives; lines are counted without parsing them."""
    suffix = format_of(path)
    if suffix == ".parquet":
        from mswift.data.arrow import parquet_num_rows

        return parquet_num_rows(path)
    if suffix in (".json", ".jsonl") and _one_value_a_line(path, suffix):
        return sum(1 for line in text_lines(path) if not line.blank)
    return sum(1 for _ in read_file(path))


def _one_value_a_line(path: Path, suffix: str | None) -> bool:
    """Whether a JSON file holds one value a line: .jsonl unless it is an array; .json if its first line is a value."""
    if first_character(path) == "[":
        return False
    if suffix == ".jsonl":
        return True
    first = next((line for line in text_lines(path) if not line.blank), None)
    try:
        json.loads(first.text if first else "")
    except (ValueError, RecursionError):
        return False
    return True


def _line_values(path: Path) -> Iterator[Any]:
    return (_parse(line) for line in text_lines(path) if not line.blank)


def _parse(line: Line) -> Any:
    """The JSON value of a line, or the DataError that says why there is none."""
    if line.error is not None:
        return line.error
    try:
        return checked_value(json.loads(line.text.rstrip()), line.text, line.where)
    except json.JSONDecodeError as error:
        return DataError(
            f"{line.where}, column {error.colno}: bad JSON ({error.msg}); "
            "the file must hold one object per line, or one array of objects"
        )
    except (ValueError, RecursionError) as error:
        return DataError(f"{line.where}: JSON that cannot be read ({error}); mend or remove it")


def _table_rows(path: Path, delimiter: str) -> Iterator[Row | DataError]:
    """Cells by the names of the header; an empty cell is an absent field."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    reader = csv.reader((line.require() for line in text_lines(path)), delimiter=delimiter)
    try:
        header = next(reader, [])
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) == len(header):
                yield {name: cell for name, cell in zip(header, cells, strict=True) if cell}
                continue
            mark = "comma" if delimiter == "," else "tab"
            yield DataError(
                f"{path}, row {number} (line {reader.line_num}) has {len(cells)} cells, the header names "
                f"{len(header)}: put cells that contain a {mark}, a quote or a line break between double quotes"
            )
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no table ({error}); save it again as UTF-8 text") from None
