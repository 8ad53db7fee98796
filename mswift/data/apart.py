"""Reading pieces of a mapped file that lie far apart, as a shuffled order does."""

import mmap
from typing import Any

from numpy.typing import NDArray


class Apart:
    """A mapped array, of whose file what is asked for is read from the disk, in one go, and nothing around it.

    Without it a kernel reads on at every fault, 128 KiB to 8 MiB by device, most of which a shuffled order does not
    want. Arrays in memory are read as ever.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self._map = array.base if isinstance(array.base, mmap.mmap) else None
        self._before = 0 if self._map is None else len(self._map) - array.nbytes
        """Bytes of the map in front of the array, which ends where the map does."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_RANDOM)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, where: slice, /) -> NDArray[Any]:
        start, stop, _ = where.indices(len(self))
        if self._map is not None and start < stop:
            first = self._before + start * self._array.itemsize
            page = first - first % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, self._before + stop * self._array.itemsize - page)
        return self._array[start:stop]
