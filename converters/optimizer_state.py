"""Optimizer state that moves with its weights: between layouts, to Hugging Face names and back, file to file.

A state (exp_avg, exp_avg_sq, momentum_buffer; master: the fp32 weights of a bfloat16 run) is shaped and laid out like
the weights, so the pieces of the family's table move it. Beside a Hugging Face model it lies in

    optimizer/<state>/             config.json and model.safetensors under the weights' own names, fp32
    optimizer/rng.safetensors      generator states by rank, which count at the same layout only
    mswift_optimizer.json          step, BLAKE3 of every state by Hugging Face name, run.json of the run if there is one

and in a torch_dist directory as `optimizer.<state>.<key>` in the same index as the weights, with the same
mswift_optimizer.json: equal records are the proof that nothing changed on the way. With run.json comes COMMIT: what is
written can be resumed at any layout. Read as well: what megatron-core saves in the space of the model.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from mswift import run_lock, rundir
from mswift.converters.io.dcp_metadata import METADATA, read_metadata
from mswift.converters.io.files import check_absent, in_words, sync_directory, write_file
from mswift.converters.io.safetensors import SINGLE, encode_header
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.io.side_files import OPTIMIZER_RECORD as RECORD
from mswift.converters.io.torch_dist import ShardWriter, rewrite_index, split_region
from mswift.converters.layout import Region
from mswift.converters.manifest import Manifest, hash_whole
from mswift.converters.optimizer_sources import (
    BLOCK_BYTES,
    FOLDER,
    RNG,
    StateSource,
    has_states,
    open_states,
    read_record,
)
from mswift.errors import CheckpointError

SHARD = "__optimizer_0.distcp"
Hashes = dict[str, dict[str, str]]
"""State -> Hugging Face name -> BLAKE3."""


@dataclass(frozen=True)
class StateReport:
    """The proof: that of the weights, and what was moved beside them."""

    weights: Manifest
    hashes: Hashes
    num_elements: int
    step: int | None
    resumable: bool

    def __str__(self) -> str:
        lines = [str(self.weights)]
        digest = blake3(json.dumps(self.hashes, sort_keys=True).encode()).hexdigest()
        lines.append(f"  optimizer {', '.join(self.hashes)}: {self.num_elements:,} elements each, step {self.step}")
        lines.append(f"  blake3    {digest} (of all states)")
        if self.resumable:
            lines.append("  resumable: as checkpoint-N in an --output_dir, at any layout")
        return "\n".join(lines)


def convert_with_optimizer(
    source: Path,
    destination: Path,
    to: Literal["megatron", "hf"],
    convert_weights: Callable[[Path], Manifest],
    model_config: Path | None = None,
) -> StateReport:
    """Weights by `convert_weights`, states beside them, published together by one rename.

    Raises CheckpointError where the source has no optimizer state, lacks some of it, or holds it in a form that
    belongs to one layout; then nothing is published.
    """
    check_absent(destination, "--output_dir")
    states = open_states(source, model_config)
    with _building(destination) as directory:
        weights = convert_weights(directory)
        if to == "hf":
            hashes = _write_hf(states, directory)
        else:
            hashes = _write_megatron(states, directory)
        _check_record(states, hashes)
        record = {
            "version": 1,
            "step": states.step,
            "states": hashes,
            "dropped": states.dropped,
            "run": states.run,
        }
        write_file(directory / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        _extend_manifest(directory, weights)
        if to == "megatron" and states.run is not None:
            _commit(directory, states.run)
        sync_directory(directory)
        directory.rename(destination)
    sync_directory(destination.absolute().parent)
    elements = sum(prod(shape) for shape in states.table.hf.values())
    return StateReport(weights, hashes, elements, states.step, to == "megatron" and states.run is not None)


@contextmanager
def _building(destination: Path) -> Iterator[Path]:
    """A place beside the destination that nobody else uses and that is gone afterwards."""
    holder = destination.absolute().with_name(f".{destination.name}.with-optimizer")
    with ExitStack() as stack:
        stack.enter_context(run_lock.locked(holder))
        try:
            shutil.rmtree(holder / "new", ignore_errors=True)  # of a conversion that was killed
            yield holder / "new"
        except OSError as error:
            raise in_words(error, destination, "--output_dir") from None
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def _write_hf(states: StateSource, directory: Path) -> Hashes:
    """optimizer/<state>/model.safetensors: HF tensors as streams of bytes, hashed on the way."""
    hashes: Hashes = {}
    table, folder = states.table, directory / FOLDER
    folder.mkdir()
    for state in states.states:
        own = folder / state
        own.mkdir()
        shutil.copyfile(directory / "config.json", own / "config.json")
        hashes[state] = {}
        header, _ = encode_header({name: ("F32", table.hf[name]) for name in table.hf_order})
        with open(own / SINGLE, "xb") as file:
            file.write(header)
            for name in table.hf_order:
                digest = blake3()
                for block in states.hf_blocks(state, name):
                    digest.update(block)
                    file.write(block)
                hashes[state][name] = digest.hexdigest()
        rundir.fsync_path(own / SINGLE)
        sync_directory(own)
    _write_generators(states, folder)
    sync_directory(folder)
    return hashes


def _write_generators(states: StateSource, folder: Path) -> None:
    if states.generators:
        shapes = {name: ("U8", (len(data),)) for name, data in states.generators.items()}
        header, _ = encode_header(shapes)
        write_file(folder / RNG, header + b"".join(states.generators.values()))


def _write_megatron(states: StateSource, directory: Path) -> Hashes:
    """optimizer.<state>.<key> in one more file of the directory; hashes are those of what lies there afterwards."""
    table, index = states.table, read_metadata(directory)
    writer = ShardWriter(directory, SHARD)
    for state in states.states:
        for key, tensor in table.megatron.items():
            for whole in table.storage_regions(key):
                for region in split_region(whole, 4, BLOCK_BYTES):
                    block = bytearray(region.num_elements * 4)
                    states.read(state, key, region, memoryview(block))
                    writer.add(f"optimizer.{state}.{key}", "F32", tensor.shape, region, memoryview(block))
    for name, data in states.generators.items():
        writer.add(name, "U8", (len(data),), Region((0,), (len(data),)), memoryview(data))
    rewrite_index(directory, index, [writer.close()])
    return _all_hashes(open_states(directory))


def _hash(states: StateSource, state: str, name: str) -> str:
    digest = blake3()
    for block in states.hf_blocks(state, name):
        digest.update(block)
    return digest.hexdigest()


def _check_record(states: StateSource, hashes: Hashes) -> None:
    """CheckpointError where the source's own record says otherwise: it was damaged, or the move is wrong."""
    for state, names in states.recorded.items():
        for name, said in names.items():
            found = hashes.get(state, {}).get(name)
            if found != said:
                raise CheckpointError(
                    f"{states.path}: {state} of {name} has BLAKE3 {found}, {RECORD} there says {said}: the files "
                    "were damaged, or changed"
                )


def _extend_manifest(directory: Path, weights: Manifest) -> None:
    """The record of the weights names the files that were added or written anew."""
    files = dict(weights.files)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST and (name not in files or name == METADATA):
            files[name] = hash_whole(path)
    (directory / MANIFEST).unlink()
    replace(weights, files=files).write(directory)


def _commit(directory: Path, run: Mapping[str, Any]) -> None:
    """run.json, then COMMIT of all files: what makes a directory a checkpoint of a run."""
    write_file(directory / rundir.STATE, json.dumps(run, indent=1).encode())
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    rundir.write_commit(directory, {p.relative_to(directory).as_posix(): rundir.hash_file(p) for p in paths})


def verify_states(path: Path, other: Path | None = None) -> list[str]:
    """Differences between the states in a directory and its record, or those of another directory; [] if none.

    Where only one of two directories has states, the weights alone can be compared: [].
    """
    if other is not None and not (has_states(path) and has_states(other)):
        return []
    found = _all_hashes(open_states(path))
    expected = _all_hashes(open_states(other)) if other is not None else read_record(path)["states"]
    differences = [f"optimizer state {state}: only in one of them" for state in sorted(found.keys() ^ expected.keys())]
    for state in sorted(found.keys() & expected.keys()):
        names = [name for name, digest in found[state].items() if expected[state].get(name) != digest]
        differences += [f"optimizer state {state} of {name}: bits differ" for name in names]
    return differences


def _all_hashes(states: StateSource) -> Hashes:
    return {state: {name: _hash(states, state, name) for name in states.table.hf_order} for state in states.states}
