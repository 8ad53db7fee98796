"""Files -> raw rows: jsonl, json, csv and txt, each also gzipped.

`PATH#N` takes the first N rows; a path that exists literally wins over '#N'. A .json or .jsonl file holds an array of
objects, or one object per line. A .txt file is one document: one row {"text": whole file}. Text is UTF-8. Lines are
streamed; a json array and a txt file are read whole.
"""

import csv
import difflib
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from mswift.errors import ConfigError, DataError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
_MAX_CSV_FIELD = 2**31 - 1  # csv refuses fields over 131,072 characters otherwise


@dataclass(frozen=True)
class DataFile:
    """One item of --dataset."""

    path: Path
    suffix: str
    limit: int | None
    """Take the first rows only."""

    def __str__(self) -> str:
        return str(self.path) if self.limit is None else f"{self.path}#{self.limit}"


def parse_spec(spec: str, flag: str = "--dataset") -> DataFile:
    """`PATH` or `PATH#N` -> the file it names; ConfigError names the flag and what would work."""
    path, limit = Path(spec).expanduser(), None
    if not path.exists() and (found := re.fullmatch(r"(.+)#([^#/]*)", spec)):
        path = Path(found[1]).expanduser()
        if not re.fullmatch(r"0*[1-9][0-9]*", found[2]):
            raise ConfigError(f"{flag} {spec}: '#{found[2]}' must be a number of rows from 1: {found[1]}#100")
        limit = int(found[2])
    if path.is_dir():
        raise ConfigError(f"{flag} {spec} is a folder; name the files in it: {flag} {path}/*.jsonl")
    if not path.is_file():
        raise ConfigError(f"{flag} {spec}: there is no file {path}{_nearest(path)}")
    return DataFile(path, _suffix(path, flag), limit)


def _suffix(path: Path, flag: str) -> str:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{flag} {path}: '{path.suffix}' is not read; accepted: {', '.join(SUFFIXES)}, each also as .gz"
        )
    return suffix.lower()


def _nearest(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def read_rows(file: DataFile) -> Iterator[Row]:
    """Rows in file order, at most `file.limit`; DataError names the file and the line or row that cannot be read."""
    if file.suffix == ".txt":
        rows: Iterator[Row] = iter([{"text": "".join(text for _, text in _lines(file.path))}])
    elif file.suffix == ".csv":
        rows = _csv_rows(file.path)
    elif _first_character(file.path) == "[":
        rows = _array_rows(file.path)
    else:
        rows = _object_lines(file.path)
    return itertools.islice(rows, file.limit)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number from 1 and text (with its end); one UTF-8 byte-order mark at the start is taken off."""
    with _open(path) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if b"\0" in line:
                    raise DataError(
                        f"{path}, line {number}: holds a NUL byte, so it is no UTF-8 text; if it is UTF-16: "
                        f"iconv -f UTF-16 -t UTF-8 {path} > {path.stem}-utf8{path.suffix}"
                    )
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except (gzip.BadGzipFile, EOFError) as error:
            raise DataError(f"{path}: damaged gzip file ({error}); write it again") from None


def _first_character(path: Path) -> str:
    return next((text.lstrip()[0] for _, text in _lines(path) if text.strip()), "")


def _object_lines(path: Path) -> Iterator[Row]:
    for number, text in _lines(path):
        if text.strip():
            yield _as_object(_parse(text, path, number), f"{path}, line {number}")


def _array_rows(path: Path) -> Iterator[Row]:
    values = _parse("".join(text for _, text in _lines(path)), path, 1)
    for number, value in enumerate(values, start=1):
        yield _as_object(value, f"{path}, row {number}")


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair, escaped: no text that could be encoded
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}, column {error.colno}: bad JSON ({error.msg}); "
            "the file must hold one object per line, or one array of objects"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {first_line}: JSON that cannot be read ({error}); mend or remove it") from None


def _as_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be a JSON object, this is a {type(value).__name__}")
    return value


def _csv_rows(path: Path) -> Iterator[Row]:
    """Cells by the names of the header; an empty cell is an absent field."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    reader = csv.reader(text for _, text in _lines(path))
    header = next(reader, [])
    for number, cells in enumerate((cells for cells in reader if cells), start=1):
        if len(cells) != len(header):
            raise DataError(
                f"{path}, row {number} (line {reader.line_num}) has {len(cells)} cells, the header names "
                f"{len(header)}: put cells that contain a comma, a quote or a line break between double quotes"
            )
        yield {name: cell for name, cell in zip(header, cells, strict=True) if cell}
