"""S6, S7, S9, S10, S13, T3, R1, R3, R4, L4: a request moves only as declared, and takes its slot along.

    submit -> waiting -> prefill -> joining -> running -> draining -> ended
                 ^          |          |          |
                 +----------+-- preempted --------+             cancelled from anywhere

Declared rules beyond the picture: the waiting queue is in order of submission, and a victim goes back to its head;
`preempted` precedes the victim's `freed` in the same plan, nothing is in flight then, the victim is the newest holder,
and the decodes that run or join need more pages than are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.liveness import LivenessJudge
from invariants.metrics import MetricJudge
from invariants.outputs import OutputJudge
from invariants.pages import PageJudge
from invariants.records import Admission, Live
from paged_attention.plan import Effect, Request

Call = Literal["submit", "cancel", "plan", "apply", "abandon"]

DECLARED_CALLS: dict[str, frozenset[str]] = {
    "submitted": frozenset({"submit"}),
    "admitted": frozenset({"plan"}),
    "allocated": frozenset({"plan"}),
    "joined": frozenset({"plan"}),
    "preempted": frozenset({"plan"}),
    "ended": frozenset({"apply"}),
    "cancelled": frozenset({"cancel"}),
    "freed": frozenset({"plan", "apply", "cancel", "abandon"}),
    "unfenced": frozenset({"apply", "abandon"}),
}
"""In which calls each kind of effect may happen (docs/protocol.md)."""

DECLARED_STATES: dict[str, frozenset[str]] = {
    "admitted": frozenset({"waiting"}),
    "allocated": frozenset({"prefill", "joining", "running"}),
    "joined": frozenset({"joining"}),
    "preempted": frozenset({"prefill", "joining", "running"}),
    "ended": frozenset({"joining", "running", "draining"}),
    "cancelled": frozenset({"waiting", "prefill", "joining", "running", "draining"}),
}
"""In which states of a request each kind of effect may happen."""

HOLDING = DECLARED_STATES["allocated"]


class LifeJudge:
    """Judges every effect and lets the ledger follow it."""

    def __init__(
        self,
        ledger: Ledger,
        findings: Findings,
        pages: PageJudge,
        outputs: OutputJudge,
        liveness: LivenessJudge,
        metrics: MetricJudge,
    ) -> None:
        self.ledger = ledger
        self.findings = findings
        self.pages = pages
        self.outputs = outputs
        self.liveness = liveness
        self.metrics = metrics
        self.admitted: list[Live] = []
        """Admitted in the plan at hand."""
        self.joined: list[Live] = []
        self.preempted: list[Live] = []
        self.moves = 0
        self.granted: list[tuple[Live, Admission]] = []
        """Given pages in the plan at hand, outside a slot."""
        self.changed: set[int] = set()
        """Slots whose row was changed since the last step that was dispatched."""

    # ---- calls

    def submit(self, now_ns: int, request: Request, effects: Sequence[Effect], refusal: str | None) -> None:
        """A request is refused iff it can never be served; otherwise it waits."""
        why = self.must_refuse(request)
        self.findings.counts["S13"].add(1, 1)
        if (why is None) != (refusal is None):
            self.findings.breach(
                "S13",
                f"request {request.id} was refused ({refusal}) although it fits"
                if why is None
                else f"request {request.id} was accepted although {why}",
                requests=(request.id,),
                expected="accepted" if why is None else f"refused: {why}",
                found="accepted" if refusal is None else f"refused: {refusal}",
            )
        if refusal is not None:
            if effects:
                self.findings.breach(
                    "S13",
                    f"request {request.id} was refused, yet {effects[0].kind!r} happened",
                    requests=(request.id,),
                    expected="no effects",
                    found=[e.kind for e in effects],
                )
            return
        self.findings.counts["S7"].add(1, 1)
        if request.id in self.ledger.live or [(e.kind, e.request) for e in effects] != [("submitted", request.id)]:
            self.findings.breach(
                "S7",
                f"submission of request {request.id} had the effects {[tuple(e) for e in effects]}",
                requests=(request.id,),
                expected="one 'submitted' of a request that is not live",
                found=[e.kind for e in effects],
            )
        if request.id not in self.ledger.live and len(request.prompt) and request.max_tokens > 0:
            self.liveness.submitted(self.ledger.submit(request, now_ns))

    def must_refuse(self, request: Request) -> str | None:
        """Why the request cannot be taken in (rule SEED-07), or None."""
        policy, prompt = self.ledger.policy, len(request.prompt)
        if request.id in self.ledger.live:
            return "its id is that of an unfinished request"
        if prompt == 0:
            return "its prompt is empty"
        if request.max_tokens < 1:
            return f"max_tokens is {request.max_tokens}"
        if prompt > policy.max_sequence_length:
            return f"its prompt of {prompt} tokens exceeds the maximum length {policy.max_sequence_length}"
        need = min(prompt + request.max_tokens - 1, policy.max_sequence_length)
        pages = self.ledger.pages_for(need)
        if pages > policy.num_pages - 1:
            return f"it needs {pages} pages for {need} tokens and the pool has {policy.num_pages - 1}"
        return None

    def cancel(self, request: int, effects: Sequence[Effect]) -> None:
        """A live request goes at once and gives back what it holds; any other cancel does nothing."""
        live = self.ledger.live.get(request)
        if live is None:
            self.findings.counts["R4"].add(1, 1)
            if effects:
                self.findings.breach(
                    "R4",
                    f"cancel of request {request}, which is {self.ledger.how_gone(request)}, had effects",
                    requests=(request,),
                    expected="no effects",
                    found=[e.kind for e in effects],
                )
            self.follow(effects, "cancel")
            return
        self.findings.counts["R3"].add(1, 1)
        state, admission = live.state, live.admission
        if admission is not None and not admission.released:
            self.pages.due[request] = admission
        strangers = [e for e in effects if e.request != request]
        if [e.kind for e in effects].count("cancelled") != 1 or strangers:
            self.findings.breach(
                "R3",
                f"cancel of request {request} ({state}) had the effects {[(e.kind, e.request) for e in effects]}",
                requests=(request, *(e.request for e in strangers)),
                expected="one 'cancelled' and what that request gives back",
                found=[(e.kind, e.request) for e in effects],
            )
        self.follow(effects, "cancel")
        if request in self.pages.due:
            self.findings.breach(
                "R3",
                f"cancelled request {request} ({state}) did not give back what it held",
                requests=(request,),
                pages=self.pages.due[request].pages,
                expected="its pages and slot given back once",
                found="nothing given back",
            )

    def settle_counts(self) -> None:
        """Move the bulk counter into the counters."""
        self.findings.counts["S7"].add(self.moves, self.moves)
        self.moves = 0

    def begin_plan(self) -> None:
        """Forget what happened in the plan before."""
        self.admitted.clear()
        self.joined.clear()
        self.preempted.clear()
        self.granted.clear()

    def follow(self, effects: Sequence[Effect], call: Call) -> None:
        """Judge effects in their order, and let the ledger follow."""
        self.moves += len(effects)
        for effect in effects:
            kind = effect.kind
            if call not in DECLARED_CALLS[kind]:
                self._illegal(effect, f"in a {call} call")
            if kind == "allocated":
                self._allocated(effect)
            elif kind == "freed":
                self._freed(effect)
            elif kind == "unfenced":
                self.pages.unfenced(effect)
            elif kind != "submitted":
                self._move(effect)

    # ---- effects

    def _move(self, effect: Effect) -> None:
        live = self.ledger.live.get(effect.request)
        if live is None:
            self._illegal(effect, f"but the request is {self.ledger.how_gone(effect.request)}")
            if self.ledger.how_gone(effect.request) == "cancelled":
                self.findings.breach(
                    "R3",
                    f"{effect.kind!r} of request {effect.request} after it was cancelled",
                    requests=(effect.request,),
                    expected="nothing",
                    found=effect.kind,
                )
            return
        if live.state not in DECLARED_STATES[effect.kind]:
            self._illegal(effect, f"while the request is {live.state}")
            if effect.kind not in {"ended", "cancelled"}:
                return
        admission = live.admission
        if effect.kind == "admitted":
            self._admitted(effect, live)
            return
        if effect.kind != "cancelled" and (admission is None or admission.number != effect.admission):
            self._illegal(effect, f"while its admission is {live.admissions}")
        if effect.kind == "joined" and admission is not None:
            self._joined(effect, live, admission)
        elif effect.kind == "preempted" and admission is not None:
            self._preempted(effect, live, admission)
        elif effect.kind == "ended":
            self.outputs.ended(effect, live)
            self._retire(live, "ended")
        elif effect.kind == "cancelled":
            self._slot_told(effect, live.admission, "R3")
            self._retire(live, "cancelled")

    def _retire(self, live: Live, how: Literal["ended", "cancelled"]) -> None:
        self.liveness.retired(live)
        self.metrics.retired(live, how)
        self.ledger.retire(live, how)

    def _illegal(self, effect: Effect, how: str) -> None:
        self.findings.breach(
            "S7",
            f"{effect.kind!r} of request {effect.request}, admission {effect.admission}, {how}",
            requests=(effect.request,),
            pages=effect.pages,
            expected="a move of the declared automaton",
            found=f"{effect.kind} {how}",
        )

    def _allocated(self, effect: Effect) -> None:
        live = self.ledger.live.get(effect.request)
        if (
            live is None
            or live.state not in HOLDING
            or (admission := live.admission) is None
            or admission.number != effect.admission
            or admission.released
        ):
            state = live.state if live is not None else self.ledger.how_gone(effect.request)
            self._illegal(effect, f"while the request is {state}")
            return
        if admission.slot < 0:
            self.granted.append((live, admission))
        else:
            self.changed.add(admission.slot)
        self.pages.allocated(effect, admission)

    def _freed(self, effect: Effect) -> None:
        admission = self.pages.due.get(effect.request) or self.pages.next_due.get(effect.request)
        if admission is None:
            live = self.ledger.live.get(effect.request)
            admission = live.admission if live is not None else None
        if admission is not None and admission.number != effect.admission:
            admission = None
        if admission is not None and not admission.released:
            self._slot_told(effect, admission, "T3")
            if admission.slot >= 0:
                self.changed.add(admission.slot)
            self.ledger.leave_slot(admission)
            self.ledger.released_tokens += admission.position
        self.pages.freed(effect, admission)

    def _slot_told(self, effect: Effect, admission: Admission | None, family: str) -> None:
        """The slot of an effect is the one that the admission holds."""
        held = admission.slot if admission is not None else -1
        self.findings.counts["T3"].add(1, 1)
        if effect.slot != held:
            for name in dict.fromkeys((family, "T3")):
                self.findings.breach(
                    name,
                    f"{effect.kind!r} of request {effect.request} names slot {effect.slot}, but it holds slot {held}",
                    requests=(effect.request,),
                    expected=f"slot {held}",
                    found=f"slot {effect.slot}",
                )

    def _admitted(self, effect: Effect, live: Live) -> None:
        ledger = self.ledger
        if effect.admission != live.admissions + 1:
            self._illegal(effect, f"after admission {live.admissions}")
        if ledger.policy.admission == "fcfs":
            head = ledger.waiting[0]
            self.findings.counts["S9"].add(1, 1 if len(ledger.waiting) > 1 else 0)
            if head is not live:
                self.findings.breach(
                    "S9",
                    f"request {live.id} was admitted before request {head.id}, which heads the waiting queue",
                    requests=(live.id, head.id),
                    expected=f"request {head.id}",
                    found=f"request {live.id}",
                )
        ledger.admit(live, effect.admission, self.findings.time_ns)
        self.admitted.append(live)

    def _joined(self, effect: Effect, live: Live, admission: Admission) -> None:
        slot, slots = effect.slot, len(self.ledger.occupant)
        self.findings.counts["T3"].add(1, 1)
        other = self.ledger.occupant[slot] if 0 <= slot < slots else None
        if not 0 <= slot < slots or other is not None:
            found = f"held by request {other.id}" if other is not None else f"not in 0 .. {slots - 1}"
            self.findings.breach(
                "T3",
                f"request {live.id} joined in slot {slot}, which is {found}",
                requests=(live.id,) if other is None else (live.id, other.id),
                expected="a free slot",
                found=found,
            )
        if not 0 <= slot < slots:
            return
        if other is not None and other.admission is not None:
            self.ledger.leave_slot(other.admission)
        self.ledger.join(live, admission, slot)
        self.changed.add(slot)
        self.joined.append(live)

    def _preempted(self, effect: Effect, live: Live, admission: Admission) -> None:
        ledger, findings = self.ledger, self.findings
        findings.counts["R1"].add(1, 1)
        self._slot_told(effect, admission, "R1")
        self._judge_victim(live)
        self.pages.due[live.id] = admission
        self.liveness.preempted(live)
        ledger.preempt(live, admission)
        self.preempted.append(live)

    def _judge_victim(self, live: Live) -> None:
        ledger, findings, policy = self.ledger, self.findings, self.ledger.policy
        holders = [*ledger.prefill.values(), *ledger.joining.values(), *(x for x in ledger.occupant if x is not None)]
        holders = [h for h in holders if h.state != "waiting"]
        findings.counts["S10"].add(1, 1)
        if policy.preemption == "none":
            findings.breach(
                "S10",
                f"request {live.id} was preempted although no preemption is declared",
                requests=(live.id,),
                expected="no preemption",
                found="preempted",
            )
        if policy.victim == "newest":
            newest = max(holders, key=lambda h: h.order, default=live)
            if newest is not live:
                findings.breach(
                    "S10",
                    f"request {live.id} was preempted, but request {newest.id} is the newest holder",
                    requests=(live.id, newest.id),
                    expected=f"request {newest.id}",
                    found=f"request {live.id}",
                )
        decodes = [h for h in holders if h.state in {"running", "joining"} and h.admission is not None]
        need = sum(
            max(0, ledger.pages_for(ledger.computed(h.admission) + 1) - len(h.admission.pages))
            for h in decodes
            if h.admission is not None
        )
        if ledger.flights or need <= ledger.pool.num_free:
            why = (
                f"steps {sorted(ledger.flights)} are in flight"
                if ledger.flights
                else f"its decodes need {need} pages and {ledger.pool.num_free} are free"
            )
            findings.breach(
                "S10",
                f"request {live.id} was preempted although {why}",
                requests=(live.id,),
                expected="a preemption only for want of pages, with nothing in flight",
                found=why,
            )
