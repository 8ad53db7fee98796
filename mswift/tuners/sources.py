"""Where an adapter is read from without torch: a PEFT directory, or the torch_dist tensors that mswift writes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mswift.converters.adapters import trained_name
from mswift.converters.catalog import read_config
from mswift.converters.io.files import PIECE_BYTES, open_read
from mswift.converters.io.safetensors import read_header
from mswift.converters.io.side_files import carried_files
from mswift.converters.io.stored import StoredTensor
from mswift.converters.io.strided import gather
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region, flatten, identity
from mswift.converters.plan import DTYPE_BYTES, WEIGHT_DTYPES, ModelTable, table_for
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.arrays import Read
from mswift.tuners.detect import HF_FOLDER
from mswift.tuners.export import read_rows, stored_tensors
from mswift.tuners.peft_config import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    check_adapter_dir,
    read_peft_config,
)
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import adapter_table, promised_shapes

BASE_CONFIG = "config.json"


@dataclass(frozen=True)
class AdapterFiles:
    """An opened adapter. tensors: PEFT name without its prefix -> (dtype, shape); `read` knows the same names.

    config: the bytes of adapter_config.json, of which `settings` is the reading; base_config: those of the base
    model's config.json; side_files: what else lies beside (tokenizer, README).
    """

    path: Path
    format: str
    table: ModelTable
    settings: PeftSettings
    config: bytes
    base_config: bytes
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Read
    side_files: Sequence[Path]


def find_base(adapter: Path, named: object, base_model: str | None) -> Path:
    """The directory whose config.json describes the base: --base_model, or what adapter_config.json names.

    Raises ConfigError when there is none on this machine.
    """
    path = Path(base_model) if base_model is not None else Path(str(named or "")).expanduser()
    if (base_model is not None or named) and (path / BASE_CONFIG).is_file():
        return path
    if base_model is not None:
        raise ConfigError(f"--base_model {base_model}: no {BASE_CONFIG} there; give the directory of the base model")
    what = f"its base is {named!r}, no directory with {BASE_CONFIG} here" if named else "it does not name its base"
    raise ConfigError(f"--model {adapter}: {what}; pass --base_model DIR (of which only {BASE_CONFIG} is read)")


def open_peft(path: Path, base_model: str | None) -> AdapterFiles:
    """A PEFT directory, checked against its configuration and the table of its base; CheckpointError names a fault."""
    settings, data = read_peft_config(path), check_adapter_dir(path)
    base = find_base(path, data.get("base_model_name_or_path"), base_model)
    stored = read_header(path / WEIGHTS_FILE)
    for name in stored:
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{path / WEIGHTS_FILE}: tensor {name} does not begin with {PREFIX}")
    own = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    files = AdapterFiles(
        path,
        "PEFT",
        adapter_table(table_for(read_config(base)), own),
        settings,
        (path / CONFIG_FILE).read_bytes(),
        (base / BASE_CONFIG).read_bytes(),
        {name: (tensor.dtype, tensor.shape) for name, tensor in own.items()},
        _Reader(own).read,
        side_files(path),
    )
    check_tensors(files)
    return files


def open_stored(path: Path, base_model: str | None) -> AdapterFiles:
    """The adapter of a training checkpoint, or one that `mswift convert` has written."""
    folder = path / HF_FOLDER
    source = TorchDistSource(path)
    settings = read_peft_config(folder)
    base = folder if base_model is None and (folder / BASE_CONFIG).is_file() else find_base(path, None, base_model)
    own = stored_tensors(source)
    table = adapter_table(table_for(read_config(base)), own)
    aliases = {name: trained_name(table, name) for name in promised_shapes(table, settings) if name not in own}
    found = {name: own[alias] for name, alias in aliases.items() if alias in own}  # a tied head, stored once

    def read(name: str, region: Region, out: memoryview) -> None:
        read_rows(source, name if name in own else aliases[name], region, out)

    files = AdapterFiles(
        path,
        "torch_dist",
        table,
        settings,
        (folder / CONFIG_FILE).read_bytes(),
        (base / BASE_CONFIG).read_bytes(),
        own | found,
        read,
        side_files(folder),
    )
    check_tensors(files)
    return files


def check_tensors(files: AdapterFiles) -> None:
    """CheckpointError unless the adapter has exactly the tensors that its configuration promises for its base."""
    promised = promised_shapes(files.table, files.settings)
    for name, shape in promised.items():
        if name not in files.tensors:
            raise CheckpointError(f"{files.path} lacks {PREFIX}{name} {list(shape)}, which {CONFIG_FILE} asks for")
        dtype, found = files.tensors[name]
        if found != shape:
            raise CheckpointError(
                f"{files.path}: {PREFIX}{name} has shape {list(found)}, {CONFIG_FILE} and the base need {list(shape)}"
            )
        if dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{files.path}: {PREFIX}{name} is {dtype}; known: {' '.join(WEIGHT_DTYPES)}")
    extra = sorted(files.tensors.keys() - promised.keys())
    if extra:
        raise CheckpointError(
            f"{files.path}: {PREFIX}{extra[0]} {list(files.tensors[extra[0]][1])} has no place in this adapter "
            f"({len(extra)} such tensors)"
        )


def side_files(folder: Path) -> list[Path]:
    """What lies beside an adapter: tokenizer, README, templates."""
    return [path for path in carried_files(folder) if path.name not in (CONFIG_FILE, BASE_CONFIG)]


class _Reader:
    """Regions of the tensors of one safetensors file."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._fd = -1
        self._tile = memoryview(bytearray(PIECE_BYTES))

    def read(self, name: str, region: Region, out: memoryview) -> None:
        tensor = self._tensors[name]
        if self._fd < 0:
            self._fd = open_read(tensor.path)
        starts = (tuple(0 for _ in region.offsets), region.offsets)
        box = identity((name, name), region, starts)
        copy = flatten(box, (region.sizes, tensor.shape), DTYPE_BYTES[tensor.dtype])
        gather(self._fd, tensor.path, copy.moved(1, tensor.offset), out.cast("B"), 0, self._tile)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
