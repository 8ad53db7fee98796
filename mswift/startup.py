"""What the start of a process spends on imports, kept small: a rank that comes back after a fault waits for them.

Standard library only.
"""

import atexit
import gc
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_advice() -> None:
    """bitsandbytes, which PEFT imports, advises on every start to install a kernel that nothing here uses."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def importing(module: str, *, without: str | None = None) -> Iterator[None]:
    """A block that imports `module` and what it needs; nothing special where that has happened before.

    Imports make a million objects that live as long as the process. The garbage collector would walk them again and
    again, a fifth of a start; it rests inside, and never looks at them later. without: a library that, though it is
    installed, is not to be found inside, for whoever would import it if it were.
    """
    if module in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with _hidden(without):
            yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # what the interpreter takes apart at its end
        if was_enabled:
            gc.enable()


@contextmanager
def _hidden(module: str | None) -> Iterator[None]:
    if module is None or module in sys.modules or importlib.util.find_spec(module) is None:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
