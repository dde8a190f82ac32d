"""What a workload yields: arrivals in time order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Arrival(NamedTuple):
    """One request reaching the server; lengths in tokens."""

    time_ns: int
    """Since the start of the run; 0 throughout in a closed loop."""
    request: int
    """Its id: numbered in order of arrival, from the workload's first_request_id on."""
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    """One id per prompt page of the trace (512 tokens in mooncake traces); equal ids are equal prefixes."""
    eos_after: int = 0
    """Its n-th token is an EOS; 0: the workload's end_by decides."""
    note: str = ""
    """What was changed on the way from the source, in words for the report; empty: nothing."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A stream of arrivals, to be read once."""

    arrivals: Iterator[Arrival]
    concurrency: int | None = None
    """Closed loop: at most this many unfinished requests; the engine releases the next when one ends."""
    total: int | None = None
    """How many arrivals there will be; None: not known before the end (or fewer, where a trace is shorter)."""
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    """Rows left out, by reason; complete once `arrivals` is exhausted."""
    at_steps: Sequence[int] | None = None
    """By step: arrival i is submitted before step at_steps[i] is planned, whatever its time says."""

    def __iter__(self) -> Iterator[Arrival]:
        return self.arrivals
