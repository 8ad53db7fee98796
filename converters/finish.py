"""The end of a conversion: index and side files, the proof of what was written, the manifest."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mswift.converters.destinations import Destination
from mswift.converters.execute import Options
from mswift.converters.manifest import DroppedRecord, FileRecord, Manifest, TensorRecord, hash_frame, hash_whole
from mswift.converters.measured import Measured
from mswift.converters.proof import measure
from mswift.converters.sources import Source, SourceOptions, open_source
from mswift.converters.workers import Buffers, InOrder, run_all
from mswift.errors import CheckpointError


def finish(
    source: Source,
    destination: Destination,
    measured: Mapping[str, Measured | None],
    dropped: Mapping[str, DroppedRecord],
    options: Options,
    hash_output: bool,
) -> Manifest:
    """Completes the directory but for the manifest, which it returns.

    `hash_output`: everything is read again; CheckpointError naming the tensors that are not what was read.
    """
    _clear(destination)
    for file, size in destination.sizes.items():
        path = destination.directory / file
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path}: is not what was written; begin anew with --restart")
    destination.finish()
    side_files = _carry(source.side_files(), destination.directory / destination.side_folder)
    files = _files(destination, side_files, options.num_workers)
    if hash_output:
        written = open_source(destination.directory, SourceOptions(ignored=source.ignored))
        found = measure(written, options.num_workers, options.progress)
        written.close()
        wrong = [name for name, known in measured.items() if known not in (None, found[name])]
        if wrong:
            raise CheckpointError(
                f"--hash_output: {len(wrong)} tensors on the disk are not what was read ({', '.join(wrong[:3])}): "
                "the disk or the memory is faulty"
            )
        measured = found
    decoded = source.decoded
    return Manifest(
        source.format,
        destination.format,
        source.table.family.model_type,
        {name: _record(source, name, measured[name], decoded.get(name, "")) for name in source.table.hf_order},
        dropped,
        files,
        ignored_config_fields=source.ignored,
        config_edits=source.config_edits,
    )


def _record(source: Source, name: str, measured: Measured | None, decoded: str) -> TensorRecord:
    keys = [piece.names[1] for piece in source.table.hf_pieces[name]]
    rule = source.table.megatron[keys[0]].rule.kind
    keys_text = " ".join(dict.fromkeys(keys))
    return TensorRecord.of(source.dtype_of(name), source.table.hf[name], measured, rule, keys_text, decoded)


def _clear(destination: Destination) -> None:
    """Removes what an interrupted `finish` left."""
    for path in destination.directory.iterdir():
        if path.name not in destination.sizes:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _carry(files: Mapping[str, Path | bytes], folder: Path) -> list[Path]:
    """Copies what is not weights; returns the copies."""
    folder.mkdir(exist_ok=True)
    copies = []
    for name, content in files.items():
        copies.append(folder / name)
        if isinstance(content, bytes):
            copies[-1].write_bytes(content)
        else:
            shutil.copyfile(content, copies[-1])
        with open(copies[-1], "rb+") as file:
            os.fsync(file.fileno())
    return copies


def _files(destination: Destination, side_files: list[Path], workers: int) -> dict[str, FileRecord]:
    """Records of all files of the destination, hashes of what belongs to no tensor."""
    directory, files = destination.directory, {}
    for path in sorted({*(p for p in directory.iterdir() if p.is_file()), *side_files}):
        files[path.relative_to(directory).as_posix()] = FileRecord(0, "")

    def work(name: str, buffers: Buffers) -> None:
        extents = destination.extents.get(name)
        path = directory / name
        files[name] = hash_whole(path) if extents is None else hash_frame(path, extents)

    run_all(InOrder(list(files)), work, workers)
    return files
