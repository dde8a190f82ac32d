"""The seam between the simulator and a serving core: ours, or any other real scheduler behind an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from paged_attention.plan import CoreSnapshot, DeclaredPolicy, Effect, Request, StepOutcome, StepPlan


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """The geometry and policy asked of a core; `options` are keys that only that core knows."""

    batch_size: int
    page_size: int
    num_pages: int
    """Page 0, the dummy, included."""
    max_sequence_length: int
    """In tokens with K/V."""
    prefill_chunk: int
    lag: int = 0
    preemption: Literal["none", "recompute"] = "recompute"
    mix: Literal["mixed", "prefill_first", "decode_first"] = "mixed"
    max_decode_wait: int = 4
    max_prefill_wait: int = 4
    layers: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    free_pages: tuple[int, ...] = ()
    """The free pages at first, in hand-out order: each of 1 .. num_pages - 1 once; (): as the core likes it."""
    free_slots: tuple[int, ...] = ()
    """The free slots at first, in hand-out order: each of 0 .. batch_size - 1 once; (): as the core likes it."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


class ServingCore(Protocol):
    """A scheduler and page manager under test.

    The caller plans at most `policy.lag` steps beyond the oldest one whose outcome it has not applied.
    """

    @property
    def policy(self) -> DeclaredPolicy:
        """What the core declares of itself."""
        ...

    def submit(self, request: Request) -> tuple[Effect, ...]:
        """Queue a request. ValueError: refused, and nothing changed."""
        ...

    def cancel(self, request: int) -> tuple[Effect, ...]:
        """Drop a request in whatever state it is; an unknown or ended one gives ()."""
        ...

    def plan(self) -> StepPlan | None:
        """Plan the next step, all or nothing. None: nothing can run now, and nothing changed."""
        ...

    def apply(self, outcome: StepOutcome) -> tuple[Effect, ...]:
        """Take in what a step yielded, in step order."""
        ...

    def abandon(self, step: int) -> tuple[Effect, ...]:
        """Take back the newest plan: that step never ran. What it allocated may stay with its owner."""
        ...

    def pending(self) -> Mapping[int, str]:
        """Each unfinished request, with the reason why it is not finished."""
        ...

    def snapshot(self) -> CoreSnapshot:
        """A copy of the whole host state."""
        ...

    def fork(self) -> ServingCore:
        """An independent core in the same state."""
        ...
