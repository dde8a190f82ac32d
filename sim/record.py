"""What happened in a run, gathered while it happens: columns in memory, derived from plans and effects alone.

The recorder never asks the core for its own view of itself: requests, pages, slots and tokens are counted from what the
core said it did, so that a metric and the core's bookkeeping can disagree, and the auditor can notice.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Final

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from invariants.auditor import GAUGES, Totals
from paged_attention.plan import UNKNOWN_TOKEN, DeclaredPolicy, Effect, Ints, StepOutcome, StepPlan
from sim.columns import Column
from sim.request_table import (
    CANCELLED,
    FINISHED,
    LIVE,
    NEVER,
    NO_SEGMENT,
    REJECTED,
    RequestRows,
    RequestTable,
    RequestTimes,
)
from sim.trace_hash import TraceHash

WAITING, PREFILL, DECODE, PREEMPTED = range(4)
FREE, FENCED = -1, -2

SERIES: Final = ("step", "start_ns", "end_ns", *GAUGES)
"""Columns with one entry per completed step. Counts are those after planning the step; preemptions are its own."""

SPILL_EVERY_STEPS: Final = 512
_NOTHING: Final = np.int32(UNKNOWN_TOKEN).tobytes()


class Recorder:
    """Takes in a run, event by event, and keeps its columns and its trace hash."""

    def __init__(self, policy: DeclaredPolicy) -> None:
        self.policy = policy
        self.hash = TraceHash()
        self._rows = RequestRows()
        self.steps = 0
        """Completed steps."""
        self.itl_gaps: defaultdict[int, int] = defaultdict(int)
        """How many gaps between tokens were that long, by ns."""
        self._series = Column("q")
        """SERIES of each step, step after step."""
        self._page_moves, self._page_ids = Column("q"), Column("i")
        """(time in ns, new owner, number of pages) of each change of ownership, and the pages of all of them."""
        self._segments = Column("q")
        """(request, kind, start in ns, end in ns) of each segment."""
        self._streaming: set[int] = set()
        """Requests that yielded a token in the last completed step: the gap that they share is counted once a step."""
        self._packed_streaming_rows = b""
        self._streaming_since: dict[int, int] = {}
        """How many steps were completed before the first of each one's steps in a row."""
        self.waiting = 0
        """Requests that wait for an admission."""
        self.running = 0
        """Requests admitted and not yet ended."""
        self.slots_used = 0
        self.pages_owned = 0
        self.pages_fenced = 0
        self.live_tokens = 0
        """Tokens with K/V in owned pages."""
        self.scheduled_tokens = self.recomputed_tokens = 0
        self.discarded_tokens = 0
        """Scheduled tokens of steps that never ran."""
        self.failed_steps = self.num_preemptions = 0
        self.count_of_state = [0, 0, 0, 0]
        self._live = self._live_since_ns = self._request_ns = self._preempted_now = 0
        self._last_end_ns = NEVER
        self.in_flight: deque[tuple[StepPlan, tuple[int, ...]]] = deque()
        """The plan of each step in flight, oldest first, and its GAUGES."""
        self._failed_gauges: list[tuple[int, ...]] = []
        self._unwritten: StepPlan | None = None
        """The newest plan, where what it writes is not yet noted: where the next has the same rows, it need not be."""
        self.prefills: list[tuple[int, int, int]] = []
        """(request, start, count) of each prefill row of the newest plan; they come first."""
        self._decodes_only: Ints | None = None
        """The slots of a plan known to have no prefills."""

    @property
    def requests(self) -> RequestTable:
        """A copy of what is known of each request; complete once the recorder is closed."""
        return self._rows.table()

    @property
    def num_requests(self) -> int:
        """Requests that have arrived."""
        return sum(self.count_of_state)

    @property
    def series(self) -> dict[str, NDArray[np.signedinteger]]:
        """SERIES, each as an int64 array with one entry per completed step."""
        return dict(zip(SERIES, self._series.values().reshape(-1, len(SERIES)).T, strict=True))

    def planned_gauges(self) -> dict[str, NDArray[np.signedinteger]]:
        """GAUGES of each plan, also of those that never ran or have not come back; in no order."""
        others = [*self._failed_gauges, *(gauges for _, gauges in self.in_flight)]
        columns = np.array(others, np.int64).reshape(-1, len(GAUGES)).T
        series = self.series
        return {name: np.concatenate((series[name], more)) for name, more in zip(GAUGES, columns, strict=True)}

    def page_events(self) -> dict[str, NDArray[np.signedinteger]]:
        """`page_time_ns`, `page_id` and `page_owner` of each change: a request, FREE or FENCED."""
        time_ns, owner, count = self._page_moves.values().reshape(-1, 3).T
        return {
            "page_time_ns": np.repeat(time_ns, count),
            "page_id": self._page_ids.values(),
            "page_owner": np.repeat(owner.astype(np.int32), count),
        }

    def segments(self) -> dict[str, NDArray[np.signedinteger]]:
        """`seg_request`, `seg_kind`, `seg_start_ns` and `seg_end_ns` of each time that a request spent in one state."""
        request, kind, start_ns, end_ns = self._segments.values().reshape(-1, 4).T
        return {
            "seg_request": request.astype(np.int32),
            "seg_kind": kind.astype(np.int8),
            "seg_start_ns": start_ns,
            "seg_end_ns": end_ns,
        }

    @property
    def pages_free(self) -> int:
        """Pages that nobody owns and no fence holds."""
        return self.policy.num_pages - 1 - self.pages_owned - self.pages_fenced

    def submitted(self, now_ns: int, request: int, prompt_tokens: int, effects: tuple[Effect, ...]) -> None:
        """A request has come in and waits."""
        self._arrived(now_ns, request, prompt_tokens)
        self.hash.effects(effects)
        self._take(now_ns, effects)

    def rejected(self, now_ns: int, request: int, prompt_tokens: int, reason: str) -> None:
        """A request was refused at submission."""
        self._arrived(now_ns, request, prompt_tokens)
        self.hash.refused(request)
        self._rows.state[request] = REJECTED
        self._rows.reason[request] = reason
        self.count_of_state[LIVE] -= 1
        self.count_of_state[REJECTED] += 1

    def cancelled(self, now_ns: int, effects: tuple[Effect, ...]) -> None:
        """A cancel was asked for; `effects` is empty where there was nothing to cancel."""
        self.hash.effects(effects)
        self._take(now_ns, effects)

    def planned(self, now_ns: int, plan: StepPlan) -> tuple[int, ...]:
        """A step has been planned: its GAUGES."""
        self.hash.plan(plan)
        self._preempted_now = 0
        if plan.effects:
            self._take(now_ns, plan.effects)
        if self._unwritten is not None and plan.request is not self._unwritten.request:
            self._note_written()
        self._unwritten = plan
        num_tokens = len(plan.tokens)
        self.prefills = []
        prefill_tokens = 0 if plan.slot is self._decodes_only else self._prefill_tokens(plan)
        self.live_tokens += num_tokens
        self.scheduled_tokens += num_tokens
        gauges = (
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
        self.in_flight.append((plan, gauges))
        return gauges

    def executed(self, start_ns: int, end_ns: int, outcome: StepOutcome) -> None:
        """The oldest step in flight ran from start_ns to end_ns and yielded `outcome`."""
        plan, gauges = self.in_flight.popleft()
        self.hash.outcome(outcome)
        self._series.tail += (plan.step, start_ns, end_ns, *gauges)
        rows, token = plan.request, outcome.token
        # A pattern found astride two tokens costs a look at each and nothing else.
        if _NOTHING in token.tobytes():
            rows = rows[token >= 0]
        if rows.tobytes() != self._packed_streaming_rows:
            self._stream(end_ns, rows)
        elif self._streaming:
            self.itl_gaps[end_ns - self._last_end_ns] += len(self._streaming)
        self._last_end_ns = end_ns
        self.steps += 1
        if self.steps % SPILL_EVERY_STEPS == 0:
            for column in (self._series, self._page_moves, self._page_ids, self._segments):
                column.spill()

    def applied(self, now_ns: int, effects: tuple[Effect, ...]) -> None:
        """The outcome of the step that was executed last has been applied."""
        if effects:
            self.hash.effects(effects)
            self._take(now_ns, effects)
        self.hash.close_step()

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """The newest plan never ran: its positions are taken back."""
        newest, gauges = self.in_flight.pop()
        if newest.step != plan.step:
            raise ValueError(f"only the newest plan (step {newest.step}) can be abandoned, not step {plan.step}")
        self._failed_gauges.append(gauges)
        self.hash.abandoned(plan.step, effects)
        self._note_written()
        self._rows.written[plan.request] = plan.start
        self.live_tokens -= plan.num_tokens
        self.discarded_tokens += plan.num_tokens
        self.failed_steps += 1
        self._take(now_ns, effects)

    def close(self, now_ns: int) -> None:
        """The run is over: what is still open ends here."""
        self._stream(now_ns, np.zeros(0, np.int32))
        for request, kind in enumerate(self._rows.segment[: self._rows.end]):
            if kind != NO_SEGMENT:
                self._segment(now_ns, request, NO_SEGMENT)

    def is_live(self, request: int) -> bool:
        """Whether a request that has come in is unfinished."""
        return self._rows.state[request] == LIVE

    def totals(self, now_ns: int) -> Totals:
        """What was counted, for the auditor to compare with its own books."""
        self._live_changed(now_ns, 0)
        live, finished, cancelled, rejected = self.count_of_state
        return Totals(
            scheduled_tokens=self.scheduled_tokens - self.discarded_tokens,
            arrived=self.num_requests,
            finished=finished,
            cancelled=cancelled,
            rejected=rejected,
            live=live,
            request_ns=self._request_ns,
            series=self.series,
        )

    def times_of(self, request: int) -> RequestTimes:
        """What is known of a request."""
        if request not in self._streaming:
            return self._rows.times_of(request)
        return self._rows.times_of(request, self._last_end_ns, self.steps - self._streaming_since[request])

    def _live_changed(self, now_ns: int, by: int) -> None:
        """Add up live requests over time, which must equal the sum of their times in the system."""
        self._request_ns += self._live * (now_ns - self._live_since_ns)
        self._live_since_ns = now_ns
        self._live += by

    def _arrived(self, now_ns: int, request: int, prompt_tokens: int) -> None:
        self._rows.reserve(request)
        self._rows.arrival_ns[request] = now_ns
        self._rows.prompt_tokens[request] = prompt_tokens
        self.count_of_state[LIVE] += 1

    def _prefill_tokens(self, plan: StepPlan) -> int:
        """Tokens of the prefill rows; notes these rows, and counts the tokens that an earlier admission wrote."""
        total, prefills = 0, self.prefills
        while (row := len(prefills)) < len(plan.slot) and plan.slot.item(row) < 0:
            prefill: tuple[int, int, int] = plan.request.item(row), plan.start.item(row), plan.count.item(row)
            prefills.append(prefill)
            request, start, count = prefill
            total += count
            self.recomputed_tokens += min(max(self._rows.recomputed_below[request] - start, 0), count)
        if not prefills:
            self._decodes_only = plan.slot
        return total

    def _note_written(self) -> None:
        """Note how far the newest plan writes, request by request."""
        plan, self._unwritten = self._unwritten, None
        if plan is not None:
            # As an index, int32 costs several times what intp does.
            self._rows.written[plan.request.astype(np.intp)] = plan.start + plan.count

    def _stream(self, now_ns: int, rows: Int32[np.ndarray, " rows"]) -> None:
        """Take in a step in which other rows yielded than in the last one."""
        before = self._streaming
        yielded: set[int] = set(rows.tolist())
        stayed = len(yielded)
        for request in before ^ yielded:
            if request in before:
                self._leave(request)
                continue
            stayed -= 1
            self._streaming_since[request] = self.steps
            last = self._rows.last_token_ns[request]
            if last == NEVER:
                self._rows.first_token_ns[request] = now_ns
            else:
                self.itl_gaps[now_ns - last] += 1
        if stayed:
            self.itl_gaps[now_ns - self._last_end_ns] += stayed
        self._streaming, self._packed_streaming_rows = yielded, rows.tobytes()

    def _leave(self, request: int) -> None:
        self._rows.output_tokens[request] += self.steps - self._streaming_since.pop(request)
        self._rows.last_token_ns[request] = self._last_end_ns

    def _take(self, now_ns: int, effects: tuple[Effect, ...]) -> None:
        moves, ids = self._page_moves.tail, self._page_ids.tail
        for effect in effects:
            kind = effect.kind
            if kind == "allocated":
                pages = effect.pages
                count = len(pages)
                moves += (now_ns, effect.request, count)
                ids += pages
                self.pages_owned += count
            elif kind == "freed":
                self._freed(now_ns, effect)
            elif kind == "unfenced":
                self.pages_fenced -= self._pages(now_ns, effect.pages, FREE)
            else:
                self._moved(now_ns, effect)

    def _moved(self, now_ns: int, effect: Effect) -> None:
        """A request changes its state."""
        rows, request = self._rows, effect.request
        if effect.kind == "submitted":
            self.waiting += 1
            self._live_changed(now_ns, 1)
            self._segment(now_ns, request, WAITING)
        elif effect.kind == "admitted":
            self.waiting -= 1
            self.running += 1
            if rows.admitted_ns[request] == NEVER:
                rows.admitted_ns[request] = now_ns
            self._segment(now_ns, request, PREFILL)
        elif effect.kind == "joined":
            self.slots_used += 1
            self._segment(now_ns, request, DECODE)
        elif effect.kind == "preempted":
            self.waiting += 1
            self.running -= 1
            self.num_preemptions += 1
            self._preempted_now += 1
            rows.preemptions[request] += 1
            self._segment(now_ns, request, PREEMPTED)
        else:
            if rows.segment[request] in (WAITING, PREEMPTED):
                self.waiting -= 1
            else:
                self.running -= 1
            self._gone(now_ns, effect)

    def _gone(self, now_ns: int, effect: Effect) -> None:
        state = FINISHED if effect.kind == "ended" else CANCELLED
        self._rows.state[effect.request] = state
        self._rows.finish_ns[effect.request] = now_ns
        self._rows.reason[effect.request] = effect.reason
        self.count_of_state[LIVE] -= 1
        self.count_of_state[state] += 1
        self._live_changed(now_ns, -1)
        self._segment(now_ns, effect.request, NO_SEGMENT)

    def _freed(self, now_ns: int, effect: Effect) -> None:
        request = effect.request
        fenced = self.policy.fence and any((plan.request == request).any() for plan, _ in self.in_flight)
        count = self._pages(now_ns, effect.pages, FENCED if fenced else FREE)
        self.pages_owned -= count
        self.pages_fenced += count if fenced else 0
        self.slots_used -= effect.slot >= 0
        self._note_written()
        written = self._rows.written.item(request)
        self.live_tokens -= written
        self._rows.recomputed_below[request] = max(self._rows.recomputed_below[request], written)
        self._rows.written[request] = 0

    def _pages(self, now_ns: int, pages: tuple[int, ...], owner: int) -> int:
        """Note who has the pages now; return how many they are."""
        count = len(pages)
        self._page_moves.tail += (now_ns, owner, count)
        self._page_ids.tail += pages
        return count

    def _segment(self, now_ns: int, request: int, kind: int) -> None:
        """Close the request's open segment and open one of `kind`; empty segments are dropped."""
        rows = self._rows
        open_kind, start_ns = rows.segment[request], rows.segment_start_ns[request]
        if open_kind != NO_SEGMENT and start_ns < now_ns:
            self._segments.tail += (request, open_kind, start_ns, now_ns)
        rows.segment[request] = kind
        rows.segment_start_ns[request] = now_ns
