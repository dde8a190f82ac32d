"""The shadow pool: which token's K and V must lie at each place of the cache."""

from __future__ import annotations

import numpy as np
from jaxtyping import Complex128, Int, UInt32
from numpy import ndarray
from numpy.typing import NDArray

PLACE = np.dtype([("id", np.uint32), ("request", np.int32), ("admission", np.int32), ("position", np.int32)])
"""What is said of one place: the kv_id that must lie there (0: never written), and whose token that is."""

Places = NDArray[np.void]
"""An array of PLACE."""

Cells = Complex128[ndarray, " cells"]
"""The same bytes. NumPy moves records field by field, and numbers of 16 bytes at once; nobody computes with these."""


class Shadow:
    """A cell for each place = page * page_size + offset."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._cells: Cells = np.zeros(num_pages * page_size, np.complex128)

    def write(self, places: Int[ndarray, " n"], tokens: Cells) -> None:
        """Tokens lie at `places` from now on."""
        self._cells[places] = tokens

    def at(self, places: Int[ndarray, " n"]) -> Cells:
        """What is said of some places."""
        return self._cells.take(places)

    def entries(self, places: Int[ndarray, " n"]) -> Places:
        """What is said of some places, to be read."""
        return as_places(self.at(places))

    def written(self) -> NDArray[np.intp]:
        """Every place that was ever written."""
        return np.flatnonzero(ids_of(self._cells))


def tokens_of(request: int, admission: int, ids: UInt32[ndarray, " positions"]) -> Cells:
    """The tokens of an admission, whose ids these are, by position."""
    tokens = np.empty(len(ids), PLACE)
    tokens["id"], tokens["request"], tokens["admission"] = ids, request, admission
    tokens["position"] = np.arange(len(ids))
    return tokens.view(np.complex128)


def ids_of(cells: Cells) -> UInt32[ndarray, " cells"]:
    """The kv_id in each of some cells; a view."""
    return cells.view(np.uint32)[::4]


def as_places(cells: Cells) -> Places:
    """Some cells, to be read; a view."""
    return cells.view(PLACE)
