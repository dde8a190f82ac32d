"""L: everything that was asked for comes to its end, in a number of steps that the work itself bounds.

The work of a request is counted in rows: one for each prefill chunk that is left, one for each decode that is left.
Every step runs at least one row. So a quiet system (nothing submitted, cancelled, preempted or abandoned) is drained
after at most as many steps as there is work (L1), and the head of a first-come queue is admitted after at most as many
steps as there was work when it came (L3).
"""

from __future__ import annotations

from collections.abc import Mapping

from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.records import Flight, Live

MAX_STEPS_AT_ONE_INSTANT = 16
"""Plans at one virtual time, beyond the lag: several only happen where steps are abandoned and planned again."""


MOST_NAMED = 8
"""Requests that a message names."""


class LivenessJudge:
    """Counts steps against work."""

    def __init__(self, ledger: Ledger, findings: Findings) -> None:
        policy = ledger.policy
        self.ledger = ledger
        self.findings = findings
        self.chunk = policy.prefill_chunk
        if policy.max_step_tokens:
            self.chunk = max(1, min(self.chunk, policy.max_step_tokens - policy.batch_size))
        longest = -(-policy.max_sequence_length // self.chunk)
        self.window = 2 * (longest + policy.max_decode_wait + policy.max_prefill_wait + policy.lag + 4)
        """Steps without progress after which a system counts as stuck (L2): two whole recomputations."""
        self.work = 0
        self.extra = 0
        """Work that preemptions and abandoned steps have added so far."""
        self.steps = 0
        self.counted_steps = 0
        self.heads = 0
        self.quiet_steps = 0
        self.quiet_bound = 0
        self.progress = 0
        self.without_progress = 0
        self.instant_ns = -1
        self.steps_at_instant = 0
        self.unplanned_submission = False

    def remaining(self, live: Live) -> int:
        """Rows that the request still needs."""
        admission = live.admission
        if live.state == "waiting" or admission is None:
            return -(-live.known // self.chunk) + live.last - live.known
        done = self.ledger.computed(admission)
        if done < admission.feed:
            return -(-(admission.feed - done) // self.chunk) + live.last - admission.feed
        return live.last - done

    def _disturbed(self) -> None:
        self.quiet_steps = 0
        self.quiet_bound = self.work

    def submitted(self, live: Live) -> None:
        """More work; the newcomer waits at most for all of it."""
        self.work += self.remaining(live)
        self._waits(live)
        self.unplanned_submission = True
        self._disturbed()

    def _waits(self, live: Live) -> None:
        live.waits_since_step, live.wait_bound, live.extra_at = self.steps, self.work, self.extra

    def retired(self, live: Live) -> None:
        """What is left of an ended or cancelled request falls away."""
        self.work -= self.remaining(live)
        self._progressed()
        self._disturbed()

    def preempted(self, live: Live) -> None:
        """Called before the ledger follows: the victim starts over (L4: not twice without progress anywhere)."""
        self.findings.counts["L4"].add(1, 1 if live.progress_at >= 0 else 0)
        if live.progress_at == self.progress:
            self.findings.breach(
                "L4",
                f"request {live.id} was preempted again before any request had made progress",
                requests=(live.id,),
                expected="progress between two preemptions",
                found="none",
            )
        live.progress_at = self.progress
        known = self.ledger.known_tokens(live)
        added = -(-known // self.chunk) + live.last - known - self.remaining(live)
        self.work += added
        self.extra += added
        self._waits(live)
        self._disturbed()

    def abandoned(self, flight: Flight) -> None:
        """A step's rows have to run again."""
        rows = flight.plan.num_rows
        self.work += rows
        self.extra += rows
        self.without_progress = max(0, self.without_progress - 1)
        self._disturbed()

    def _progressed(self) -> None:
        self.progress += 1
        self.without_progress = 0

    def planned(self, rows: int, *, progress: bool) -> None:
        """A step with `rows` rows was planned; `progress`: some request is further than it ever was."""
        findings = self.findings
        self.unplanned_submission = False
        self.steps += 1
        self.quiet_steps += 1
        self.work -= rows
        if progress:
            self._progressed()
        else:
            self.without_progress += 1
        if self.quiet_steps > self.quiet_bound:
            findings.breach(
                "L1",
                f"{self.quiet_steps} steps were planned since the last submission, end or preemption, and the work left"
                f" then was {self.quiet_bound} rows",
                requests=sorted(self.ledger.live),
                expected=f"at most {self.quiet_bound} steps",
                found=f"{self.quiet_steps} steps",
            )
            self._disturbed()
        if self.without_progress > self.window:
            findings.breach(
                "L2",
                f"in {self.without_progress} steps no request got further than it had been before",
                requests=sorted(self.ledger.live),
                expected=f"progress within {self.window} steps",
                found="none",
            )
            self.without_progress = 0
        if self.ledger.waiting and self.ledger.policy.admission == "fcfs":
            self._judge_head(self.ledger.waiting[0])
        self._judge_clock()

    def settle_counts(self) -> None:
        """Move the bulk counters into the counters."""
        new = self.steps - self.counted_steps
        for name in ("L1", "L2", "L5"):
            self.findings.counts[name].add(new, new)
        self.findings.counts["L3"].add(self.heads, self.heads)
        self.counted_steps, self.heads = self.steps, 0

    def _judge_head(self, head: Live) -> None:
        age = self.steps - head.waits_since_step
        bound = head.wait_bound + self.extra - head.extra_at
        self.heads += 1
        if age > bound:
            self.findings.breach(
                "L3",
                f"request {head.id} has waited {age} steps, more than the {bound} rows of work that were ahead of it",
                requests=(head.id,),
                expected=f"admitted within {bound} steps",
                found=f"waits since {age} steps",
            )
            self._waits(head)

    def _judge_clock(self) -> None:
        now, limit = self.findings.time_ns, MAX_STEPS_AT_ONE_INSTANT + self.ledger.policy.lag
        if now != self.instant_ns:
            if now < self.instant_ns:
                self.findings.breach(
                    "L5",
                    f"time went back from {self.instant_ns} ns to {now} ns",
                    expected=f"at least {self.instant_ns} ns",
                    found=f"{now} ns",
                )
            self.instant_ns = now
            self.steps_at_instant = 0
        self.steps_at_instant += 1
        if self.steps_at_instant > limit:
            self.findings.breach(
                "L5",
                f"{self.steps_at_instant} steps were planned at {now} ns: virtual time stands still",
                expected=f"at most {limit} steps at one instant",
                found=f"{self.steps_at_instant} steps",
            )
            self.steps_at_instant = 0

    def finished(self, pending: Mapping[int, str]) -> None:
        """The end of the run: nobody is left, and the core says so too."""
        live = self.ledger.live
        self.findings.counts["L6"].add(1, 1 if self.ledger.submissions else 0)
        if live:
            whys = [
                f"request {request} is {left.state} at the end of the run:"
                f" {pending.get(request, 'the core does not list it as pending')}"
                for request, left in live.items()
            ]
            self.findings.breach(
                "L6",
                _some(whys),
                requests=sorted(live),
                expected="everybody ended or cancelled",
                found={request: left.state for request, left in live.items()},
            )
        ghosts = [r for r in pending if r not in live]
        if ghosts:
            self.findings.breach(
                "L6",
                f"the core still waits for request {ghosts[0]} ({pending[ghosts[0]]}),"
                f" which is {self.ledger.how_gone(ghosts[0])}",
                requests=ghosts,
                expected="nothing pending",
                found=pending,
            )
        stuck = [r for r, left in live.items() if left.admission is not None]
        if stuck:
            self.findings.breach(
                "L1",
                _some([f"request {request} was admitted and never ended" for request in stuck]),
                requests=stuck,
                expected="ended within its bound",
                found=live[stuck[0]].state,
            )
        if live and self.unplanned_submission:
            self.findings.breach(
                "L5",
                "the run ended with requests submitted after the last plan: the wake-up was lost",
                requests=sorted(live),
                expected="a plan after each submission",
                found="no plan",
            )


def _some(whys: list[str]) -> str:
    """As many as fit into a sentence."""
    shown = "; ".join(whys[:MOST_NAMED])
    return shown if len(whys) <= MOST_NAMED else f"{shown}; and {len(whys) - MOST_NAMED} more"
