"""What a run knows of each request, as one row per request id."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int8, Int32, Int64

NEVER: Final = -1
"""A time that has not come."""

LIVE, FINISHED, CANCELLED, REJECTED = range(4)
STATE_NAMES: Final = ("live", "finished", "cancelled", "rejected")

NO_SEGMENT: Final = -1


@dataclass(frozen=True, slots=True)
class RequestTable:
    """A copy of the rows, for reading. Times are ns, NEVER where the request did not get there."""

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
    """Why it ended, was cancelled or was rejected."""

    @property
    def num_requests(self) -> int:
        """Number of rows."""
        return len(self.state)


class RequestRows:
    """The rows while they are written; one entry is a fifth of the price here that it is in a NumPy array."""

    def __init__(self) -> None:
        self.num_requests = 0
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
        self.num_requests = max(self.num_requests, request + 1)
        capacity = len(self.state)
        if request < capacity:
            return
        more = max(256, capacity // 4, request + 1 - capacity)
        for column, fill in self._columns:
            column.extend([fill] * more)
        self.written = np.concatenate((self.written, np.zeros(more, np.int32)))

    def table(self) -> RequestTable:
        """A copy of what users see of the rows."""
        n = self.num_requests
        return RequestTable(
            np.array(self.arrival_ns[:n], np.int64),
            np.array(self.admitted_ns[:n], np.int64),
            np.array(self.first_token_ns[:n], np.int64),
            np.array(self.finish_ns[:n], np.int64),
            np.array(self.prompt_tokens[:n], np.int32),
            np.array(self.output_tokens[:n], np.int32),
            np.array(self.preemptions[:n], np.int32),
            np.array(self.state[:n], np.int8),
            self.reason,
        )
