"""SIGTERM and SIGUSR1 ask a run to save and end: noted when they come, agreed by all ranks after the step.

Under an agent a rank begins with SIGUSR1 blocked (mswift.parallel.agent): one that came meanwhile is noted at once.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED_STATUS = 3
"""Exit status of a run that a signal has stopped after it saved: the same command continues it."""


class StopRequest:
    """The number of the signal that has come to this process, 0 while there is none."""

    def __init__(self) -> None:
        self.number = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """While inside, the signals are noted in place of ending the process. For the main thread.

    Afterwards they are ignored unless they had a handler of Python's before: nothing is left to save, and a signal that
    comes while the process ends would make a failure of it.
    """
    request = StopRequest()
    previous = {number: signal.signal(number, request._note) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if callable(handler) else signal.SIG_IGN)
