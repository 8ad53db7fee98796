"""The end of a job's ranks: nothing of them is alive when the interpreter ends, where a thread could abort it.

A thread of a gloo group that lets go of the last tensor of a collective wants the interpreter's lock; where Python is
about to end it does not get it, and C++ ends the process: "terminate called without an active exception", SIGABRT.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mswift import rundir
from tests.support.commands import command, make_home, run_program
from tests.support.server import ENVIRON, ROOT

PROBE = ROOT / "tests/support/exit_probe"
GLOO = "pt_gloo_runloop"
"""torch's name for the threads that run a group's collectives."""


def ends(home: Path, tmp_path: Path, *flags: str) -> list[dict[str, Any]]:
    """What two ranks that torchrun started had left at their ends."""
    (tmp_path / "ends").mkdir()
    path = os.pathsep.join(map(str, (PROBE, ROOT)))
    environ = ENVIRON | {"PYTHONPATH": path, "EXIT_PROBE": str(tmp_path / "ends")}
    run_program(command(home, "sft", tmp_path / "run", "--nproc_per_node", "2", *flags), env=environ)
    return [json.loads((tmp_path / "ends" / str(rank)).read_text()) for rank in range(2)]


ASYNC = ("--train_iters", "2", "--save_steps", "1", "--async_save")


@pytest.mark.parametrize(
    "flags",
    [
        ("--backend", "fsdp", "--packing"),
        pytest.param(("--tensor_model_parallel_size", "2"), marks=pytest.mark.whole),
    ],
)
def test_a_rank_ends_without_threads_and_groups(tmp_path: Path, flags: tuple[str, ...]) -> None:
    home = make_home(tmp_path / "home")
    for rank, end in enumerate(ends(home, tmp_path, *ASYNC, *flags)):
        assert end["groups"] == [], rank
        assert GLOO not in end["native"], (rank, end)
        assert end["threads"] == [], (rank, end)
        assert not end["watches_bars"], rank  # a thread that is told to end, and not awaited
    saved = [
        event["step"] for event in rundir.read_objects(tmp_path / "run" / rundir.LEDGER) if event["event"] == "save"
    ]
    assert saved == [1, 2]  # also the one that the last save waited for


LEAVING = """
import gc, sys, torch, torch.distributed as dist
from pathlib import Path
from mswift.parallel import groups

how, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
dist.all_reduce(torch.ones(1))
cycle = [dist.group.WORLD]
cycle.append(cycle)
del cycle
gc.disable()  # which of them would come first is chance
groups.destroy() if how == "orderly" else dist.destroy_process_group()
print(sum(path.read_text().strip() == "pt_gloo_runloop" for path in Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.parametrize(("how", "lives"), [("orderly", False), ("held", True)])
def test_the_threads_of_a_group_in_a_cycle_end_before_the_interpreter_does(
    tmp_path: Path, how: str, lives: bool
) -> None:
    """Without the collector they go on, which the other case shows; what comes of that is a matter of moments."""
    store = str(tmp_path / "store")
    argv = [sys.executable, "-c", LEAVING, how]
    environ = ENVIRON | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([*argv, str(rank), store], env=environ, stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    for rank in ranks:
        said, _ = rank.communicate(timeout=60)
        assert (int(said) > 0) == lives, said
        assert lives or rank.returncode == 0
