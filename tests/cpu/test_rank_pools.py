"""The processes that the other tests run on: clean at the start, told apart when they fail, never left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import ranks, server
from tests.support.ranks import RankError, RankPool, join, run_ranks
from tests.support.server import ROOT


@pytest.fixture
def pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def refused(pool: RankPool, function: Callable[[Any], Any], payload: Any = None, timeout: float = 60.0) -> str:
    """The text of the error that this call ends with."""
    with pytest.raises(RankError) as caught:
        pool.run(function, payload, timeout)
    return str(caught.value)


def assert_gone(pids: list[int]) -> None:
    """None of these processes exists (a zombie whose parent is about to wait for it does not count)."""
    end = time.monotonic() + 20
    while left := [pid for pid in pids if _exists(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.02)


def _exists(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- functions of ranks


def start(_: None) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    return {
        "environment": [os.environ[name] for name in names],
        "threads": len(server.threads()),
        "torch threads": torch.get_num_threads(),
        "joined": dist.is_initialized(),
        "models": "mswift.parallel.megatron.engine" in sys.modules,
    }


def fails_on_one(word: str) -> str:
    if os.environ["RANK"] == "1":
        raise ValueError(f"no {word} here")
    return word


def crashes_on_one(number: int) -> None:
    if os.environ["RANK"] == "1":
        print("last words", flush=True)
        os.kill(os.getpid(), number)


def exits_on_one(status: int) -> None:
    if os.environ["RANK"] == "1":
        os._exit(status)


def hangs_on_one(_: None) -> None:
    """Rank 1 does not come; rank 0 waits for it in a collective."""
    import torch

    join(2)
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    torch.distributed.all_reduce(torch.ones(1))


def unpicklable(_: None) -> Any:
    return lambda: None


def children(_: None) -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def job(_: None) -> list[int]:
    """Groups that are made, used and destroyed again leave nothing behind."""
    import torch
    import torch.distributed as dist

    join(2)
    group = dist.new_group([0, 1])
    ones = torch.ones(1)
    dist.all_reduce(ones, group=group)
    dist.destroy_process_group(group)
    return [int(ones), os.getpid()]


def leaves(what: str) -> None:
    import torch
    import torch.distributed as dist

    join(2)
    if what == "group":
        dist.new_group([0, 1], group_desc="forgotten")
    elif what == "engine's groups":
        from mswift.parallel.megatron import world
        from mswift.topology import ParallelDims

        world.enter(ParallelDims(world_size=2, tp=2), 0)
    elif what == "thread":
        threading.Thread(target=time.sleep, args=(1000,), daemon=True, name="forgotten").start()
    elif what == "process":
        import multiprocessing

        multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), name="forgotten").start()
    elif what == "variable":
        os.environ["FORGOTTEN"] = "1"
    elif what == "directory":
        os.chdir("/")
    elif what == "dtype":
        torch.set_default_dtype(torch.float64)
    elif what == "gradients":
        torch.set_grad_enabled(False)
    elif what == "threads of torch":
        torch.set_num_threads(2)
    elif what == "determinism":
        torch.use_deterministic_algorithms(True)


# -- a rank that works


def test_a_rank_starts_clean(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # of this test alone
    alone = RankPool(1)
    answers = [*pool.run(start, None, 60), *alone.run(start, None, 60)]
    alone.close()
    for rank, found in enumerate(answers):
        place = [["0", "2", "0"], ["1", "2", "1"], ["0", "1", "0"]][rank]
        assert found == {
            "environment": [*place, "1", "1"], "threads": 1, "torch threads": 1, "joined": False, "models": True
        }  # fmt: skip


def seed_of_hashes(_: None) -> int:
    return hash("order of a set")


def test_two_ranks_have_different_hashes(pool: RankPool) -> None:
    """What depends on the order of a set is found, as in programs of their own."""
    first, second = pool.run(seed_of_hashes, None, 60)
    assert first != second


def test_processes_are_kept_between_calls(pool: RankPool) -> None:
    assert pool.run(job, None, 60) == pool.run(job, None, 60) == [[2, pid] for pid in pool.pids]


# -- one that fails


def test_the_traceback_of_a_rank_is_in_the_error(pool: RankPool) -> None:
    text = refused(pool, fails_on_one, "bread")
    assert "rank 1:\nTraceback" in text
    assert "in fails_on_one" in text
    assert "ValueError: no bread here" in text
    assert "rank 0" not in text
    assert pool.run(start, None, 60)[1]["joined"] is False  # the pool itself goes on
    assert "pickle local object" in refused(pool, unpicklable)


@pytest.mark.parametrize(("function", "how"), [(crashes_on_one, signal.SIGSEGV), (exits_on_one, 7)])
def test_a_crash_tells_status_output_and_stack(pool: RankPool, function: Any, how: int) -> None:
    text = refused(pool, function, int(how))
    assert f"rank 1:\nthe process ended with status {-how if function is crashes_on_one else how}" in text
    assert "rank 0" not in text
    if function is crashes_on_one:
        assert "last words\nFatal Python error: Segmentation fault" in text
        assert "in crashes_on_one" in text


def test_silent_ranks_are_named_with_their_stacks_and_killed(pool: RankPool) -> None:
    pids = pool.pids
    text = refused(pool, hangs_on_one, timeout=4.0)
    first, second = text.split("rank 1:\n")
    for part, where in ((first, "in all_reduce"), (second, "in hangs_on_one")):
        assert "no answer in time" in part
        assert "most recent call first" in part
        assert where in part
    pool.close()
    assert_gone(pids)


def test_run_ranks_starts_anew_after_an_error() -> None:
    with pytest.raises(RankError, match="no bread"):
        run_ranks(2, fails_on_one, "bread")
    before = ranks._pools.get(2)
    assert before is None
    assert run_ranks(2, fails_on_one_never, "bread") == ["bread", "bread"]


def fails_on_one_never(word: str) -> str:
    return word


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("group", "process group "),
        ("engine's groups", "process group "),
        ("thread", "thread forgotten"),
        ("process", "process forgotten"),
        ("variable", "environment variable FORGOTTEN: None is now '1'"),
        ("directory", "directory: "),
        ("dtype", "default dtype: torch.float32 is now torch.float64"),
        ("gradients", "gradients enabled: True is now False"),
        ("threads of torch", "torch threads: 1 is now 2"),
        ("determinism", "deterministic algorithms: False is now True"),
    ],
)
def test_what_a_function_leaves_behind_is_an_error(pool: RankPool, what: str, told: str) -> None:
    text = refused(pool, leaves, what)
    for rank in range(2):
        assert f"rank {rank}:\n" in text
    assert text.count(f"leaves returned and left behind: {told}") == 2, text


# -- nothing stays


def test_children_of_ranks_end_with_the_pool(pool: RankPool) -> None:
    pids = pool.pids + pool.run(children, None, 60)
    pool.close()
    assert_gone(pids)


def test_everything_ends_with_the_process_of_the_tests(tmp_path: Path) -> None:
    """kill -9 of the test process: its server and the forks go too, even those that are busy."""
    code = (
        "import os, time; from pathlib import Path; from tests.support.server import ForkServer\n"
        "server = ForkServer(modules=())\n"
        f"forks = [server.fork('time:sleep', (1000,), Path({str(tmp_path)!r}) / 'o', os.environ) for _ in range(2)]\n"
        "print(server.pid, *(fork.pid for fork in forks), flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(_exists, pids))
        process.kill()
    assert_gone(pids)


def test_seconds_of_forks_are_counted(tmp_path: Path) -> None:
    before = server.cpu_seconds()
    pool = RankPool(1)
    pool.run(burn, 1.0, 60)
    assert server.cpu_seconds() - before > 1.0
    pool.close()
    assert server.cpu_seconds() - before > 1.0


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
