"""Which interpreter runs a server: this one, or that of another environment, which a variable names. Torch-free."""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

from mswift.errors import ConfigError

_CHILD = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(name, version(name)); break
    except PackageNotFoundError:
        pass
"""
_SECONDS = 60


def find_python(variable: str, packages: Sequence[str], brand: str, install: str) -> tuple[str, str, str]:
    """(interpreter, package, its version): of the first of `packages` that is there.

    variable: the environment variable that may name the interpreter. Raises ConfigError where there is none.
    """
    python = os.environ.get(variable, "")
    found = _ask(python or sys.executable, tuple(packages), variable if python else "")
    if found is None:
        where = f"{variable}={python}: that environment has no {brand}" if python else f"{brand} is not installed here"
        raise ConfigError(f"{where}: {install}")
    return (python or sys.executable, *found)


def own_environment() -> dict[str, str]:
    """Variables for an interpreter of another environment: this process's, without its path of modules."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


@cache
def _ask(python: str, packages: tuple[str, ...], variable: str) -> tuple[str, str] | None:
    argv = [python, "-c", _CHILD, *packages]
    environ = own_environment() if variable else None
    try:
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{variable or 'Python'}={python}: it cannot be run ({error})") from None
    words = done.stdout.split()
    return (words[0], words[1]) if len(words) == 2 else None
