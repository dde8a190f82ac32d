"""Append-only columns of whole numbers: the newest entries in memory, the rest in a temporary file.

A run of a million requests writes hundreds of megabytes of record, and none of it is looked at before the end.
"""

from __future__ import annotations

import mmap
from array import array
from tempfile import TemporaryFile
from typing import Final

import numpy as np
from numpy.typing import NDArray

ENTRIES_IN_MEMORY: Final = 1 << 16
"""`spill` leaves a column alone as long as it has fewer."""


class Column:
    """One column; `append` and `extend` are those of the array in memory."""

    def __init__(self, typecode: str) -> None:
        self._tail: array[int] = array(typecode)
        self._file = None
        self.append, self.extend = self._tail.append, self._tail.extend

    def spill(self, at_least: int = ENTRIES_IN_MEMORY) -> None:
        """Move the entries in memory to the file, where there are enough. OSError: the disk does not take them."""
        if len(self._tail) < at_least:
            return
        if self._file is None:
            self._file = TemporaryFile()  # noqa: SIM115 - open as long as the column is
        self._tail.tofile(self._file)
        del self._tail[:]

    def values(self) -> NDArray[np.signedinteger]:
        """All entries, for reading. OSError: the disk does not take them."""
        dtype = np.dtype(self._tail.typecode)
        if self._file is None:
            return np.array(self._tail, dtype)
        self.spill(at_least=1)
        self._file.flush()
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
