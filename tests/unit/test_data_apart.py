"""Pieces of a mapped file: the right elements, and of the disk no more than their pages."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mswift.data.apart import Apart

PAGE = mmap.PAGESIZE


def resident(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Which pages of a mapped file are in memory, as mincore(2) has it."""
    found = (ctypes.c_ubyte * -(-array.nbytes // PAGE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), found) == 0
    return np.frombuffer(found, np.uint8) & 1 == 1


def cold(path: Path) -> bool:
    """Take the file out of the page cache; whether the file system lets it go."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not resident(np.memmap(path, np.uint8, "r")).any()


def test_only_the_pages_of_what_is_asked_for_are_read(tmp_path: Path) -> None:
    values = np.arange(8 << 20, dtype=np.int32)
    values.tofile(path := tmp_path / "tokens.bin")
    if not cold(path):
        pytest.skip("the file system keeps its files in memory")
    mapped = np.memmap(path, np.int32, "r")
    array, wanted = Apart(mapped), set()
    for start in (1000, 3_000_000, 7_999_999):
        stop = start + 4097
        assert np.array_equal(array[start:stop], values[start:stop])
        wanted |= set(range(start * 4 // PAGE, (stop * 4 - 1) // PAGE + 1))
    found = set(np.flatnonzero(resident(mapped)).tolist())
    assert found >= wanted
    assert len(found) < 2 * len(wanted)  # a file system may have larger pages
    del mapped, array  # what is mapped stays in memory
    assert cold(path)
    plain = np.memmap(path, np.int32, "r")
    assert np.array_equal(plain[3_000_000:3_000_001], values[3_000_000:3_000_001])
    assert resident(plain).sum() > 8  # the partner: a plain map reads on


@pytest.mark.parametrize("offset", [0, 12, PAGE + 4])
def test_slices_are_those_of_the_array(tmp_path: Path, offset: int) -> None:
    values = np.arange(5000, dtype=np.uint16)
    (path := tmp_path / "tokens.bin").write_bytes(bytes(offset) + values.tobytes())
    for array in (Apart(np.memmap(path, np.uint16, "r", offset)), Apart(values)):
        assert len(array) == 5000
        for where in (slice(0, 1), slice(2040, 2060), slice(4999, 9999), slice(7, 7), slice(6000, 7000), slice(None)):
            assert np.array_equal(array[where], values[where])
