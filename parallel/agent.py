"""torchrun with an exit status that means something: starts the ranks, hands them our signals, reports how they ended.

Differences from `python -m torch.distributed.run`: SIGINT, SIGTERM and SIGUSR1 go to the ranks and nothing else
happens, so that they can save (torchrun would kill them 30 s later); a second SIGINT kills them. A SIGUSR1 that comes
before they listen waits for them; one that comes after their end is nobody's. When a rank fails, the others have some
seconds to end in their own words, of which one may be the cause. The status is that of the rank that failed first, and
2 when any rank found the command wrong.
"""

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from mswift.parallel.rank_logs import RankLogs

_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_WRONG_COMMAND = 2
_LAST_WORDS_SECONDS = 15.0
_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> int:
    """Run torchrun's arguments `argv`; returns the exit status of the job."""
    # The launcher's death, even by SIGKILL, is a SIGTERM for us: no job outlives the terminal that started it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks' own words suffice
    for number in _HANDED_ON:
        signal.signal(number, _hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)  # the launcher blocked them until now
    _let_ranks_speak()
    logs, rest = None, list(argv)
    if rest[0] == "--rank_logs":
        try:
            logs, rest = RankLogs(Path(rest[1])), rest[2:]
        except OSError as error:
            print(f"mswift on {os.uname().nodename}: {rest[1]}, where ranks are to write, cannot be made "
                  f"({error.strerror}): free some space, or use another --output_dir", file=sys.stderr)  # fmt: skip
            return 1
    _let_ranks_be_told()
    try:
        _run(run.parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", *rest]), logs)
    except ChildFailedError as error:
        return _status(error, logs)
    finally:
        if logs is not None:
            logs.tidy()
    return 0


def _run(args: argparse.Namespace, logs: RankLogs | None) -> None:
    """As torchrun does, with our own place for what ranks write."""
    if args.standalone:
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    config, program, arguments = run.config_from_args(args)
    if logs is not None:
        config.logs_specs = logs
    elastic_launch(config, program)(*arguments)


def _let_ranks_speak() -> None:
    """torchrun sends SIGTERM to all ranks when one has failed: let it wait until they have ended, or some seconds."""
    close = api.SubprocessContext.close

    def patiently(self: api.SubprocessContext, *args: Any, **options: Any) -> None:
        ranks = [handler.proc for handler in self.subprocess_handlers.values()]
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while any(rank.poll() for rank in ranks) and None in [rank.poll() for rank in ranks]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        close(self, *args, **options)

    api.SubprocessContext.close = patiently  # type: ignore[method-assign, assignment]


def _let_ranks_be_told() -> None:
    """Ranks begin with SIGUSR1 blocked, so that one waits until they listen (mswift.train.signals)."""
    start = api.SubprocessContext._start

    def blocked(self: api.SubprocessContext) -> None:
        global _began
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        try:
            start(self)
            _began = True
            if _told_early:
                _hand_on(signal.SIGUSR1, None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    api.SubprocessContext._start = blocked  # type: ignore[method-assign]


_interrupts = 0
_began = _told_early = False


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send signal `number` to every rank; before there are any, end at once, or (SIGUSR1) do it later."""
    global _interrupts, _told_early
    if not _began:
        if number != signal.SIGUSR1:
            sys.exit(128 + number)
        _told_early = True
        return
    ranks = psutil.Process().children()
    _interrupts += number == signal.SIGINT
    for rank in ranks:
        rank.send_signal(signal.SIGKILL if _interrupts > 1 else number)


def _status(error: ChildFailedError, logs: RankLogs | None) -> int:
    """Exit status of a failed job. Torchrun ends the other ranks by signal after the first: those count last."""
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    for line in logs.last_words(codes) if logs is not None else ():
        print(line, file=sys.stderr)
    own = [code for code in codes.values() if code > 0]
    if own:
        return _WRONG_COMMAND if _WRONG_COMMAND in own else own[0]
    died = {rank: -code for rank, code in codes.items() if -code != signal.SIGTERM} or {0: signal.SIGTERM}
    for rank, number in died.items():  # the rank had no chance to say so
        reason = " (out of memory?)" if number == signal.SIGKILL else ""
        print(f"mswift: rank {rank} was ended by {signal.Signals(number).name}{reason}", file=sys.stderr)
    return 128 + next(iter(died.values()))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch's rendezvous threads have nothing left to do
