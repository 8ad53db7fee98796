"""First on PYTHONPATH: every rank notes in $EXIT_PROBE/RANK what is left of it when the interpreter ends.

Python's threads, the threads of the process by the names that C++ gave them, process groups that are not destroyed.
"""

import atexit
import json
import os
import sys
import threading
from pathlib import Path


def note() -> None:
    """Called after all functions that libraries have registered."""
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    native = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    found = {
        "threads": [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()],
        "native": sorted(native),
        "watches_bars": sys.modules["tqdm.std"].tqdm.monitor is not None,
        "groups": [] if c10d is None else sorted(c10d._world.pg_names.values()),
    }
    Path(os.environ["EXIT_PROBE"], os.environ["RANK"]).write_text(json.dumps(found))


if "RANK" in os.environ and "EXIT_PROBE" in os.environ:
    atexit.register(note)
