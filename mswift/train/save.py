"""Writing one checkpoint, in phases that all ranks go through together: at once, or in a thread beside the training."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from mswift import rundir
from mswift.converters.io.torch_dist import ShardWriter, WrittenFile, write_index
from mswift.converters.layout import Region
from mswift.errors import CheckpointError
from mswift.parallel.engine import Engine, StateShard
from mswift.train.checkpoint import RunState, generators
from mswift.train.collective import agreed, gather_on_first
from mswift.train.retention import prune

_COMMIT_SEEN_SECONDS = 120.0  # network file systems cache a listing for up to a minute
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}

Phase = Callable[[], None]


def state_shards(engine: Engine, rank: int) -> Iterator[StateShard]:
    """What this rank writes: its boxes of the model and of the optimizer's state, its generators."""
    yield from engine.model_shards()
    yield from engine.optimizer_shards()
    for name, value in generators().items():
        yield StateShard(f"rng.{rank}.{name}", tuple(value.shape), Region((0,), tuple(value.shape)), value)


def dtype_name(tensor: torch.Tensor) -> str:
    """As file formats call it."""
    return _DTYPES[tensor.dtype]


def shard_bytes(shard: StateShard) -> memoryview:
    """The bytes of a shard in C order; a copy only where they are not in host memory."""
    tensor = shard.tensor.detach().to("cpu").contiguous()
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class CheckpointSave:
    """The checkpoint of one step on its way to the disk.

    shards: this rank's, taken one after the other; hf_files: what goes to hf/, by name (rank 0's are written);
    keep: how many checkpoints stay once this one is published (None: all).
    """

    def __init__(
        self,
        output_dir: Path,
        state: RunState,
        rank: int,
        shards: Iterable[StateShard],
        hf_files: Mapping[str, bytes],
        keep: int | None = None,
    ) -> None:
        self.destination = rundir.checkpoint_dir(output_dir, state.step)
        self._partial = rundir.partial_dir(output_dir, state.step)
        self._state, self._rank, self._shards, self._hf_files, self._keep = state, rank, shards, hf_files, keep
        self._files: list[WrittenFile] = []

    def phases(self) -> Iterator[Phase]:
        """What this rank does, in turn. No rank begins one before all are through with the one before.

        Phases have no collectives, so they may run in a thread; what happens between them has.
        """
        yield self._make_directory
        yield self._write_shards
        self._files = [WrittenFile.from_dict(value) for value in gather_on_first(self._files[0].as_dict())]
        yield self._publish
        yield self._see

    def discard(self) -> None:
        """Remove what was written, after a failure."""
        if self._rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _make_directory(self) -> None:
        if self._rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def _write_shards(self) -> None:
        """This rank's file, hashed from the buffers; a shard is let go of when it is written."""
        writer = ShardWriter(self._partial, f"__{self._rank}_0.distcp")
        for shard in self._shards:
            writer.add(shard.key, dtype_name(shard.tensor), shard.shape, shard.region, shard_bytes(shard))
        self._files = [writer.close()]

    def _publish(self) -> None:
        """Index, side files, COMMIT, rename. Rank 0 only."""
        if self._rank != 0:
            return
        write_index(self._partial, self._files)
        (self._partial / rundir.HF_FILES).mkdir()
        for name, data in self._hf_files.items():
            _write_bytes(self._partial / rundir.HF_FILES / name, data)
        _write_bytes(self._partial / rundir.STATE, json.dumps(self._state.as_dict(), indent=1).encode())
        records = {file.name: rundir.FileRecord(file.size, file.blake3) for file in self._files}
        for path in sorted(self._partial.rglob("*")):
            name = path.relative_to(self._partial).as_posix()
            if path.is_file() and name not in records:
                records[name] = rundir.hash_file(path)
        rundir.fsync_path(self._partial / rundir.HF_FILES)
        rundir.commit(self._partial, self.destination, records)

    def _see(self) -> None:
        """Every rank sees what was published; then old checkpoints go."""
        rundir.await_commit(self.destination, _COMMIT_SEEN_SECONDS)
        if self._rank == 0 and self._keep is not None:
            prune(self.destination.parent, self._keep)


def save_now(save: CheckpointSave) -> Path:
    """All phases, here; on any failure nothing is published and all ranks raise CheckpointError."""
    try:
        for phase in save.phases():
            with agreed(f"saving {save.destination}"):
                phase()
    except CheckpointError:
        save.discard()
        raise
    return save.destination


def save_state(
    engine: Engine,
    output_dir: Path,
    state: RunState,
    rank: int,
    hf_files: Mapping[str, bytes],
    keep: int | None = None,
) -> Path:
    """Save what the engine holds, here and now; arguments as of CheckpointSave."""
    return save_now(CheckpointSave(output_dir, state, rank, state_shards(engine, rank), hf_files, keep))


class BackgroundSave:
    """A save that is under way: its phases run in a thread; between them the ranks' main threads meet in `advance`."""

    def __init__(self, save: CheckpointSave) -> None:
        self._save, self._phases = save, save.phases()
        self._failure: BaseException | None = None
        with agreed(f"saving {save.destination}"):
            next(self._phases)()  # makes the directory
        self._start(next(self._phases))

    @property
    def destination(self) -> Path:
        """The checkpoint that it will be."""
        return self._save.destination

    @property
    def is_busy(self) -> bool:
        """Whether this rank is inside a phase."""
        return self._thread.is_alive()

    def advance(self) -> bool:
        """On all ranks: end this phase and begin the next; True once the checkpoint is published and seen.

        Waits where the phase is not over. A failure of any rank is a CheckpointError on all.
        """
        self._thread.join()
        try:
            with agreed(f"saving {self.destination}"):
                if self._failure is not None:
                    raise self._failure
            phase = next(self._phases, None)
        except CheckpointError:
            self._save.discard()
            raise
        if phase is not None:
            self._start(phase)
        return phase is None

    def finish(self) -> Path:
        """On all ranks: wait for its end."""
        while not self.advance():
            pass
        return self.destination

    def _start(self, phase: Phase) -> None:
        # A daemon: a process that must end (an error, a second signal) leaves it, and nothing is published.
        self._thread = threading.Thread(target=self._work, args=(phase,), name="checkpoint", daemon=True)
        self._thread.start()

    def _work(self, phase: Phase) -> None:
        try:
            phase()
        except BaseException as error:
            self._failure = error


class Staging:
    """Host memory for one copy of this rank's state, kept from save to save; pinned where there is a GPU."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def copy(self, shards: Iterable[StateShard], device: torch.device) -> list[StateShard]:
        """The shards as they are now; what trains on may change afterwards."""
        copies = []
        for number, shard in enumerate(shards):
            buffer = self._buffer(number, shard.tensor, device)
            buffer.copy_(shard.tensor.detach().view(-1), non_blocking=device.type == "cuda")
            copies.append(StateShard(shard.key, shard.shape, shard.region, buffer))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return copies

    def _buffer(self, number: int, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        if number < len(self._buffers):
            buffer = self._buffers[number]
            if buffer.numel() == like.numel() and buffer.dtype == like.dtype:
                return buffer
            del self._buffers[number:]
        self._buffers.append(torch.empty(like.numel(), dtype=like.dtype, pin_memory=device.type == "cuda"))
        return self._buffers[number]


def _write_bytes(path: Path, data: bytes) -> None:
    """Write and fsync a small file."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
