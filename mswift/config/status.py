"""What `mswift status` is asked: the frozen dataclass behind the command."""

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What a run is doing: step, loss, speed, time left, newest checkpoint, restarts, goodput.

    Read from the files in its directory alone: no GPU, no torch, also while the run writes them and after kill -9.
    Exit status 0 for a run that is running or finished, 1 for one that stopped before its end.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    """What --output_dir of the run named."""
    json: bool = False
    """One JSON object instead of lines."""
