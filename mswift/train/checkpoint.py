"""Training checkpoints: sharded, hashed while written, committed last, at any layout readable.

checkpoint-<step>/
    __<rank>_0.distcp, .metadata, common.pt, metadata.json     tensors in megatron-core's torch_dist format
        <megatron key>                    weights (a full run), model space: no padding, any layout
        adapter.<peft name>               adapters (a LoRA run)
        optimizer.<state>.<key>           fp32, laid out like their parameter
        rng.<rank>                        generator states, used only at the same layout
    hf/                                   config.json, tokenizer, (LoRA) adapter_config.json
    run.json                              step, data position, configuration, layout
    COMMIT                                sizes and BLAKE3 of all of these; written last
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mswift import rundir
from mswift.converters.io.torch_dist import ShardWriter, WrittenFile, write_index
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.errors import CheckpointError, ConfigError
from mswift.parallel.megatron.engine import MegatronEngine, StateShard
from mswift.train.collective import agreed, barrier, gather_objects, gather_on_first

_STATE_VERSION = 2
_COMMIT_SEEN_SECONDS = 120.0  # network file systems cache a listing for up to a minute
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its tensors.

    dtype: "F32" or "BF16", what it computes in; base: fingerprint of the model it was started from.
    """

    step: int
    consumed_samples: int
    optimizer_step: int
    world_size: int
    layout: Mapping[str, int]
    data_fingerprint: str
    num_samples: int
    config: Mapping[str, Any]
    dtype: str = "F32"
    base: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        mappings = {name: dict(value) for name, value in vars(self).items() if isinstance(value, Mapping)}
        return {"version": _STATE_VERSION, **vars(self), **mappings}


def read_state(checkpoint: Path) -> RunState:
    """run.json of a committed checkpoint."""
    path = checkpoint / rundir.STATE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value.pop("version")
        if version != _STATE_VERSION:
            raise CheckpointError(f"{path}: version {version}; this mswift reads {_STATE_VERSION}")
        return RunState(**value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use an older checkpoint of the run") from None


def save(engine: MegatronEngine, output_dir: Path, state: RunState, rank: int, hf_files: Mapping[str, bytes]) -> Path:
    """Write and publish the checkpoint of `state.step`; on any failure nothing is published and all ranks raise.

    hf_files: what goes to hf/, by name (rank 0's are written). Host memory above the state: one tensor at a time.
    """
    destination = rundir.checkpoint_dir(output_dir, state.step)
    partial = rundir.partial_dir(output_dir, state.step)
    try:
        with agreed(f"saving {destination}"):
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with agreed(f"saving {destination}"):
            written = _write_shards(engine, partial, rank)
        files = [WrittenFile.from_dict(value) for value in gather_on_first(written.as_dict())]
        with agreed(f"saving {destination}"):
            if rank == 0:
                _finish(partial, destination, files, state, hf_files)
        with agreed(f"re-reading {destination / rundir.COMMIT}"):
            rundir.await_commit(destination, _COMMIT_SEEN_SECONDS)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return destination


def load(engine: MegatronEngine, checkpoint: Path, rank: int, world_size: int) -> RunState:
    """Prove the files against COMMIT (each rank a share of them), then load model, optimizer and generators.

    Strict both ways: CheckpointError for a tensor that is missing, and for one that no rank has a place for.
    """
    with agreed(f"loading {checkpoint}"):
        names = sorted(rundir.read_commit(checkpoint))
        try:
            rundir.check_files(checkpoint, names[rank::world_size])
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove {checkpoint} to continue from an older one") from None
    asked: set[str] = set()

    def read(name: str, region: Region, out: memoryview) -> None:
        asked.add(name)
        source.read(name, region, out)

    with agreed(f"loading {checkpoint}"):
        state = read_state(checkpoint)
        source = TorchDistSource(checkpoint)
        engine.load_state(read, state.optimizer_step)
        if state.world_size == world_size and dict(state.layout) == engine_layout(engine):
            _load_generators(source, rank)
    known = set[str]().union(*gather_objects(sorted(asked)))
    extra = [name for name in source.tensors if name not in known and not name.startswith("rng.")]
    if extra:
        raise CheckpointError(f"{checkpoint}: {extra[0]} has no place in this run ({len(extra)} such tensors)")
    barrier()
    return state


def engine_layout(engine: MegatronEngine) -> dict[str, int]:
    """The degrees that decide which rank holds what."""
    dims = engine.dims
    sizes = {"tp": dims.tp, "pp": dims.pp, "dp": dims.dp, "sequence_parallel": int(dims.sequence_parallel)}
    sizes |= {"cp": dims.cp} if dims.cp > 1 else {}
    sizes |= {"ep": dims.ep, "etp": dims.sizes["etp"]} if dims.has_expert_axes else {}
    sizes |= {"vpp": dims.vpp} if dims.vpp else {}
    return sizes | {f"chunk {n}": layers for n, layers in enumerate(dims.chunk_layers or ())}


def check_same_data(state: RunState, fingerprint: str, num_samples: int, fixed: Mapping[str, Any]) -> None:
    """Refuse to continue on other data or another order: the position would mean other samples."""
    if state.data_fingerprint != fingerprint:
        raise ConfigError(
            f"--dataset: the tokenised data differs from that of step {state.step} ({state.num_samples} samples "
            f"then, {num_samples} now); pass the same --dataset, --max_length and tokenizer, or start a new run "
            "with another --output_dir"
        )
    for name, value in fixed.items():
        then = state.config.get(name)
        then, value = (list(v) if isinstance(v, (list, tuple)) else v for v in (then, value))
        if then != value:
            raise ConfigError(
                f"--{name}: the run of this --output_dir has {then}, the command says {value}; pass {then}, or start "
                "a new run with another --output_dir"
            )


def check_same_dtype(state: RunState, dtype: str) -> None:
    """ConfigError unless the run goes on in the dtype it has had: another one is another run."""
    names = {"F32": "float32", "BF16": "bfloat16"}
    if state.dtype != dtype:
        raise ConfigError(
            f"--torch_dtype: the run of this --output_dir computes in {names[state.dtype]}, the command would in "
            f"{names[dtype]}; pass --torch_dtype {names[state.dtype]}, or start a new run with another --output_dir"
        )


def _write_shards(engine: MegatronEngine, partial: Path, rank: int) -> WrittenFile:
    """This rank's file: its model shards, optimizer shards and generator state."""
    writer = ShardWriter(partial, f"__{rank}_0.distcp")
    for shard in engine.model_shards():
        _add(writer, shard)
    for shard in engine.optimizer_shards():
        _add(writer, shard)
    for name, value in _generators().items():
        region = Region((0,), tuple(value.shape))
        _add(writer, StateShard(f"rng.{rank}.{name}", tuple(value.shape), region, value))
    return writer.close()


def _add(writer: ShardWriter, shard: StateShard) -> None:
    """Hand the bytes of a shard to the writer."""
    tensor = shard.tensor.detach().to("cpu").contiguous()
    data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    writer.add(shard.key, _DTYPES[tensor.dtype], shard.shape, shard.region, data)


def _finish(
    partial: Path, destination: Path, files: list[WrittenFile], state: RunState, hf_files: Mapping[str, bytes]
) -> None:
    """Index, side files, COMMIT, rename. Rank 0 only."""
    write_index(partial, files)
    (partial / rundir.HF_FILES).mkdir()
    for name, data in hf_files.items():
        _write_bytes(partial / rundir.HF_FILES / name, data)
    _write_bytes(partial / rundir.STATE, json.dumps(state.as_dict(), indent=1).encode())
    records = {file.name: rundir.FileRecord(file.size, file.blake3) for file in files}
    for path in sorted(partial.rglob("*")):
        name = path.relative_to(partial).as_posix()
        if path.is_file() and name not in records:
            records[name] = rundir.hash_file(path)
    rundir.fsync_path(partial / rundir.HF_FILES)
    rundir.commit(partial, destination, records)


def _write_bytes(path: Path, data: bytes) -> None:
    """Write and fsync a small file."""
    import os

    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _generators() -> dict[str, torch.Tensor]:
    """States of torch's generators on this rank, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _load_generators(source: TorchDistSource, rank: int) -> None:
    """Put the generator states of this rank back."""
    for name, current in _generators().items():
        key = f"rng.{rank}.{name}"
        if key not in source.tensors:
            continue
        value = torch.empty(source.tensors[key].shape, dtype=torch.uint8)
        if value.shape != current.shape:
            continue  # written by another build of torch; nothing drawn here depends on it
        source.read(key, Region((0,), tuple(value.shape)), memoryview(value.numpy()))
        torch.set_rng_state(value) if name == "cpu" else torch.cuda.set_rng_state(value)
