"""torchrun with an exit status that means something: starts the ranks, hands them our signals, reports how they ended.

Differences from `python -m torch.distributed.run`: SIGINT, SIGTERM and SIGUSR1 go to the ranks and nothing else
happens, so that they can save (torchrun would kill them 30 s later); a second SIGINT kills them. When a rank fails, the
others have some seconds to end in their own words, of which one may be the cause. The status is that of the rank that
failed first, and 2 when any rank found the command wrong.
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
        logs, rest = RankLogs(Path(rest[1])), rest[2:]
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


_interrupts = 0


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send signal `number` to every rank; end at once while there is none yet."""
    global _interrupts
    ranks = psutil.Process().children()
    if not ranks:
        sys.exit(128 + number)
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
