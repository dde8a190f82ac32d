"""The outside observer: it is told what happened, keeps its own books, and says what does not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import UInt32
from numpy import ndarray

from invariants.violation import Violation
from paged_attention.plan import (
    CoreSnapshot,
    DeclaredPolicy,
    Effect,
    Evidence,
    Ints,
    ModelRows,
    Request,
    StepOutcome,
    StepPlan,
    WrongPlace,
)


class Device(Protocol):
    """What the auditor asks of a backend: two reading methods of `backends.protocol.Backend`."""

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """Compare places with the fingerprints of ids (0: never written); the first wrong ones."""
        ...

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """What lies on the device now; None: this backend holds no cache."""
        ...


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """How much is checked. The books are kept at every event whatever these say.

    `every`: rows are judged each n-th step; `full_every`: snapshots and the whole pool each n-th step; `device_every`:
    K/V places each n-th dispatched step; `only`: these ids and no others (None: all active ones).
    """

    every: int = 1
    full_every: int = 256
    device_every: int = 1
    only: frozenset[str] | None = None
    max_violations: int = 100


@dataclass(frozen=True, slots=True)
class Totals:
    """What the run's recorder counted, judged at the end against the auditor's own books (M1, M2, M5).

    `scheduled_tokens`: tokens of all plans that were not abandoned. `live`: neither finished, cancelled nor rejected.
    `request_ns`: the recorder's integral of live requests over time (None: not measured); rejected ones are not in it.
    """

    scheduled_tokens: int
    arrived: int
    finished: int
    cancelled: int
    rejected: int
    live: int
    request_ns: int | None = None


class Auditor:
    """Judges a serving core and its device from values alone.

    Call order for a step: `planned` directly after `core.plan()`, `dispatched` directly after `backend.execute`
    (nothing in between), later `executed` and `applied` around `core.apply`, or `abandoned` in place of these three.
    `vocab_size` None: tokens are the core's own business (plan logs of foreign engines), O1 is off.
    """

    def __init__(self, policy: DeclaredPolicy, config: AuditConfig, vocab_size: int | None) -> None:
        self.policy = policy
        self.config = config
        self.violations: list[Violation] = []

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """A request was handed to the core; `refusal` is the text of its ValueError."""

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """The core was told to drop a request."""

    def planned(self, now_ns: int, plan: StepPlan, snapshot: Callable[[], CoreSnapshot] | None) -> None:
        """The core planned a step; its effects happened before its rows."""

    def idle(self, now_ns: int, snapshot: Callable[[], CoreSnapshot] | None) -> None:
        """`core.plan()` gave None. With nothing in flight, nothing runnable may be left (S11)."""

    def dispatched(self, now_ns: int, plan: StepPlan, rows: ModelRows | None, device: Device | None) -> None:
        """The step was handed to the device and no later one was: K/V is judged in program order."""

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """The outcome of a step reached the host; the core has not seen it yet."""

    def applied(
        self, now_ns: int, step: int, effects: tuple[Effect, ...], snapshot: Callable[[], CoreSnapshot] | None
    ) -> None:
        """The core took in the outcome of a step."""

    def abandoned(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """The newest plan never ran and was taken back."""

    def measured(self, now_ns: int, step: int, pages_owned: int, running: int, waiting: int) -> None:
        """What the recorder wrote down at this very moment (M3).

        `pages_owned` leaves out fenced pages; `running` counts admitted requests that have not ended (prefill, joining,
        running, draining); `waiting` counts those in the waiting queue.
        """

    def request_done(
        self,
        request: int,
        arrival_ns: int,
        admitted_ns: int | None,
        first_token_ns: int | None,
        finish_ns: int,
        itl_sum_ns: int,
        output_tokens: int,
    ) -> None:
        """What the recorder says of a request that has just ended or was cancelled (M4).

        `admitted_ns` is its first admission, `first_token_ns` when its first token was applied; None where there was
        none. `finish_ns` is the time of its end or cancel.
        """

    def finished(
        self,
        now_ns: int,
        pending: Mapping[int, str],
        snapshot: Callable[[], CoreSnapshot] | None,
        device: Device | None,
        totals: Totals,
    ) -> None:
        """The run is over: everything must be back where it was (P12, L6, M1, M2, M5, K2 over the whole pool)."""

    def counters(self) -> dict[str, dict[str, int]]:
        """For each invariant that is on: how often it was checked, non-trivially checked, and violated."""
        return {}
