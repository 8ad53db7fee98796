"""DeepSpeed as a library of a process that is a rank of a job already: nothing compiled, no group of its own."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist

from mswift.errors import ConfigError

_TESTED = "0.19."
_PLACE = "LOCAL_RANK"  # by which DeepSpeed finds its device, whenever it looks


class Library:
    """`module` is `deepspeed`, which computes on `device`; to be closed.

    On a CPU it would compile an operator that inference alone has (minutes, and a lock that a killed process leaves
    behind): it is told that there is none. Its group of all ranks is the job's, with the timeout of the job.
    ConfigError for a version that this was not tested with, and where another device was chosen before.
    """

    def __init__(self, device: torch.device) -> None:
        with _variables(DS_ACCELERATOR=device.type):
            import deepspeed
            from deepspeed.accelerator import get_accelerator
            from deepspeed.utils import groups
        if not deepspeed.__version__.startswith(_TESTED):
            raise ConfigError(
                f"--backend deepspeed: deepspeed {deepspeed.__version__} is installed, tested is {_TESTED}x: pip "
                "install 'mswift[deepspeed]'"
            )
        if get_accelerator().device_name() != device.type:
            raise ConfigError(
                f"--device {device.type}: deepspeed has chosen {get_accelerator().device_name()} in this process"
            )
        # it calls collectives of torch by the names they had before
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__ = {}
        groups._WORLD_GROUP = dist.group.WORLD
        self.module: Any = deepspeed
        self._place_before = os.environ.get(_PLACE)
        os.environ[_PLACE] = str(device.index or 0)
        with self.quiet():
            deepspeed.init_distributed(dist.get_backend(), verbose=False)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without what DeepSpeed prints at its start: figures of memory, and that an optimizer was not tested with it,
        which the tests here do."""
        log = logging.getLogger("DeepSpeed")
        log.setLevel(logging.ERROR)
        try:
            with redirect_stdout(StringIO()):
                yield
        finally:
            log.setLevel(logging.WARNING)

    def close(self) -> None:
        """Forget the job and the model, which DeepSpeed keeps in globals."""
        from deepspeed.comm import comm
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
        from deepspeed.utils import groups

        FWD_MODULE_STACK.clear()  # modules of ZeRO-3
        groups._WORLD_GROUP = None
        comm.cdb = None
        if self._place_before is None:
            del os.environ[_PLACE]
        else:
            os.environ[_PLACE] = self._place_before


@contextmanager
def _variables(**wanted: str) -> Iterator[None]:
    """Variables of the environment as they are wanted for a while; afterwards all are as they were."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
