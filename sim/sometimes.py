"""What must happen in some run: the corners that a scenario library has to reach, and how often a run reached each.

A statement that always holds is worth nothing where its hard cases never come up. Counts follow from effects and plans;
what a step costs does not depend on how many tokens it has.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from paged_attention.plan import Effect, Request, StepPlan
from sim.observer import Bystander
from sim.record import Recorder
from sim.request_table import FINISHED, LIVE, NEVER, REJECTED

SOMETIMES: Final = {
    "request-refused": "A request is refused at submission.",
    "arrivals-at-one-instant": "Two requests come at the same instant.",
    "woken-from-idle": "A request comes when nobody was left.",
    "prompt-of-one-token": "A prompt has one token.",
    "prompt-short-of-page": "A prompt ends one token before the end of a page.",
    "prompt-fills-page": "A prompt ends where a page ends.",
    "prompt-past-page": "A prompt ends one token into a page.",
    "chunk-fills-exactly": "The last chunk of a prompt is a full one.",
    "chunk-short": "The last of several chunks is a short one.",
    "chunk-inside-page": "A chunk begins in the middle of a page.",
    "prefill-alone": "A step runs a prefill and no decodes.",
    "decodes-alone": "A step runs decodes and no prefill.",
    "mixed-step": "A step runs a prefill and decodes.",
    "all-slots-used": "Every slot is taken.",
    "head-waits-for-slot": "The head of the queue waits for a slot.",
    "head-waits-for-pages": "The head of the queue waits for pages though a slot is free.",
    "joining-waits": "A prefilled request does not join in the next plan.",
    "prefill-waits-for-pages": "A prefill that has begun waits for pages.",
    "decodes-wait-for-prefill": "Decodes wait for a prefill (mix prefill_first).",
    "prefill-waits-for-decodes": "A prefill that has begun waits for decodes (mix decode_first).",
    "last-page": "The last page of the pool is handed out.",
    "exact-fit": "A grant takes the last free page.",
    "decode-crosses-page": "A decode needs a new page.",
    "victims-page-at-once": "A page of a victim goes to another request in the same plan.",
    "preempt-in-prefill": "A request is preempted between two chunks.",
    "preempt-joining": "A request is preempted that waits for its slot.",
    "preempt-decoding": "A request is preempted that decodes.",
    "two-victims": "Two requests are preempted in one plan.",
    "preempted-twice": "A request is preempted for the second time.",
    "resumed-with-tokens": "A request is admitted again after it has yielded tokens.",
    "cancel-waiting": "A request is cancelled that waits.",
    "cancel-prefill": "A request is cancelled in its prefill.",
    "cancel-joining": "A request is cancelled that waits for its slot.",
    "cancel-running": "A request is cancelled that decodes.",
    "cancel-draining": "A request is cancelled while its last token is in flight.",
    "cancel-in-flight": "A request is cancelled while a step with it is in flight.",
    "cancel-gone": "A cancel comes for a request that is gone.",
    "end-by-eos": "A request ends by EOS.",
    "end-by-max-tokens": "A request ends by max_tokens.",
    "end-by-length": "A request ends at the maximum length.",
    "end-at-first-token": "A request wants one token only.",
    "eos-first-token": "The first token of a request is its EOS.",
    "eos-late": "An EOS reaches the host when a later step with the request is in flight.",
    "two-end-at-once": "Two requests end in one step.",
    "pages-fenced": "Pages are given back while a step that may touch them is in flight.",
    "fenced-page-reused": "A page that was fenced is handed out again.",
    "slot-reused": "A slot is taken that another request held before.",
    "slot-reused-in-flight": "A slot is taken while a step of its last holder is in flight.",
    "failed-with-prefill": "A step with a prefill never runs.",
    "failed-with-join": "A step in which somebody joins never runs.",
    "failed-with-growth": "A step for which a decode got a page never runs.",
}
"""Id and sentence of each."""

_WAITING, _PREFILL, _JOINING, _RUNNING, _DRAINING = range(5)
_CANCELS: Final = ("cancel-waiting", "cancel-prefill", "cancel-joining", "cancel-running", "cancel-draining")
_PREEMPTS: Final = {_PREFILL: "preempt-in-prefill", _JOINING: "preempt-joining", _RUNNING: "preempt-decoding"}


class _Live:
    """A request that is not gone."""

    __slots__ = ("first_step", "joining_since", "last", "preempted", "state")

    def __init__(self, last: int) -> None:
        self.state = _WAITING
        self.last = last
        """The position of its last token, if no EOS ends it."""
        self.first_step = -1
        """The step that yields its first token; -1: not planned yet."""
        self.joining_since = -1
        self.preempted = 0


class Sometimes(Bystander):
    """An observer that counts what only the order of events shows; the rest is read off the record at the end."""

    def __init__(self, recorder: Recorder) -> None:
        policy = recorder.policy
        self._hits = dict.fromkeys(SOMETIMES, 0)
        self._recorder, self._policy = recorder, policy
        self._live: dict[int, _Live] = {}
        self._prefilling: set[int] = set()
        self._joining: set[int] = set()
        self._slots_seen: set[int] = set()
        self._unfenced: set[int] = set()
        """Pages that left a fence and were not handed out since."""
        self._decodes: StepPlan | None = None
        """The newest plan with decodes."""
        self._was_idle = False

    @property
    def hits(self) -> dict[str, int]:
        """How often each of SOMETIMES happened."""
        return {**self._hits, **self._of_requests(), **self._of_plans()}

    @property
    def num_reached(self) -> int:
        """How many of them happened at all."""
        return sum(count > 0 for count in self.hits.values())

    def _of_requests(self) -> dict[str, int]:
        """What arrivals, prompts and ends show."""
        table, size = self._recorder.requests, self._policy.page_size
        prompt = table.prompt_tokens[(table.arrival_ns != NEVER) & (table.state != REJECTED)]
        arrival_ns = table.arrival_ns[table.arrival_ns != NEVER]
        finished = table.first_id + np.flatnonzero(table.state == FINISHED)
        ends = Counter(table.reason.get(request) for request in finished.tolist())
        counts = {
            "request-refused": table.state == REJECTED,
            "arrivals-at-one-instant": arrival_ns[1:] == arrival_ns[:-1],
            "prompt-of-one-token": prompt == 1,
            "prompt-short-of-page": prompt % size == size - 1,
            "prompt-fills-page": prompt % size == 0,
            "prompt-past-page": prompt % size == 1,
        }
        by_end = {f"end-by-{why.replace('_', '-')}": ends[why] for why in ("eos", "max_tokens", "length")}
        return {name: int(np.count_nonzero(which)) for name, which in counts.items()} | by_end

    def _of_plans(self) -> dict[str, int]:
        """What the gauges of all plans show, also of those that did not run, and the pages handed out."""
        gauges = self._recorder.planned_gauges()
        prefills, decodes = gauges["prefill_tokens"] > 0, gauges["decode_tokens"] > 0
        moves = self._recorder.page_events()
        last = (moves["page_id"] == self._policy.num_pages - 1) & (moves["page_owner"] >= 0)
        counts = {
            "prefill-alone": ~decodes,
            "decodes-alone": decodes & ~prefills,
            "mixed-step": decodes & prefills,
            "all-slots-used": gauges["slots_used"] == self._policy.batch_size,
            "last-page": last,
        }
        return {name: int(np.count_nonzero(which)) for name, which in counts.items()}

    # Requests.

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """See Observer."""
        if refusal is None:
            self._hits["woken-from-idle"] += self._was_idle
            self._was_idle = False
            limit = min(request.max_tokens, self._policy.max_sequence_length - len(request.prompt) + 1)
            self._live[request.id] = _Live(len(request.prompt) + limit - 1)

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        live = self._live.get(request)
        if live is None or not effects:
            self._hits["cancel-gone"] += 1
            return
        ends = [
            plan.start.item(row) + plan.count.item(row)
            for plan, _ in self._recorder.in_flight
            for row in (plan.request == request).nonzero()[0].tolist()
        ]
        draining = live.state == _DRAINING or max(ends, default=-1) >= live.last
        self._hits[_CANCELS[_DRAINING if draining else live.state]] += 1
        self._hits["cancel-in-flight"] += bool(ends)
        self._given_back(effects)
        self._forget(request)

    def _forget(self, request: int) -> None:
        self._live.pop(request, None)
        self._prefilling.discard(request)
        self._joining.discard(request)

    # A step.

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """See Observer."""
        if plan.effects:
            self._follow(plan.effects)
        prefills = self._recorder.prefills
        for row, (request, start, count) in enumerate(prefills):
            self._prefill(plan, row, request, start, count)
        if len(prefills) < len(plan.slot):
            self._decodes = plan
        elif self._policy.mix == "prefill_first":
            self._hits["decodes-wait-for-prefill"] += self._decodes_wait()
        if self._prefilling or self._joining or self._recorder.waiting:
            self._who_waits(plan.step, bool(prefills))

    def _follow(self, effects: tuple[Effect, ...]) -> None:
        """Take in what a plan changed."""
        hits, prefilling, victims, granted = self._hits, self._prefilling, 0, False
        released: set[int] = set()
        for effect in effects:
            kind = effect.kind
            if kind == "allocated":
                granted = True
                if effect.first_page and effect.request not in prefilling:
                    hits["decode-crosses-page"] += 1
                if released or self._unfenced:
                    self._regranted(effect.pages, released)
            elif kind == "joined":
                self._joined(effect)
            elif kind == "admitted":
                self._admitted(effect)
            elif kind == "preempted":
                victims += 1
                self._preempted(effect)
            elif kind == "freed":
                released.update(effect.pages)
        if granted and not self._recorder.pages_free:
            hits["exact-fit"] += 1
        hits["two-victims"] += victims > 1

    def _regranted(self, pages: tuple[int, ...], released: set[int]) -> None:
        """Pages are handed out; `released` were given back in the same plan."""
        self._hits["victims-page-at-once"] += not released.isdisjoint(pages)
        self._hits["fenced-page-reused"] += not self._unfenced.isdisjoint(pages)
        self._unfenced.difference_update(pages)

    def _admitted(self, effect: Effect) -> None:
        live = self._live.get(effect.request)
        if live is not None:
            live.state = _PREFILL
            self._prefilling.add(effect.request)
            self._hits["resumed-with-tokens"] += effect.admission > 1 and live.first_step >= 0

    def _joined(self, effect: Effect) -> None:
        live = self._live.get(effect.request)
        if live is not None:
            live.state = _RUNNING
        self._joining.discard(effect.request)
        self._hits["slot-reused"] += effect.slot in self._slots_seen
        self._slots_seen.add(effect.slot)
        flights = self._recorder.in_flight
        # The newest of them is the plan at hand.
        if len(flights) > 1 and any((plan.slot == effect.slot).any() for plan, _ in list(flights)[:-1]):
            self._hits["slot-reused-in-flight"] += 1

    def _preempted(self, effect: Effect) -> None:
        live = self._live.get(effect.request)
        if live is None:
            return
        if live.state in _PREEMPTS:
            self._hits[_PREEMPTS[live.state]] += 1
        live.preempted += 1
        self._hits["preempted-twice"] += live.preempted == 2
        live.state = _WAITING
        self._prefilling.discard(effect.request)
        self._joining.discard(effect.request)

    def _prefill(self, plan: StepPlan, row: int, request: int, start: int, count: int) -> None:
        """Take in the chunk of a prompt."""
        hits, live = self._hits, self._live.get(request)
        if start % self._policy.page_size:
            hits["chunk-inside-page"] += 1
        if live is None or not plan.samples.item(row):
            return
        if count == self._policy.prefill_chunk:
            hits["chunk-fills-exactly"] += 1
        elif start:
            hits["chunk-short"] += 1
        self._prefilling.discard(request)
        if live.first_step < 0:
            live.first_step = plan.step
        if start + count >= live.last:
            live.state = _DRAINING
        else:
            live.state, live.joining_since = _JOINING, plan.step
            self._joining.add(request)

    def _decodes_wait(self) -> bool:
        """Whether somebody in a slot has a token left to yield, in a plan without decodes."""
        plan = self._decodes
        if plan is None or not self._recorder.slots_used:
            return False
        ends = zip(plan.request.tolist(), (plan.start + plan.count).tolist(), strict=True)
        running = ((self._live.get(request), end) for request, end in ends)
        return any(live is not None and live.state == _RUNNING and end < live.last for live, end in running)

    def _who_waits(self, step: int, runs_prefill: bool) -> None:
        hits, recorder, joining = self._hits, self._recorder, self._joining
        if joining and any(self._live[request].joining_since < step for request in joining):
            hits["joining-waits"] += 1
        if runs_prefill:
            return
        decode_first = self._policy.mix == "decode_first"
        if self._prefilling:
            hits["prefill-waits-for-decodes" if decode_first else "prefill-waits-for-pages"] += 1
        elif recorder.waiting and not decode_first:
            reserved = recorder.slots_used + len(joining) >= self._policy.batch_size
            hits["head-waits-for-slot" if reserved else "head-waits-for-pages"] += 1

    def idle(self, now_ns: int) -> None:
        """See Observer."""
        self._was_idle = self._recorder.num_requests > 0 and not self._recorder.count_of_state[LIVE]

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        if not effects:
            return
        hits, ends = self._hits, 0
        for effect in effects:
            if effect.kind == "ended":
                ends += 1
                self._ended(effect, step)
        self._given_back(effects)
        hits["two-end-at-once"] += ends > 1

    def _ended(self, effect: Effect, step: int) -> None:
        hits, live = self._hits, self._live.get(effect.request)
        if live is not None and live.first_step == step:
            hits["eos-first-token" if effect.reason == "eos" else "end-at-first-token"] += 1
        if effect.reason == "eos" and any(
            (plan.request == effect.request).any() for plan, _ in self._recorder.in_flight
        ):
            hits["eos-late"] += 1
        self._forget(effect.request)

    def _given_back(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            if effect.kind == "unfenced":
                self._unfenced.update(effect.pages)
            elif effect.kind == "freed" and self._recorder.pages_fenced:
                self._hits["pages-fenced"] += 1

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        hits = self._hits
        hits["failed-with-prefill"] += plan.slot.item(0) < 0
        hits["failed-with-join"] += any(effect.kind == "joined" for effect in plan.effects)
        held = set(plan.request[plan.slot >= 0].tolist())
        hits["failed-with-growth"] += any(e.kind == "allocated" and e.request in held for e in plan.effects)
        for row, request in enumerate(plan.request[plan.slot < 0].tolist()):
            live = self._live.get(request)
            if live is not None and plan.samples[row]:
                live.state = _PREFILL
                live.first_step = -1 if live.first_step == plan.step else live.first_step
                self._joining.discard(request)
                self._prefilling.add(request)
        self._given_back(effects)
