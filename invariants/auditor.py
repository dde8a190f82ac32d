"""The outside observer: it is told what happened, keeps its own books, and says what does not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from invariants.catalogue import select
from invariants.decoder_oracle import DecoderOracle
from invariants.device import Device
from invariants.device_turns import DeviceJudge
from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.lifecycle import LifeJudge
from invariants.liveness import LivenessJudge
from invariants.metrics import GAUGES, MetricJudge, Said, Totals
from invariants.outputs import OutputJudge
from invariants.pages import PageJudge
from invariants.rows import ROW_FAMILY, RowJudge
from invariants.schedule import ScheduleJudge
from invariants.snapshots import SnapshotJudge
from invariants.tables import TableJudge
from invariants.violation import Violation
from paged_attention.plan import (
    CoreSnapshot,
    DeclaredPolicy,
    Effect,
    ModelRows,
    Request,
    StepOutcome,
    StepPlan,
)

__all__ = ["GAUGES", "AuditConfig", "Auditor", "Device", "Totals"]

Snapshot = Callable[[], CoreSnapshot] | None

SEEDS_EVERY = 16
"""The seeds of a step's neutral rows are compared each n-th step."""


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """How much is checked. The books are kept at every event whatever these say.

    `every`: rows are judged each n-th step; `full_every`: snapshots and the pool each n-th step; `device_every`:
    K/V places each n-th dispatched step; `only`: these ids and no others (None: all active ones).
    """

    every: int = 1
    full_every: int = 256
    device_every: int = 1
    only: frozenset[str] | None = None
    max_violations: int = 100


class Auditor:
    """Judges a serving core and its device from values alone.

    Call order for a step: `planned` directly after `core.plan()`, `dispatched` directly after `backend.execute`
    (nothing in between), later `executed` and `applied` around `core.apply`, or `abandoned` in place of these three.
    `vocab_size` None: tokens are the core's own business (plan logs of foreign engines), O1 is off. `oracle` is given
    where the model is a decoder: tokens, logits and K/V words are then its, and no scripted ones.
    """

    def __init__(
        self,
        policy: DeclaredPolicy,
        config: AuditConfig,
        vocab_size: int | None,
        oracle: DecoderOracle | None = None,
    ) -> None:
        # O1 needs the model, O2 one with logits.
        on = select(config.only, "always") - (frozenset({"O1"}) if vocab_size is None else frozenset[str]())
        on -= frozenset({"O2"}) if oracle is None else frozenset[str]()
        self.config = config
        self._findings = findings = Findings(on, config.max_violations)
        self._ledger = ledger = Ledger(policy, vocab_size, oracle)
        self._pages = PageJudge(ledger, findings)
        self._outputs = OutputJudge(ledger, findings)
        self._liveness = LivenessJudge(ledger, findings)
        self._metrics = MetricJudge(ledger, findings)
        self._life = LifeJudge(ledger, findings, self._pages, self._outputs, self._liveness, self._metrics)
        self._tables = TableJudge(ledger, findings)
        self._rows = RowJudge(ledger, findings, self._tables, self._pages)
        self._schedule = ScheduleJudge(ledger, findings, self._life)
        self._snapshots = SnapshotJudge(ledger, findings, self._tables)
        self._device = DeviceJudge(
            ledger, findings, self._tables, self._life, full_every=config.full_every, every=config.device_every
        )
        self._rows_on = findings.any_on((*ROW_FAMILY, "R1", "R2"))
        self._planned = 0
        self._blocked = -1
        self.violations: list[Violation] = findings.violations
        """What was found so far, oldest first; at most `max_violations`."""
        self._whole = False
        """The run came to its own end."""

    def counters(self) -> dict[str, dict[str, int]]:
        """For each invariant that is on: how often it was checked, non-trivially checked, and violated."""
        for judge in (
            self._life,
            self._rows,
            self._outputs,
            self._pages,
            self._liveness,
            self._metrics,
            self._device.contents,
        ):
            judge.settle_counts()
        return self._findings.counters()

    # ---- requests come and go

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """A request was handed to the core; `refusal` is the text of its ValueError."""
        self._findings.time_ns = now_ns
        self._metrics.arrived += 1
        self._metrics.rejected += refusal is not None
        self._life.submit(now_ns, request, effects, refusal)

    def resubmitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """An unfinished request was handed to the core once more; it is no arrival."""
        self._findings.time_ns = now_ns
        self._life.submit(now_ns, request, effects, refusal)

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """The core was told to drop a request."""
        self._findings.time_ns = now_ns
        self._life.cancel(request, effects)
        self._pages.settled(fences=False)

    # ---- a step

    def planned(self, now_ns: int, plan: StepPlan, snapshot: Snapshot) -> None:
        """The core planned a step; its effects happened before its rows."""
        findings, life, rows = self._findings, self._life, self._rows
        findings.step, findings.time_ns = plan.step, now_ns
        life.begin_plan()
        if plan.effects:
            life.follow(plan.effects, "plan")
            if self._pages.due:
                self._pages.settled(fences=False)
        self._metrics.planned_tokens += len(plan.tokens)
        if not self._schedule.well_formed(plan):
            return  # Its rows cannot be read: nothing can be followed until the next step.
        nth, self._planned = self._planned, self._planned + 1
        flight, progress = rows.follow(plan, judge=self._rows_on and nth % self.config.every == 0)
        self._ledger.flights[plan.step] = flight
        if life.granted or rows.in_step is not None:
            self._judge_sizes(plan.step)
        self._schedule.judge(plan, flight.first, rows.in_step)
        self._liveness.planned(len(plan.request), progress=progress)
        blocked, before = self._schedule.blocked, self._blocked
        self._blocked = blocked
        failed = bool(life.preempted) or blocked not in (-1, before)
        if snapshot is not None and (failed or nth % self.config.full_every == 0):
            self._snapshots.judge(snapshot(), after_failure=failed)

    def _judge_sizes(self, step: int) -> None:
        """P6 also for those that have no row in this step: whoever was given pages, and decodes that were left out."""
        ledger, in_step = self._ledger, self._rows.in_step
        rest = [a for live, a in self._life.granted if live.prefill_step != step]
        if in_step is not None:
            left_out = (ledger.occupant[s] for s in ledger.running.tolist() if s not in in_step)
            rest += [x.admission for x in left_out if x is not None and x.admission is not None]
        for admission in rest:
            if not admission.released:
                self._tables.judge_size(admission, ledger.computed(admission), None, f"after step {step}")

    def idle(self, now_ns: int, snapshot: Snapshot) -> None:
        """`core.plan()` gave None. With nothing in flight, nothing may be left that could run (S11)."""
        findings, ledger = self._findings, self._ledger
        findings.time_ns = now_ns
        if ledger.flights:
            if snapshot is not None and self.config.full_every == 1:
                self._snapshots.judge(snapshot(), after_failure=True)
            return
        self._liveness.unplanned_submission = False
        findings.counts["S11"].add(1, 1)
        if ledger.live:
            states = {request: live.state for request, live in ledger.live.items()}
            findings.breach(
                "S11",
                f"the core has nothing to run while nothing is in flight, but request {next(iter(states))} is"
                f" {next(iter(states.values()))}",
                requests=states,
                expected="a plan as long as a request is live",
                found=f"no plan; {states}",
            )
        if snapshot is not None:
            self._snapshots.judge(snapshot(), after_failure=True)

    def polled(self, now_ns: int, pending: Mapping[int, str], snapshot: CoreSnapshot) -> None:
        """Somebody looked at the core between two calls: it names exactly those who are unfinished (S6)."""
        self._findings.time_ns = now_ns
        self._snapshots.judge_pending(pending)
        self._snapshots.judge(snapshot, after_failure=False)

    def asked_again(self, now_ns: int, plan: StepPlan | None) -> None:
        """`core.plan()` gave None, and was called again with nothing in between."""
        self._findings.time_ns = now_ns
        self._findings.counts["S11"].add(1, 1)
        if plan is not None:
            self._findings.breach(
                "S11",
                f"the core had nothing to run, and then step {plan.step}, though nothing happened in between",
                requests=sorted(set(plan.request.tolist())),
                expected="no plan",
                found=f"a plan of {plan.num_rows} rows",
            )

    def dispatched(self, now_ns: int, plan: StepPlan, rows: ModelRows | None, device: Device | None) -> None:
        """The step was handed to the device and no later one was: K/V is judged in program order."""
        self._findings.step, self._findings.time_ns = plan.step, now_ns
        flight = self._ledger.flights.get(plan.step)
        if flight is None:
            return
        if rows is not None:
            for row, live, _, _, _ in flight.prefills if self._ledger.oracle is None else ():
                self._ledger.learn_eos(live, rows.eos_position.item(row))
            if plan.step % SEEDS_EVERY == 0 or self.config.full_every == 1:
                self._device.inputs.judge_seeds(flight, rows)
        if device is not None:
            self._device.dispatched(flight, device)

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """The outcome of a step reached the host; the core has not seen it yet."""
        self._findings.step, self._findings.time_ns = plan.step, now_ns
        flight = self._ledger.flights.get(plan.step)
        if flight is not None:
            self._outputs.executed(flight, outcome)
            self._metrics.completed(flight)

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...], snapshot: Snapshot) -> None:
        """The core took in the outcome of a step."""
        self._findings.step, self._findings.time_ns = step, now_ns
        flight = self._ledger.flights.pop(step, None)
        if flight is None:
            self._life.follow(effects, "apply")
            return
        for row, live, admission, _, _ in flight.prefills:
            if flight.plan.samples.item(row):
                live.sampled_admission = admission.number
                if live.first_token_ns is None:
                    self._metrics.first_token(live, now_ns)
        if flight.draining or flight.eos:
            self._outputs.begin_apply(flight)
        if flight.eos or self._pages.next_due:
            self._pages.begin_apply(flight.eos)
        if effects:
            self._life.follow(effects, "apply")
        if self._outputs.due:
            self._outputs.end_apply()
        if self._pages.due or self._ledger.pool.fences:
            self._pages.settled(fences=True)
        # With full checks in every step the state is seen before and after; else a plan's snapshot shows the same.
        if snapshot is not None and self.config.full_every == 1:
            self._snapshots.judge(snapshot(), after_failure=False)

    def abandoned(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """The newest plan never ran and was taken back."""
        self._findings.step, self._findings.time_ns = step, now_ns
        flight = self._ledger.flights.pop(step, None)
        if flight is not None:
            self._rows.take_back(flight)
            self._metrics.planned_tokens -= flight.plan.num_tokens
            self._liveness.abandoned(flight)
            self._schedule.abandoned()
        self._life.follow(effects, "abandon")
        self._pages.settled(fences=True)

    # ---- what the recorder says

    def measured(self, now_ns: int, step: int, gauges: tuple[int, ...]) -> None:
        """What the recorder wrote down of the step just planned: `metrics.GAUGES`, in their order (M3, M6, M7)."""
        self._findings.step, self._findings.time_ns = step, now_ns
        flight = self._ledger.flights.get(step)
        if flight is None:
            return
        self._metrics.measured(gauges, flight, len(self._life.preempted))
        if (self._planned - 1) % self.config.full_every == 0:
            self._metrics.judge_waste()

    def request_done(
        self,
        *,
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
        self._metrics.request_done(
            Said(arrival_ns, admitted_ns, first_token_ns, finish_ns, output_tokens), request, itl_sum_ns
        )

    def finished(
        self,
        now_ns: int,
        pending: Mapping[int, str],
        snapshot: Snapshot,
        device: Device | None,
        totals: Totals,
    ) -> None:
        """The run is over: everything must be back where it was (P12, L6, M1, M2, M5, M8, K2 over the whole pool)."""
        self._findings.time_ns = now_ns
        self._liveness.finished(pending)
        if snapshot is not None:
            last = snapshot()
            self._snapshots.judge(last, after_failure=False)
            if not self._ledger.live:
                self._snapshots.judge_empty(last)
        if device is not None:
            self._device.finished(device)
        self._metrics.judge_totals(totals)
        self._whole = True

    def summarised(self, figures: Mapping[str, Mapping[str, float | int | None]]) -> None:
        """What the summary quotes (M4), by latency: `count` and `mean` in s; nothing where the run was cut short."""
        if self._whole:
            self._metrics.summarised(figures)
