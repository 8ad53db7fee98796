"""The chat page's JavaScript, run by Node.js where it is installed."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "mswift" / "infer" / "app" / "page"
NODE = shutil.which("node") or shutil.which("nodejs")
needs_node = pytest.mark.skipif(NODE is None, reason="no Node.js here (node), which runs the page's JavaScript")


def run(program: str, given: Any, *arguments: str) -> Any:
    """What a program of this folder prints, as JSON; `given` is its input."""
    assert NODE is not None
    text = json.dumps(given)
    argv = [NODE, str(HERE / program), str(PAGE), *arguments]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
