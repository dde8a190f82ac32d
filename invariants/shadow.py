"""The shadow pool: which token's K and V must lie at each place of the cache."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt32
from numpy import ndarray
from numpy.typing import NDArray

PLACE = np.dtype([("id", np.uint32), ("request", np.int32), ("admission", np.int32), ("position", np.int32)])
"""What is said of one place: the kv_id that must lie there (0: never written), and whose token that is."""

Places = NDArray[np.void]
"""An array of PLACE."""

Columns = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int32]]
"""Ids, owners and positions."""

_ADMISSIONS = 1 << 24
"""Admissions of a request that can be told apart."""


class Shadow:
    """A column for each fact, indexed by place = page * page_size + offset: a step writes columns, not records."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        places = num_pages * page_size
        self.ids: UInt32[ndarray, " places"] = np.zeros(places, np.uint32)
        self._owner: Int64[ndarray, " places"] = np.zeros(places, np.int64)
        self._position: Int32[ndarray, " places"] = np.zeros(places, np.int32)

    @staticmethod
    def owner(request: int, admission: int) -> int:
        """An admission as one number."""
        return request * _ADMISSIONS + admission

    def write(
        self,
        places: Int[ndarray, " n"],
        ids: UInt32[ndarray, " n"],
        owner: Int64[ndarray, " n"],
        position: Int32[ndarray, " n"],
    ) -> None:
        """Tokens lie at `places` from now on."""
        self.ids[places] = ids
        self._owner[places] = owner
        self._position[places] = position

    def columns(self, places: Int[ndarray, " n"]) -> Columns:
        """What is said of some places, for `as_places`: taking note of it costs no more than that."""
        return self.ids.take(places), self._owner.take(places), self._position.take(places)

    @staticmethod
    def as_places(columns: Columns) -> Places:
        """What the columns say, place by place."""
        ids, owner, position = columns
        found = np.empty(len(ids), PLACE)
        found["id"], found["position"] = ids, position
        found["request"], found["admission"] = owner // _ADMISSIONS, owner % _ADMISSIONS
        return found

    def entries(self, places: Int[ndarray, " n"]) -> Places:
        """What is said of some places."""
        return self.as_places(self.columns(places))

    def written(self) -> NDArray[np.intp]:
        """Every place that was ever written."""
        return np.flatnonzero(self.ids)
