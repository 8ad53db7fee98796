"""Samples in shuffled order out of a file that is not in memory: bytes from the disk, and time, by number of ranks.

Every rank reads the same 64 batches of 8 samples of 4,096 tokens, as the ranks of a tensor-, context- or
pipeline-parallel group do, through mswift.data.apart.Apart. The peer is a numpy.memmap, read as it comes. The file is
taken out of the page cache before each row. Then what it takes to broadcast one batch over gloo instead.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mswift.data.apart import Apart
from mswift.data.order import sample_ids

_LENGTH, _ROWS, _STEPS = 4096, 8, 64
SPAWN = multiprocessing.get_context("spawn")


def write_tokens(path: Path, num_tokens: int) -> None:
    part = np.random.default_rng(0).integers(0, 150_000, 1 << 20).astype(np.int32).tobytes()
    with path.open("wb") as file:
        for _ in range(num_tokens >> 20):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """From disks, by this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def reader(path: Path, apart: bool, barrier: Any, answers: Any) -> None:
    mapped = np.memmap(path, np.int32, "r")
    array = Apart(mapped) if apart else mapped
    number = len(array) // _LENGTH - 1
    barrier.wait()
    before, seconds = bytes_read(), []
    for step in range(_STEPS):
        barrier.wait()
        started = time.perf_counter()
        for index in sample_ids(number, 1, step * _ROWS, _ROWS):
            np.array(array[index * _LENGTH : (index + 1) * _LENGTH + 1])
        seconds.append(time.perf_counter() - started)
    answers.put((bytes_read() - before, float(np.median(seconds))))


def sender(rank: int, size: int, port: int, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    batch, seconds = torch.zeros(_ROWS * (_LENGTH + 1), dtype=torch.int32), []
    for _ in range(_STEPS):
        dist.barrier()
        started = time.perf_counter()
        dist.broadcast(batch, 0)
        seconds.append(time.perf_counter() - started)
    answers.put((0, float(np.median(seconds))))
    dist.destroy_process_group()


def together(work: Any, arguments: list[tuple[Any, ...]]) -> tuple[float, float]:
    """(MB that all processes read, milliseconds of the slowest)."""
    answers = SPAWN.Queue()
    processes = [SPAWN.Process(target=work, args=(*each, answers)) for each in arguments]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(each[0] for each in found) / 1e6, max(each[1] for each in found) * 1e3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def reading(folder: Path, megatokens: int, sizes: Sequence[int]) -> list[str]:
    """By number of ranks; the file has so many million tokens."""
    asked = _STEPS * _ROWS * (_LENGTH + 1) * 4 / 1e6
    lines = [
        f"{_STEPS} batches of {_ROWS} samples, {asked:.1f} MB, of a file of {megatokens * 4} MiB",
        "",
        "| | ranks | MB from the disk, all ranks | ms a batch, median of the slowest rank |",
        "|---|---|---|---|",
    ]
    path = folder / "tokens.bin"
    write_tokens(path, megatokens << 20)
    for apart in (False, True):
        for size in sizes:
            forget(path)
            barrier = SPAWN.Barrier(size)
            read, slowest = together(reader, [(path, apart, barrier)] * size)
            lines.append(f"| {'Apart' if apart else 'memmap'} | {size} | {read:,.1f} | {slowest:.2f} |")
    path.unlink()
    for size in sizes:
        if size > 1:
            port = free_port()
            _, slowest = together(sender, [(rank, size, port) for rank in range(size)])
            lines.append(f"| a broadcast (gloo) | {size} | | {slowest:.2f} |")
    return lines
