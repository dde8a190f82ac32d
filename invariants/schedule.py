"""S: the rows of a step are what the declared policy and the books allow, no more and no less.

A step is first compared as a whole with what the books expect of an ordinary one (every running slot decodes one
token). Where that differs, or is no ordinary step, each row is judged by itself; that judgement alone decides.

Declared rules of work conservation (S11), for admission "fcfs", admission_pages other than "any", and a plan in
which nobody is preempted:

- a prefill that has begun runs its next chunk if the pages for it are free when the plan is done;
- a request whose first token's step is planned joins in the next plan if a slot is free, and a page if it needs one;
- the head of the waiting queue is admitted iff no further prefill is active (max_prefill_rows), a slot is reserved for
  it (slots held + requests waiting for a slot + active prefills + 1 <= batch_size; for one that ends at its prefill the
  slot is the core's own choice), and the pages free after growth and joins cover its whole prompt (its first chunk;
  or every token that may ever get K/V).

All that holds in every plan of mix "mixed". Under "prefill_first" and "decode_first" a plan without decodes is held to
it; beside decodes a prefill may wait max_prefill_wait steps (S12), and a decode at most max_decode_wait steps, only for
prefills. A plan that runs decodes lets everybody join who can, whatever the mix.
"""

from __future__ import annotations

from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.lifecycle import LifeJudge
from invariants.records import Live
from paged_attention.plan import StepPlan


class ScheduleJudge:
    """Judges a plan as a whole, after its effects and rows have been followed."""

    def __init__(self, ledger: Ledger, findings: Findings, life: LifeJudge) -> None:
        policy = ledger.policy
        self.ledger = ledger
        self.findings = findings
        self.life = life
        self.budget = policy.max_step_tokens or policy.prefill_chunk * policy.max_prefill_rows + policy.batch_size
        self.decode_wait: dict[int, int] = {}
        self.prefill_wait = 0
        self._waits_before = (self.decode_wait, self.prefill_wait)
        """Both as they were before the newest plan."""
        self.blocked = -1
        """The head of the queue for which pages are short in the plan at hand; -1: none."""
        self.strict = policy.admission == "fcfs" and policy.admission_pages != "any" and policy.mix != "any"

    def well_formed(self, plan: StepPlan) -> bool:
        """S1: arrays of one length, within the budget; False: its rows cannot be read."""
        rows, tokens = len(plan.request), len(plan.tokens)
        of_one_length = rows == len(plan.admission) == len(plan.slot) == len(plan.start) == len(
            plan.count
        ) and rows == len(plan.samples) == len(plan.num_pages) == len(plan.table)
        counted = sum(plan.count.tolist())
        if not of_one_length or plan.table.ndim != 2 or counted != tokens:
            each = (plan.admission, plan.slot, plan.start, plan.count, plan.samples, plan.num_pages, plan.table)
            lengths = {rows, *map(len, each)}
            for name in ("S1", "S8") if counted != tokens else ("S1",):
                self.findings.breach(
                    name,
                    f"the arrays of step {plan.step} do not fit together",
                    expected=f"{rows} entries for each of {rows} rows, {tokens} tokens",
                    found=f"{sorted(lengths)} entries, {counted} tokens by count",
                )
            return False
        if tokens > self.budget:
            self.findings.breach(
                "S1",
                f"step {plan.step} has {tokens} tokens, more than its budget of {self.budget}",
                requests=plan.request.tolist(),
                expected=f"at most {self.budget} tokens",
                found=f"{tokens} tokens",
            )
        if rows == 0:
            self.findings.breach(
                "S11",
                f"step {plan.step} runs nothing, yet it was planned",
                requests=sorted(self.ledger.live),
                expected="a row, or no plan",
                found="an empty plan",
            )
        return True

    def judge(self, plan: StepPlan, prefills: int, decodes: frozenset[int] | None) -> None:
        """S10, S11, S12 once effects and rows are followed; `decodes`: slots in this step (None: all running)."""
        self.blocked = -1
        self._waits_before = (self.decode_wait, self.prefill_wait)
        if decodes is not None or self.decode_wait:
            self._judge_waits(prefills, decodes)
        if self.life.preempted:
            self._judge_after_preemption(plan)
            return
        stalled = self._stalled() if self.ledger.prefill else []
        active = prefills + len(stalled)
        for live in self.life.admitted:
            self._judge_admitted(live, active)
        if self.strict:
            self._judge_idle_work(stalled, active, decodes)

    def abandoned(self) -> None:
        """The newest plan never ran: nobody waited in it."""
        self.decode_wait, self.prefill_wait = self._waits_before

    # ---- S10

    def _judge_after_preemption(self, plan: StepPlan) -> None:
        for live in self.life.admitted:
            self.findings.breach(
                "S10",
                f"request {live.id} was admitted in step {plan.step}, which preempts"
                f" {[v.id for v in self.life.preempted]}",
                requests=(live.id,),
                expected="no admission in a plan that preempts",
                found="admitted",
            )
        in_step = set(plan.request.tolist())
        for victim in self.life.preempted:
            if victim.id in in_step:
                self.findings.breach(
                    "S10",
                    f"request {victim.id} was preempted in step {plan.step} and runs in it",
                    requests=(victim.id,),
                    expected="no row for the victim",
                    found="a row",
                )

    # ---- S11

    def _judge_admitted(self, live: Live, active: int) -> None:
        """Nobody is admitted against the declared rule."""
        ledger, policy, admission = self.ledger, self.ledger.policy, live.admission
        if admission is None:
            return
        self.findings.counts["S11"].add(1, 1)
        need, had = self._entry_pages(live), ledger.pool.num_free + len(admission.pages)
        problem = ""
        if policy.admission_pages != "any" and had < need:
            problem = f"it needs {need} pages and {had} could be had"
        # A short prompt may have run whole in this very plan: then it waits for its slot already.
        before = len(ledger.joining) + len(ledger.prefill) - (live.id in ledger.joining) - (live.id in ledger.prefill)
        if self._needs_slot(live) and ledger.num_free_slots - before < 1:
            problem = f"{ledger.num_free_slots} slots are free and {before} requests are before it"
        if active > policy.max_prefill_rows:
            problem = f"{active} prefills are active"
        if problem:
            self.findings.breach(
                "S11",
                f"request {live.id} was admitted although {problem}",
                requests=(live.id,),
                expected="admitted only where the declared rule allows",
                found=problem,
            )

    def _entry_pages(self, live: Live) -> int:
        tokens = live.known if live.admission is None or live.state == "waiting" else live.admission.feed
        if self.ledger.policy.admission_pages == "chunk":
            tokens = min(tokens, self.ledger.policy.prefill_chunk)
        elif self.ledger.policy.admission_pages == "all":
            tokens = live.last
        return self.ledger.pages_for(tokens)

    def _needs_slot(self, live: Live) -> bool:
        known = live.known if live.state == "waiting" or live.admission is None else live.admission.feed
        return live.last > known

    def _stalled(self) -> list[Live]:
        """Prefills that have begun, are not done, and have no row in this step."""
        return [live for live in self.ledger.prefill.values() if live.prefill_step != self.findings.step]

    def _judge_idle_work(self, stalled: list[Live], active: int, decodes: frozenset[int] | None) -> None:
        ledger, policy = self.ledger, self.ledger.policy
        num_decodes = len(ledger.running) if decodes is None else len(decodes)
        who, lazy = -1, ""
        for live in stalled:
            who, lazy = live.id, self._could_run(live)
            if lazy:
                break
        if ledger.waiting and active < policy.max_prefill_rows:
            self.findings.counts["S11"].add(1, 1)
            who, lazy = ledger.waiting[0].id, self._could_admit(ledger.waiting[0])
        if not lazy:
            self.prefill_wait = 0
        elif policy.mix == "mixed" or not num_decodes:
            self._lazy(who, lazy)
        else:
            self._prefill_waits(who)
        if ledger.joining and (policy.mix == "mixed" or num_decodes):
            self._judge_joining()

    def _lazy(self, request: int, what: str) -> None:
        self.findings.breach(
            "S11",
            f"request {request} {what}",
            requests=(request,),
            expected="work that can run is run",
            found="left out of the plan",
        )

    def _could_run(self, live: Live) -> str:
        """What a stalled prefill could have done; "": its pages were not there."""
        ledger, admission = self.ledger, live.admission
        if admission is None:
            return ""
        end = min(admission.position + ledger.policy.prefill_chunk, admission.feed)
        need = ledger.pages_for(end) - len(admission.pages)
        self.findings.counts["S11"].add(1, 1)
        if need > ledger.pool.num_free:
            return ""
        return (
            f"is in its prefill at {admission.position} of {admission.feed} tokens and got no chunk, though"
            f" {ledger.pool.num_free} pages are free and it needs {max(need, 0)}"
        )

    def _could_admit(self, head: Live) -> str:
        """Why the head of the queue should have been admitted; "": it could not be."""
        ledger = self.ledger
        need = self._entry_pages(head)
        before = len(ledger.joining) + len(ledger.prefill)
        if need > ledger.pool.num_free:
            self.blocked = head.id
            return ""
        if ledger.num_free_slots - before < 1:
            return ""
        return (
            f"heads the waiting queue and was not admitted, though {ledger.pool.num_free} pages are free and it needs"
            f" {need}, and {ledger.num_free_slots} slots are free with {before} requests before it"
        )

    def _judge_joining(self) -> None:
        ledger = self.ledger
        ready = next((x for x in ledger.joining.values() if x.prefill_step != self.findings.step), None)
        if ready is None or ready.admission is None or not ledger.num_free_slots:
            return
        self.findings.counts["S11"].add(1, 1)
        need = ledger.pages_for(ready.admission.position + 1) - len(ready.admission.pages)
        if need <= ledger.pool.num_free:
            self._lazy(
                ready.id, f"waits for a slot though {ledger.num_free_slots} are free and it needs {max(need, 0)} pages"
            )

    # ---- S12

    def _prefill_waits(self, request: int) -> None:
        self.prefill_wait += 1
        bound = self.ledger.policy.max_prefill_wait
        self.findings.counts["S12"].add(1, 1)
        if self.prefill_wait > bound:
            self.findings.breach(
                "S12",
                f"the prefill of request {request} could run and waited {self.prefill_wait} steps in a row for decodes",
                requests=(request,),
                expected=f"at most {bound} steps",
                found=f"{self.prefill_wait} steps",
            )
            self.prefill_wait = 0

    def _judge_waits(self, prefills: int, decodes: frozenset[int] | None) -> None:
        """A running decode is left out only as the mix rule allows."""
        ledger, policy = self.ledger, self.ledger.policy
        running = ledger.running.tolist() if decodes is not None else []
        left_out = [s for s in running if decodes is not None and s not in decodes]
        self.decode_wait = {s: self.decode_wait.get(s, 0) + 1 for s in left_out}
        if policy.mix == "any":
            return
        bound = policy.max_decode_wait if policy.mix == "prefill_first" and prefills else 0
        for slot in left_out:
            live = ledger.occupant[slot]
            waited = self.decode_wait[slot]
            if live is not None and waited > bound:
                self.findings.breach(
                    "S12",
                    f"the decode of request {live.id} in slot {slot} was left out of {waited} steps in a row"
                    f" ({policy.mix!r}, {prefills} prefill rows in this one)",
                    requests=(live.id,),
                    expected=f"at most {bound} steps" if bound else "a row in every step",
                    found=f"{waited} steps",
                )
