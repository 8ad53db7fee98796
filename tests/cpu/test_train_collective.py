"""Ranks that fail, wait or disagree: all leave together, nobody is cut off while another one works."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mswift import run_lock, rundir
from tests.support.ranks import RankError, RankPool

HERE = "tests/cpu/test_train_collective.py:"
TIMEOUT_SECONDS = 3.0


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two ranks whose collectives give up after TIMEOUT_SECONDS."""
    pool = RankPool(2)
    pool.run(HERE + "start", None, 120)
    yield pool
    pool.close()


def start(_: None) -> None:
    from mswift.launchers.environment import current
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    info = current()
    assert info is not None
    groups.init(ParallelDims(world_size=2), device.prepare("cpu"), info, timeout_seconds=TIMEOUT_SECONDS)


def fail_on_one(kind: str) -> str:
    import torch.distributed as dist

    from mswift.train.collective import agreed

    errors = {"bug": ValueError("no such thing"), "disk": OSError(5, "Input/output error")}
    try:
        with agreed("saving x"):
            if dist.get_rank() == 1:
                raise errors[kind]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def wait_long(_: None) -> float:
    import torch.distributed as dist

    from mswift.train.collective import patient_barrier

    started = time.monotonic()
    if dist.get_rank() == 0:
        time.sleep(TIMEOUT_SECONDS + 2)
    patient_barrier()
    patient_barrier()
    return time.monotonic() - started


def wait_in_a_collective(_: None) -> None:
    import torch.distributed as dist

    from mswift.train.collective import barrier

    if dist.get_rank() == 0:
        time.sleep(TIMEOUT_SECONDS + 2)
    barrier()


def enter(payload: tuple[str, bool]) -> str:
    """Rank 1 sees no checkpoint where it is told to be blind."""
    from contextlib import ExitStack

    from mswift.config.train import SftConfig
    from mswift.errors import MswiftError
    from mswift.launchers.environment import current
    from mswift.topology import ParallelDims
    from mswift.train.entry import enter_run_directory
    from mswift.train.resume import find_resume_point
    from mswift.train.run import Start

    output_dir, blind = payload
    info: Any = current()
    resume = None if blind and info.rank == 1 else find_resume_point(Path(output_dir), "auto")
    config = SftConfig(model="unused", output_dir=output_dir)
    reader: Any = SimpleNamespace(hf_files=Path("unused"))
    try:
        with ExitStack() as stack:
            enter_run_directory(Start("sft", config, info, ParallelDims(world_size=2), reader, resume), stack)
    except MswiftError as error:
        return str(error)
    return "entered"


def test_who_keeps_the_others_waiting() -> None:
    """The silent first, then those behind, then those that are in no wait; else nobody is named."""
    from mswift.train.hang import Position, blame

    def at(rank: int, moves: int, waits: bool) -> Position:
        return Position(rank, "node", 100 + rank, 5, "computing", moves, waits)

    assert "ranks 1, 3 do not answer" in blame([at(0, 9, True), at(2, 9, True)], 4)
    assert blame([at(0, 9, True), at(1, 8, True)], 2) == (
        "the others wait for rank 1 (pid 101 on node; step 5, computing)"
    )
    assert "wait for rank 0 (pid 100" in blame([at(0, 9, False), at(1, 9, True)], 2)
    assert "all ranks wait for each other" in blame([at(0, 9, True), at(1, 9, True)], 2)
    assert "and 1 more" in blame([*(at(rank, 1, True) for rank in range(9)), at(9, 2, True)], 10)


def test_any_failure_of_one_rank_is_a_failure_of_all(pool: RankPool) -> None:
    other, own = pool.run(HERE + "fail_on_one", "bug", 60)
    assert own == "ValueError: no such thing"
    assert other == "CheckpointError: saving x failed on rank 1: ValueError: no such thing"
    for text in pool.run(HERE + "fail_on_one", "disk", 60):
        assert re.match(r"CheckpointError: saving x failed on rank 1: OSError: .*Input/output error", text)


def hand_over(value: str | None) -> str | None:
    import torch.distributed as dist

    from mswift.train.collective import from_writer

    writes = dist.get_rank() == 0
    return from_writer(value if writes else "not asked", writes)


def test_the_writer_of_a_machine_hands_over(pool: RankPool) -> None:
    assert pool.run(HERE + "hand_over", "entry", 60) == ["entry", "entry"]
    assert pool.run(HERE + "hand_over", None, 60) == [None, None]


def test_ranks_must_see_the_same_checkpoints(pool: RankPool, tmp_path: Path) -> None:
    partial = rundir.partial_dir(tmp_path, 5)
    partial.mkdir()
    rundir.commit(partial, rundir.checkpoint_dir(tmp_path, 5), {})
    assert pool.run(HERE + "enter", (str(tmp_path), False), 60) == ["entered", "entered"]
    for text in pool.run(HERE + "enter", (str(tmp_path), True), 60):
        assert "rank 1 sees no checkpoint there, rank 0 checkpoint-5" in text
    with run_lock.locked(tmp_path):
        rank0, _ = pool.run(HERE + "enter", (str(tmp_path), False), 60)
    assert "another run is writing there now" in rank0


def test_a_rank_that_works_longer_than_the_timeout_is_waited_for(pool: RankPool) -> None:
    """The partner: the same wait inside a collective fails (last, since it breaks the group)."""
    assert min(pool.run(HERE + "wait_long", None, 60)) >= TIMEOUT_SECONDS + 1.5
    with pytest.raises(RankError, match="(?i)time"):
        pool.run(HERE + "wait_in_a_collective", None, 60)
