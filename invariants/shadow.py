"""The shadow pool: which token's K and V must lie at each place of the cache."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Int64, UInt32
from numpy import ndarray
from numpy.typing import NDArray

PLACE = np.dtype([("id", np.uint32), ("request", np.int32), ("admission", np.int32), ("position", np.int32)])
"""What is said of one place: the kv_id that must lie there (0: never written), and whose token that is."""

Places = NDArray[np.void]
"""An array of PLACE."""

Columns = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Ids and tokens."""

_ADMISSION_BITS, _POSITION_BITS = 10, 22
"""A token is one number: request, admission, position. It names; what is compared are ids."""


class Shadow:
    """A column for each fact, indexed by place = page * page_size + offset: a step writes columns, not records."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        places = num_pages * page_size
        self.ids: UInt32[ndarray, " places"] = np.zeros(places, np.uint32)
        self._tokens: Int64[ndarray, " places"] = np.zeros(places, np.int64)

    @staticmethod
    def owner(request: int, admission: int) -> int:
        """An admission as a number; added to a position, it is a token."""
        return (request << _ADMISSION_BITS | min(admission, (1 << _ADMISSION_BITS) - 1)) << _POSITION_BITS

    def write(self, places: Int[ndarray, " n"], ids: UInt32[ndarray, " n"], tokens: Int64[ndarray, " n"]) -> None:
        """Tokens lie at `places` from now on."""
        self.ids[places] = ids
        self._tokens[places] = tokens

    def columns(self, places: Int[ndarray, " n"]) -> Columns:
        """What is said of some places, for `as_places`: taking note of it costs no more than that."""
        return self.ids.take(places), self._tokens.take(places)

    @staticmethod
    def as_places(columns: Columns) -> Places:
        """What the columns say, place by place."""
        ids, tokens = columns
        owner = tokens >> _POSITION_BITS
        found = np.empty(len(ids), PLACE)
        found["id"], found["position"] = ids, tokens & ((1 << _POSITION_BITS) - 1)
        found["request"], found["admission"] = owner >> _ADMISSION_BITS, owner & ((1 << _ADMISSION_BITS) - 1)
        return found

    def entries(self, places: Int[ndarray, " n"]) -> Places:
        """What is said of some places."""
        return self.as_places(self.columns(places))

    def written(self) -> NDArray[np.intp]:
        """Every place that was ever written."""
        return np.flatnonzero(self.ids)
