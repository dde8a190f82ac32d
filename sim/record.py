"""What happened in a run, gathered while it happens: columns in memory, derived from plans and effects alone.

The recorder never asks the core for its own view of itself: requests, pages, slots and tokens are counted from what the
core said it did, so that a metric and the core's bookkeeping can disagree, and the auditor can notice.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable
from typing import Final, TypedDict

import numpy as np
from jaxtyping import Int32, Int64
from numpy.typing import NDArray

from invariants.auditor import Totals
from paged_attention.plan import DeclaredPolicy, Effect, StepOutcome, StepPlan
from sim.trace_hash import TraceHash

NEVER: Final = -1
"""A time that has not come."""

LIVE, FINISHED, CANCELLED, REJECTED = range(4)
STATE_NAMES: Final = ("live", "finished", "cancelled", "rejected")

WAITING, PREFILL, DECODE, PREEMPTED = range(4)
NO_SEGMENT: Final = -1

FREE, FENCED = -1, -2

SERIES: Final = (
    "step",
    "start_ns",
    "end_ns",
    "prefill_tokens",
    "decode_tokens",
    "running",
    "waiting",
    "slots_used",
    "pages_owned",
    "pages_free",
    "pages_fenced",
    "live_tokens",
    "preemptions",
)
"""Columns with one entry per completed step. Counts are those after planning the step; preemptions are its own."""


class RequestTimes(TypedDict):
    """What the recorder knows of one request; `admitted_ns` is its first admission, None: it did not get there."""

    request: int
    arrival_ns: int
    admitted_ns: int | None
    first_token_ns: int | None
    finish_ns: int
    itl_sum_ns: int
    output_tokens: int


class RequestTable:
    """One row per request id; grows by doubling. Times are ns, NEVER where the request did not get there."""

    _TIMES = ("arrival_ns", "admitted_ns", "first_token_ns", "last_token_ns", "finish_ns", "segment_start_ns")
    _COUNTS = ("prompt_tokens", "output_tokens", "preemptions", "written", "recomputed_below")

    def __init__(self) -> None:
        self.num_requests = 0
        self.arrival_ns: Int64[np.ndarray, " capacity"] = np.zeros(0, np.int64)
        self.admitted_ns: Int64[np.ndarray, " capacity"] = self.arrival_ns
        self.first_token_ns: Int64[np.ndarray, " capacity"] = self.arrival_ns
        self.last_token_ns: Int64[np.ndarray, " capacity"] = self.arrival_ns
        self.finish_ns: Int64[np.ndarray, " capacity"] = self.arrival_ns
        self.segment_start_ns: Int64[np.ndarray, " capacity"] = self.arrival_ns
        self.prompt_tokens: Int32[np.ndarray, " capacity"] = np.zeros(0, np.int32)
        self.output_tokens: Int32[np.ndarray, " capacity"] = self.prompt_tokens
        self.preemptions: Int32[np.ndarray, " capacity"] = self.prompt_tokens
        self.written: Int32[np.ndarray, " capacity"] = self.prompt_tokens
        """Positions planned in the current admission."""
        self.recomputed_below: Int32[np.ndarray, " capacity"] = self.prompt_tokens
        """Positions below this one were written by an earlier admission."""
        self.state: NDArray[np.int8] = np.zeros(0, np.int8)
        self.segment: NDArray[np.int8] = self.state
        self.reason: dict[int, str] = {}

    def reserve(self, request: int) -> None:
        """Make sure that there is a row for `request`."""
        self.num_requests = max(self.num_requests, request + 1)
        capacity = len(self.arrival_ns)
        if request < capacity:
            return
        more = max(256, capacity, request + 1 - capacity)
        for name in self._TIMES:
            setattr(self, name, np.concatenate((getattr(self, name), np.full(more, NEVER, np.int64))))
        for name in self._COUNTS:
            setattr(self, name, np.concatenate((getattr(self, name), np.zeros(more, np.int32))))
        self.state = np.concatenate((self.state, np.full(more, LIVE, np.int8)))
        self.segment = np.concatenate((self.segment, np.full(more, NO_SEGMENT, np.int8)))


class Recorder:
    """Takes in a run, event by event, and keeps its columns and its trace hash."""

    def __init__(self, policy: DeclaredPolicy) -> None:
        self.policy = policy
        self.hash = TraceHash()
        self.requests = RequestTable()
        self.series: dict[str, array[int]] = {name: array("q") for name in SERIES}
        self.itl_gaps: Counter[int] = Counter()
        self.page_time_ns, self.page_id, self.page_owner = array("q"), array("i"), array("i")
        self.seg_request, self.seg_kind = array("i"), array("b")
        self.seg_start_ns, self.seg_end_ns = array("q"), array("q")
        self.waiting = 0
        """Requests that wait for an admission."""
        self.running = 0
        """Requests admitted and not yet ended."""
        self.slots_used = 0
        self.pages_owned = 0
        self.pages_fenced = 0
        self.live_tokens = 0
        """Tokens with K/V in owned pages."""
        self.scheduled_tokens = 0
        self.recomputed_tokens = 0
        self.discarded_tokens = 0
        """Scheduled tokens of steps that never ran."""
        self.failed_steps = 0
        self.num_preemptions = 0
        self.count_of_state = [0, 0, 0, 0]
        self._live = 0
        self._live_since_ns = 0
        self._request_ns = 0
        self._preempted_now = 0
        self._last_end_ns = NEVER
        self._in_flight: deque[tuple[StepPlan, tuple[int, ...]]] = deque()

    @property
    def pages_free(self) -> int:
        """Pages that nobody owns and no fence holds."""
        return self.policy.num_pages - 1 - self.pages_owned - self.pages_fenced

    @property
    def steps(self) -> int:
        """Completed steps."""
        return len(self.series["step"])

    def submitted(self, now_ns: int, request: int, prompt_tokens: int, effects: tuple[Effect, ...]) -> None:
        """A request has come in and waits."""
        self._arrived(now_ns, request, prompt_tokens)
        self.hash.effects(effects)
        self._take(now_ns, effects)

    def rejected(self, now_ns: int, request: int, prompt_tokens: int, reason: str) -> None:
        """A request was refused at submission."""
        self._arrived(now_ns, request, prompt_tokens)
        self.hash.refused(request)
        self.requests.state[request] = REJECTED
        self.requests.reason[request] = reason
        self.count_of_state[LIVE] -= 1
        self.count_of_state[REJECTED] += 1

    def cancelled(self, now_ns: int, effects: tuple[Effect, ...]) -> None:
        """A cancel was asked for; `effects` is empty where there was nothing to cancel."""
        self.hash.effects(effects)
        self._take(now_ns, effects)

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """A step has been planned."""
        self.hash.plan(plan)
        self._preempted_now = 0
        self._take(now_ns, plan.effects)
        num_tokens = plan.num_tokens
        requests = self.requests
        prefill_tokens = self._prefill_tokens(plan)
        requests.written[plan.request] = plan.start + plan.count
        self.live_tokens += num_tokens
        self.scheduled_tokens += num_tokens
        counts = (
            prefill_tokens,
            num_tokens - prefill_tokens,
            self.running,
            self.waiting,
            self.slots_used,
            self.pages_owned,
            self.pages_free,
            self.pages_fenced,
            self.live_tokens,
            self._preempted_now,
        )
        self._in_flight.append((plan, counts))

    def executed(self, start_ns: int, end_ns: int, outcome: StepOutcome) -> None:
        """The oldest step in flight ran from start_ns to end_ns and yielded `outcome`."""
        plan, counts = self._in_flight.popleft()
        self.hash.outcome(outcome)
        for column, value in zip(self.series.values(), (plan.step, start_ns, end_ns, *counts), strict=True):
            column.append(value)
        self._tokens(end_ns, plan.request, outcome.token)
        self._last_end_ns = end_ns

    def applied(self, now_ns: int, effects: tuple[Effect, ...]) -> None:
        """The outcome of the step that was executed last has been applied."""
        self.hash.effects(effects)
        self._take(now_ns, effects)
        self.hash.close_step()

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """The newest plan never ran: its positions are taken back."""
        newest, _ = self._in_flight.pop()
        if newest.step != plan.step:
            raise ValueError(f"only the newest plan (step {newest.step}) can be abandoned, not step {plan.step}")
        self.hash.abandoned(plan.step, effects)
        self.requests.written[plan.request] = plan.start
        self.live_tokens -= plan.num_tokens
        self.discarded_tokens += plan.num_tokens
        self.failed_steps += 1
        self._take(now_ns, effects)

    def close(self, now_ns: int) -> None:
        """The run is over: what is still open ends here."""
        for request in np.flatnonzero(self.requests.segment[: self.requests.num_requests] != NO_SEGMENT).tolist():
            self._segment(now_ns, request, NO_SEGMENT)

    def totals(self, now_ns: int) -> Totals:
        """What was counted, for the auditor to compare with its own books."""
        self._live_changed(now_ns, 0)
        live, finished, cancelled, rejected = self.count_of_state
        return Totals(
            scheduled_tokens=self.scheduled_tokens - self.discarded_tokens,
            arrived=self.requests.num_requests,
            finished=finished,
            cancelled=cancelled,
            rejected=rejected,
            live=live,
            request_ns=self._request_ns,
        )

    def times_of(self, request: int) -> RequestTimes:
        """What is known of a request."""
        table = self.requests
        admitted, first = int(table.admitted_ns[request]), int(table.first_token_ns[request])
        return {
            "request": request,
            "arrival_ns": int(table.arrival_ns[request]),
            "admitted_ns": None if admitted == NEVER else admitted,
            "first_token_ns": None if first == NEVER else first,
            "finish_ns": int(table.finish_ns[request]),
            "itl_sum_ns": int(table.last_token_ns[request]) - first if first != NEVER else 0,
            "output_tokens": int(table.output_tokens[request]),
        }

    def _live_changed(self, now_ns: int, by: int) -> None:
        """Add up live requests over time, which must equal the sum of their times in the system."""
        self._request_ns += self._live * (now_ns - self._live_since_ns)
        self._live_since_ns = now_ns
        self._live += by

    def _arrived(self, now_ns: int, request: int, prompt_tokens: int) -> None:
        self.requests.reserve(request)
        self.requests.arrival_ns[request] = now_ns
        self.requests.prompt_tokens[request] = prompt_tokens
        self.count_of_state[LIVE] += 1

    def _prefill_tokens(self, plan: StepPlan) -> int:
        """Tokens of the prefill rows, which come first; counts those among them that an earlier admission wrote."""
        total = 0
        for row in range(plan.num_rows):
            if plan.slot[row] >= 0:
                break
            start, count = int(plan.start[row]), int(plan.count[row])
            total += count
            below = int(self.requests.recomputed_below[plan.request[row]])
            self.recomputed_tokens += min(max(below - start, 0), count)
        return total

    def _tokens(self, now_ns: int, rows: Int32[np.ndarray, " rows"], token: Int32[np.ndarray, " rows"]) -> None:
        """Take in the rows' new tokens. Rows that also yielded at the end of the last step share one gap."""
        yielded = token >= 0
        if np.count_nonzero(yielded) < len(rows):
            rows = rows[yielded]
        requests = self.requests
        shared = requests.last_token_ns.take(rows) == self._last_end_ns
        num_shared = int(np.count_nonzero(shared)) if self._last_end_ns != NEVER else 0
        if num_shared:
            self.itl_gaps[now_ns - self._last_end_ns] += num_shared
        if num_shared < len(rows):
            self._other_tokens(now_ns, (rows[~shared] if num_shared else rows).tolist())
        requests.output_tokens[rows] += 1
        requests.last_token_ns[rows] = now_ns

    def _other_tokens(self, now_ns: int, rows: Iterable[int]) -> None:
        requests = self.requests
        for request in rows:
            last = int(requests.last_token_ns[request])
            if last == NEVER:
                requests.first_token_ns[request] = now_ns
            else:
                self.itl_gaps[now_ns - last] += 1

    def _take(self, now_ns: int, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            kind = effect.kind
            if kind == "allocated":
                self._pages(now_ns, effect.pages, effect.request)
                self.pages_owned += len(effect.pages)
            elif kind == "freed":
                self._freed(now_ns, effect)
            elif kind == "unfenced":
                self._pages(now_ns, effect.pages, FREE)
                self.pages_fenced -= len(effect.pages)
            else:
                self._moved(now_ns, effect)

    def _moved(self, now_ns: int, effect: Effect) -> None:
        """A request changes its state."""
        requests, request = self.requests, effect.request
        segment = int(requests.segment[request])
        if effect.kind == "submitted":
            self.waiting += 1
            self._live_changed(now_ns, 1)
            self._segment(now_ns, request, WAITING)
        elif effect.kind == "admitted":
            self.waiting -= 1
            self.running += 1
            if requests.admitted_ns[request] == NEVER:
                requests.admitted_ns[request] = now_ns
            self._segment(now_ns, request, PREFILL)
        elif effect.kind == "joined":
            self.slots_used += 1
            self._segment(now_ns, request, DECODE)
        elif effect.kind == "preempted":
            self.waiting += 1
            self.running -= 1
            self.num_preemptions += 1
            self._preempted_now += 1
            requests.preemptions[request] += 1
            self._segment(now_ns, request, PREEMPTED)
        else:
            if segment in (WAITING, PREEMPTED):
                self.waiting -= 1
            else:
                self.running -= 1
            self._gone(now_ns, effect)

    def _gone(self, now_ns: int, effect: Effect) -> None:
        state = FINISHED if effect.kind == "ended" else CANCELLED
        self.requests.state[effect.request] = state
        self.requests.finish_ns[effect.request] = now_ns
        self.requests.reason[effect.request] = effect.reason
        self.count_of_state[LIVE] -= 1
        self.count_of_state[state] += 1
        self._live_changed(now_ns, -1)
        self._segment(now_ns, effect.request, NO_SEGMENT)

    def _freed(self, now_ns: int, effect: Effect) -> None:
        request = effect.request
        fenced = self.policy.fence and any((plan.request == request).any() for plan, _ in self._in_flight)
        self._pages(now_ns, effect.pages, FENCED if fenced else FREE)
        self.pages_owned -= len(effect.pages)
        self.pages_fenced += len(effect.pages) if fenced else 0
        self.slots_used -= effect.slot >= 0
        written = int(self.requests.written[request])
        self.live_tokens -= written
        self.requests.recomputed_below[request] = max(int(self.requests.recomputed_below[request]), written)
        self.requests.written[request] = 0

    def _pages(self, now_ns: int, pages: tuple[int, ...], owner: int) -> None:
        count = len(pages)
        self.page_time_ns.extend((now_ns,) * count)
        self.page_id.extend(pages)
        self.page_owner.extend((owner,) * count)

    def _segment(self, now_ns: int, request: int, kind: int) -> None:
        """Close the request's open segment and open one of `kind`; empty segments are dropped."""
        requests = self.requests
        open_kind, start_ns = int(requests.segment[request]), int(requests.segment_start_ns[request])
        if open_kind != NO_SEGMENT and start_ns < now_ns:
            self.seg_request.append(request)
            self.seg_kind.append(open_kind)
            self.seg_start_ns.append(start_ns)
            self.seg_end_ns.append(now_ns)
        requests.segment[request] = kind
        requests.segment_start_ns[request] = now_ns
