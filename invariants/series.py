"""M8: the series that plots are drawn from, against what was seen step by step; only checksums are kept."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import numpy as np
from jaxtyping import Int64
from numpy import ndarray
from numpy.typing import NDArray

BLOCK = 512
"""Steps to a checksum: a difference is known by its block and its column."""


class SeriesLog:
    """One row for each completed step, folded into a checksum per column and block."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self.rows = 0
        self._tail: list[int] = []
        self._sums: list[list[int]] = []

    def note(self, row: tuple[int, ...]) -> None:
        """A step is completed."""
        self._tail.extend(row)
        self.rows += 1
        if self.rows % BLOCK == 0:
            self._sums.append(_checksums(self._block()))
            self._tail.clear()

    def _block(self) -> Int64[ndarray, "steps columns"]:
        return np.array(self._tail, np.int64).reshape(-1, len(self.columns))

    def difference(self, series: Mapping[str, NDArray[np.signedinteger]]) -> str:
        """The first column and block in which a record tells otherwise; "": none does."""
        sums = [*self._sums, _checksums(self._block())]
        told = np.stack([np.asarray(series[name], np.int64) for name in self.columns], axis=1)
        if len(told) != self.rows:
            return f"has {len(told)} steps, and {self.rows} were completed"
        for nth, mine in enumerate(sums):
            block = told[nth * BLOCK : (nth + 1) * BLOCK]
            for name, one, other in zip(self.columns, mine, _checksums(block), strict=True):
                if one != other:
                    first = nth * BLOCK
                    return f"tells another {name!r} among the completed steps {first} to {first + len(block) - 1}"
        return ""


def _checksums(block: Int64[ndarray, "steps columns"]) -> list[int]:
    return [crc32(column.tobytes()) for column in block.T]
