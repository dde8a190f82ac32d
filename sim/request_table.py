"""What a run knows of each request, as one row per request id from the first one on."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Final, TypedDict

import numpy as np
from jaxtyping import Int8, Int32, Int64

NEVER: Final = -1
"""A time that has not come."""

LIVE, FINISHED, CANCELLED, REJECTED = range(4)
STATE_NAMES: Final = ("live", "finished", "cancelled", "rejected")

NO_SEGMENT: Final = -1


class RequestTimes(TypedDict):
    """What is known of one request; `admitted_ns` is its first admission, None: it did not get there."""

    request: int
    arrival_ns: int
    admitted_ns: int | None
    first_token_ns: int | None
    finish_ns: int
    itl_sum_ns: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RequestTable:
    """A copy of the rows, for reading. Times are ns, NEVER where the request did not get there."""

    first_id: int
    """The id of row 0; row i is request first_id + i."""
    arrival_ns: Int64[np.ndarray, " requests"]
    admitted_ns: Int64[np.ndarray, " requests"]
    """Its first admission."""
    first_token_ns: Int64[np.ndarray, " requests"]
    finish_ns: Int64[np.ndarray, " requests"]
    prompt_tokens: Int32[np.ndarray, " requests"]
    output_tokens: Int32[np.ndarray, " requests"]
    preemptions: Int32[np.ndarray, " requests"]
    state: Int8[np.ndarray, " requests"]
    """An index of STATE_NAMES."""
    reason: dict[int, str]
    """By id: why it ended, was cancelled or was rejected."""

    @property
    def num_requests(self) -> int:
        """Number of rows."""
        return len(self.state)


class RequestRows:
    """The rows while they are written; one entry is a fifth of the price here that it is in a NumPy array.

    Row i is request i, so that an id needs no translation; rows below the first one that came stay empty and unseen.
    """

    def __init__(self) -> None:
        self.first = self.end = 0
        """The requests that came have ids first .. end - 1."""
        self.arrival_ns: array[int] = array("q")
        self.admitted_ns: array[int] = array("q")
        self.first_token_ns: array[int] = array("q")
        self.last_token_ns: array[int] = array("q")
        self.finish_ns: array[int] = array("q")
        self.segment_start_ns: array[int] = array("q")
        self.prompt_tokens: array[int] = array("i")
        self.output_tokens: array[int] = array("i")
        self.preemptions: array[int] = array("i")
        self.recomputed_below: array[int] = array("i")
        """Positions below this one were written by an earlier admission."""
        self.written: Int32[np.ndarray, " capacity"] = np.zeros(0, np.int32)
        """Positions planned in the current admission; written once a step for all rows."""
        self.state: array[int] = array("b")
        self.segment: array[int] = array("b")
        self.reason: dict[int, str] = {}
        times = (self.arrival_ns, self.admitted_ns, self.first_token_ns)
        times += (self.last_token_ns, self.finish_ns, self.segment_start_ns)
        counts = (self.prompt_tokens, self.output_tokens, self.preemptions, self.recomputed_below)
        self._columns: list[tuple[array[int], int]] = [(column, NEVER) for column in times]
        self._columns += [(column, 0) for column in counts]
        self._columns += [(self.state, LIVE), (self.segment, NO_SEGMENT)]

    def reserve(self, request: int) -> None:
        """Make sure that there is a row for `request`."""
        if request < self.first or not self.end:
            self.first = request
        if request >= self.end:
            self.end = request + 1
        if request >= len(self.state):
            self._grow(request)

    def _grow(self, request: int) -> None:
        capacity = len(self.state)
        more = max(256, capacity // 4, request + 1 - capacity)
        for column, fill in self._columns:
            column.extend(array(column.typecode, (fill,)) * more)
        self.written = np.concatenate((self.written, np.zeros(more, np.int32)))

    def times_of(self, request: int, last_token_ns: int | None = None, more_tokens: int = 0) -> RequestTimes:
        """What is known of a request; `more_tokens`, up to `last_token_ns`, are not in its row yet."""
        admitted, first = self.admitted_ns[request], self.first_token_ns[request]
        last = self.last_token_ns[request] if last_token_ns is None else last_token_ns
        return {
            "request": request,
            "arrival_ns": self.arrival_ns[request],
            "admitted_ns": None if admitted == NEVER else admitted,
            "first_token_ns": None if first == NEVER else first,
            "finish_ns": self.finish_ns[request],
            "itl_sum_ns": last - first if first != NEVER else 0,
            "output_tokens": self.output_tokens[request] + more_tokens,
        }

    def table(self) -> RequestTable:
        """A copy of what users see of the rows."""
        seen = slice(self.first, self.end)
        return RequestTable(
            self.first,
            np.array(self.arrival_ns[seen], np.int64),
            np.array(self.admitted_ns[seen], np.int64),
            np.array(self.first_token_ns[seen], np.int64),
            np.array(self.finish_ns[seen], np.int64),
            np.array(self.prompt_tokens[seen], np.int32),
            np.array(self.output_tokens[seen], np.int32),
            np.array(self.preemptions[seen], np.int32),
            np.array(self.state[seen], np.int8),
            self.reason,
        )
