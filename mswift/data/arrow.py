"""Rows of parquet and arrow files and of data sets that `datasets` saved, batch by batch.

pyarrow is an extra (`pip install 'mswift[data]'`), imported when such a file is read. A null in a nested column is an
absent field: arrow pads every struct of a column to the same fields, so that the two cannot be told apart.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mswift.errors import ConfigError, DataError

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20
_FILE_MAGIC = b"ARROW1"


def require_module(name: str, what: str) -> Any:
    """An optional library; ConfigError says what needs it and how it is installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"{what} needs {name.split('.')[0]} ({error}): pip install 'mswift[data]'") from None


def arrow_file_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .parquet or .arrow file (arrow's file and stream formats); DataError where it is damaged."""
    lib = require_module("pyarrow", str(path))
    try:
        for batch in _parquet_batches(path) if path.suffix.lower() == ".parquet" else _ipc_batches(path):
            yield from batch_rows(batch)
    except (lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged {path.suffix} file ({_line(error)}); write it again") from None


def batch_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of a pyarrow RecordBatch without the fields that are null."""
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        for row in batch.slice(start, _BATCH_ROWS).to_pylist():
            yield _without_nulls(row)


def parquet_num_rows(path: Path) -> int:
    """Rows of a parquet file, by its footer."""
    lib = require_module("pyarrow", str(path))
    parquet = require_module("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    except (lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged .parquet file ({_line(error)}); write it again") from None


def saved_dataset_files(folder: Path, subset: str | None, flag: str) -> tuple[Path, ...] | None:
    """The arrow files of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, None if `folder` is neither.

    `subset` names the split of a DatasetDict (default: train, or the only one). ConfigError where there is none.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = [str(name) for name in _read_json(folder / "dataset_dict.json", flag)["splits"]]
        split = subset or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
        if split not in splits:
            raise ConfigError(
                f"{flag} {folder}: the saved data set has the splits {', '.join(splits)}; name one: "
                f"{flag} {folder}:{splits[0]}"
            )
        return saved_dataset_files(folder / split, None, flag)
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    if subset is not None:
        raise ConfigError(f"{flag} {folder}:{subset}: the saved data set has no splits; leave :{subset} out")
    state = _read_json(folder / "state.json", flag)
    if state.get("_indices_files"):
        raise ConfigError(
            f"{flag} {folder}: the data set was saved with an index over its rows; save it again with "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    return tuple(folder / str(entry["filename"]) for entry in state["_data_files"])


def _read_json(path: Path, flag: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{flag} {path.parent}: {path.name} cannot be read ({error}); save the data set again"
        ) from None


def _parquet_batches(path: Path) -> Iterator[Any]:
    parquet = require_module("pyarrow.parquet", str(path))
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)


def _ipc_batches(path: Path) -> Iterator[Any]:
    lib = require_module("pyarrow", str(path))
    ipc = require_module("pyarrow.ipc", str(path))
    with path.open("rb") as stream:
        is_file = stream.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    with lib.OSFile(str(path)) as source:
        if not is_file:
            yield from ipc.open_stream(source)
            return
        reader = ipc.open_file(source)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
