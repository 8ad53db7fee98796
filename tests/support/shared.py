"""Reference data that lies beside the checkout, in ../shared; only tests know of it."""

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared_file(relative: str) -> Path:
    """Path of ../shared/`relative`. Skips the test when the folder itself is absent; fails when only the file is."""
    if not _SHARED.is_dir():
        pytest.skip(f"the reference data folder {_SHARED} is absent")
    path = _SHARED / relative
    if not path.exists():
        pytest.fail(f"{_SHARED} exists but holds no {relative}")
    return path
