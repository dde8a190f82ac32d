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
    """One column; entries are added to `tail`."""

    def __init__(self, typecode: str) -> None:
        self._typecode = typecode
        self.tail: list[int] = []
        """The entries in memory, newest last; the same list for good."""
        self._file = None
        self._copy: NDArray[np.signedinteger] | None = None
        """Of `tail`, as of when `values` was asked for last."""

    def spill(self, at_least: int = ENTRIES_IN_MEMORY) -> None:
        """Move the entries in memory to the file, where there are enough. OSError: the disk does not take them."""
        if len(self.tail) < at_least:
            return
        if self._file is None:
            self._copy = None
            self._file = TemporaryFile()  # noqa: SIM115 - open as long as the column is
        array(self._typecode, self.tail).tofile(self._file)
        self.tail.clear()

    def values(self) -> NDArray[np.signedinteger]:
        """All entries, for reading. OSError: the disk does not take them."""
        dtype = np.dtype(self._typecode)
        if self._file is None:
            # What is only ever added to is the same as long as it is no longer than before.
            if self._copy is None or len(self._copy) != len(self.tail):
                self._copy = np.array(self.tail, dtype)
                self._copy.setflags(write=False)
            return self._copy
        self.spill(at_least=1)
        self._file.flush()
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
