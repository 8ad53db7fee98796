"""A rank that no longer moves: noticed by a thread in every rank, named from what all ranks write down then.

output_dir/hang-<start of the run>/rank-<r>.txt     where rank r was (one line of JSON), then the stacks of its threads
output_dir/hang-<start of the run>/flight-rank-<r>  its newest collectives, as torch's flight recorder has them
"""

import faulthandler
import json
import linecache
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mswift.ledger import Ledger
from mswift.train.collective import gather_objects

_FEWEST_POLLS = 20
_LONGEST_POLL_SECONDS = 10.0
_EXIT_STATUS = 1


def collective_timeout(minutes: float) -> float:
    """Seconds after which torch gives a collective up; the watch, which can say more, comes before it."""
    return minutes * 60 * 1.25 + 60


@dataclass(frozen=True)
class Position:
    """Where a rank was when it wrote its stacks. moves: how often it had gone on to something else before."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    moves: int
    in_collective: bool

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host}; step {self.step}, {self.doing})"


class HangWatch:
    """Ends the job, with stacks and names, when this rank has been at one place for longer than `seconds`."""

    def __init__(self, output_dir: Path, rank: int, world_size: int, seconds: float) -> None:
        self._output_dir, self._rank, self._world_size, self.seconds = output_dir, rank, world_size, seconds
        self._place = (0, "starting")
        self._moves, self._since = 0, time.monotonic()
        self._ended = threading.Event()

    def at(self, step: int, doing: str) -> None:
        """This rank goes on to something else."""
        self._place, self._moves, self._since = (step, doing), self._moves + 1, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while inside; a job of one rank waits for nobody."""
        if self._world_size == 1:
            yield
            return
        self._folder = self._output_dir / f"hang-{gather_objects(time.time_ns())[0] // 10**6}"
        self._since = time.monotonic()
        thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        poll = min(self.seconds / _FEWEST_POLLS, _LONGEST_POLL_SECONDS)
        while not self._ended.wait(poll):
            if time.monotonic() - self._since > self.seconds or self._folder.is_dir():
                self._report(poll)

    def _report(self, poll: float) -> None:
        """Write where this rank is, see what the others wrote, say who is hung, end the process."""
        write_position(self._folder, self._position())
        write_flight_record(self._folder, self._rank)
        if self._ended.wait(3 * poll + 2):  # the others see the folder
            return
        found = read_positions(self._folder, self._world_size)
        if min(position.rank for position in found) == self._rank:
            what = (
                f"no progress for {self.seconds:.0f} s (--distributed_timeout_minutes {self.seconds / 60:g}): "
                f"{blame(found, self._world_size)}"
            )
            text = (
                f"mswift: {what}. The stacks of {len(found)} of {self._world_size} ranks are in "
                f"{self._folder}/rank-N.txt, their collectives beside them (flight-rank-N). What was saved "
                "is safe: the same command continues from the newest checkpoint"
            )
            print(text, file=sys.stderr, flush=True)
            Ledger(self._output_dir).stop(self._place[0], what)
        else:
            time.sleep(1)  # the message comes before the launcher ends the others
        os._exit(_EXIT_STATUS)

    def _position(self) -> Position:
        step, doing = self._place
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        code = frame.f_code
        source = linecache.getline(code.co_filename, frame.f_lineno)
        waits = f"torch{os.sep}distributed" in code.co_filename or ".wait(" in source
        return Position(self._rank, platform.node(), os.getpid(), step, doing, self._moves, waits)


def write_position(folder: Path, position: Position) -> None:
    """rank-<r>.txt, whole or not at all."""
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{position.rank}.txt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(position)) + "\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    temporary.replace(path)


def write_flight_record(folder: Path, rank: int) -> None:
    """The collectives that torch's flight recorder holds; TORCH_FR_BUFFER_SIZE says how many (0: none).

    NCCL: the pickle that torchfrtrace reads. gloo, of which torchfrtrace knows no groups: JSON, in which a collective
    that is still under way is not `retired`.
    """
    c10d: Any = torch._C._distributed_c10d
    if dist.get_backend() == "nccl":
        (folder / f"flight-rank-{rank}").write_bytes(c10d._dump_nccl_trace())
    else:
        (folder / f"flight-rank-{rank}.json").write_bytes(c10d._dump_fr_trace_json())


def read_positions(folder: Path, world_size: int) -> list[Position]:
    """The ranks that have written, in order."""
    paths = [folder / f"rank-{rank}.txt" for rank in range(world_size)]
    lines = [path.read_text(encoding="utf-8").partition("\n")[0] for path in paths if path.is_file()]
    return [Position(**json.loads(line)) for line in lines]


def blame(found: Sequence[Position], world_size: int) -> str:
    """Who keeps the others waiting, as far as the positions tell: the silent, those behind, those not in a wait."""
    silent = sorted(set(range(world_size)) - {position.rank for position in found})
    if silent:
        ranks = f"rank {silent[0]} does" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} do"
        return f"{ranks} not answer (stopped, or the machine is gone)"
    least = min(position.moves for position in found)
    behind = [position for position in found if position.moves == least]
    if len(behind) == len(found):
        behind = [position for position in found if not position.in_collective] or list(found)
    if len(behind) == len(found):
        return f"all ranks wait for each other: {found[0]}, and so on"
    names = ", ".join(map(str, behind[:8])) + (f" and {len(behind) - 8} more" if len(behind) > 8 else "")
    return f"the others wait for {names}"
