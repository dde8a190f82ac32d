"""The simulation: arrivals, steps, cancels and faults on one integer clock, around the real core and backend.

    arrivals ----submit----> core <----cancel---- faults
                              |
    plan up to lag + 1 steps -+-> backend.execute -> ... oldest step's duration passes -> apply -> plan again

There is one event per step and per arrival, never one per token. A step's duration starts when the device is free: with
lag, the next step is already dispatched by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import simpy

from backends.protocol import Backend, Pending
from invariants.auditor import Auditor
from paged_attention.plan import CoreSnapshot, Effect, StepPlan
from sim.clock import Moment, Order
from sim.cores.checked import CoreFormError, raised
from sim.cores.protocol import ServingCore
from sim.cost_model import CostModel
from sim.disturbances import Disturber
from sim.faults import FaultSchedule
from sim.observer import Observer
from sim.part_calls import PartError, ask
from sim.record import Recorder
from sim.script import RequestScript
from sim.workload.arrival import Arrival, Workload

PROGRESS_EVERY_STEPS = 64

Happenings = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    steps: int
    submitted: int
    done: int
    """Requests finished, cancelled or rejected."""
    total: int | None
    """Requests to come in all, where that is known."""
    now_ns: int


@dataclass(frozen=True, slots=True)
class Parts:
    """What a simulation is made of."""

    core: ServingCore
    backend: Backend
    script: RequestScript
    cost: CostModel
    workload: Workload
    faults: FaultSchedule
    recorder: Recorder
    auditor: Auditor | None = None
    observers: Sequence[Observer] = ()


class _Flight(NamedTuple):
    plan: StepPlan
    pending: Pending
    duration_ns: int


class Engine:
    """Runs one simulation to its end: nothing left to arrive, to cancel or to do, or the first violation."""

    def __init__(
        self,
        parts: Parts,
        *,
        stop_at_first: bool = True,
        audit_device: bool = True,
        progress: Callable[[Progress], None] | None = None,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        """`progress` is called now and then; `checkpoint` before every plan: what it raises ends the run."""
        self._parts = parts
        self._core = parts.core
        self._backend = parts.backend
        self._recorder = parts.recorder
        self._auditor = parts.auditor
        self._audited_device = parts.backend if audit_device else None
        self._violations = parts.auditor.violations if parts.auditor is not None else []
        self._observers = parts.observers
        self._stop_at_first = stop_at_first
        self._progress = progress
        self._checkpoint = checkpoint
        self._env = simpy.Environment()
        self._depth = parts.core.policy.lag + 1
        self._flights: deque[_Flight] = deque()
        self._num_plans = 0
        self._failed_ns = 0
        """Time that a failed step still has to take before the next plan."""
        self._disturber = Disturber(parts.faults, parts.recorder, parts.auditor)
        self._arrivals: Iterator[Arrival] = iter(parts.workload)
        self._due_steps = deque(parts.workload.at_steps or ())
        self._unfinished = 0
        self._sources = 0
        """Processes that can still bring work: while there are any, an idle engine sleeps instead of ending."""
        self._sleeping: Moment | None = None
        self._error: BaseException | None = None

    @property
    def num_plans(self) -> int:
        """Steps planned so far, failed ones included."""
        return self._num_plans

    @property
    def core(self) -> ServingCore:
        """The core that is served; a fork may have taken the place of the one that the run began with."""
        return self._core

    @property
    def now_ns(self) -> int:
        """Simulated time."""
        now: Any = self._env.now
        return now

    def run(self) -> None:
        """Simulate. Whatever a part raises comes out unchanged; what was recorded until then stays."""
        steps = self._env.process(self._guarded(self._steps()))
        if self._parts.workload.at_steps is None and self._parts.workload.concurrency is None:
            self._start(self._open_arrivals())
        self._feed()
        if self._parts.faults.cancels_at_ns:
            self._start(self._timed_cancels())
        self._env.run(until=steps)
        if self._error is not None:
            raise self._error

    def judge_end(self) -> None:
        """Let the auditor judge the run as a whole; only where it ran to its end and did not stop at a violation."""
        if self._stopped():
            return
        pending = ask(self._num_plans, self._core.pending)
        for observer in self._observers:
            observer.ended(self.now_ns, pending)
        if self._auditor is None:
            return
        totals = self._recorder.totals(self.now_ns)
        self._auditor.finished(self.now_ns, pending, self._snapshot, self._audited_device, totals)

    def close(self) -> int:
        """Close what is still open in the record; return the time of the end in ns."""
        self._recorder.close(self.now_ns)
        return self.now_ns

    # Sources of work.

    def _start(self, process: Happenings) -> None:
        self._sources += 1
        self._env.process(self._guarded(self._source(process)))

    def _guarded(self, process: Happenings) -> Happenings:
        """SimPy would raise a copy of an exception; this keeps the original for `run`."""
        try:
            yield from process
        except BaseException as error:
            self._error = self._error or error
            self._wake()

    def _source(self, process: Happenings) -> Happenings:
        yield from process
        self._sources -= 1
        self._wake()

    def _open_arrivals(self) -> Happenings:
        for arrival in self._arrivals:
            if arrival.time_ns > self.now_ns:
                yield Moment(self._env, Order.ARRIVAL).after(arrival.time_ns - self.now_ns)
            self._submit(arrival)
            self._wake()

    def _feed(self) -> None:
        """Closed loop: submit until as many requests are unfinished as the workload keeps in the system."""
        concurrency = self._parts.workload.concurrency
        while concurrency is not None and self._unfinished < concurrency:
            arrival = next(self._arrivals, None)
            if arrival is None:
                return
            self._submit(arrival)

    def _submit_until(self, step: int) -> None:
        """Scripted arrivals: submit those that come before `step` is planned."""
        while self._due_steps and self._due_steps[0] <= step:
            self._due_steps.popleft()
            self._submit(next(self._arrivals))

    def _timed_cancels(self) -> Happenings:
        for at_ns, request in self._parts.faults.cancels_at_ns:
            if at_ns > self.now_ns:
                yield Moment(self._env, Order.CANCEL).after(at_ns - self.now_ns)
            self._cancel(request)
            self._wake()

    def _submit(self, arrival: Arrival) -> None:
        now_ns, refusal = self.now_ns, None
        request = self._parts.script.request(arrival)
        self._disturber.submitted(request)
        try:
            effects = self._core.submit(request)
        except ValueError as error:
            effects, refusal = (), str(error)
        except CoreFormError as error:
            raise PartError(str(error)) from error
        except Exception as error:
            raise PartError(f"submit({request.id}) raised {raised(error, self._core)}") from error
        if refusal is None:
            self._unfinished += 1
            self._recorder.submitted(now_ns, request.id, len(request.prompt), effects)
        else:
            self._recorder.rejected(now_ns, request.id, len(request.prompt), refusal)
        if self._auditor is not None:
            self._auditor.submitted(now_ns, request, effects, refusal)
        for observer in self._observers:
            observer.submitted(now_ns, request, effects, refusal)

    def _cancel(self, request: int) -> None:
        now_ns = self.now_ns
        effects = ask(self._num_plans, self._core.cancel, request)
        self._recorder.cancelled(now_ns, effects)
        if self._auditor is not None:
            self._auditor.cancelled(now_ns, request, effects)
        for observer in self._observers:
            observer.cancelled(now_ns, request, effects)
        self._count_ends(effects)
        self._feed()

    # Steps.

    def _steps(self) -> Happenings:
        while True:
            self._fill()
            if self._stopped():
                return
            if self._flights:
                flight = self._flights.popleft()
                start_ns = self.now_ns
                yield Moment(self._env, Order.STEP_END).after(flight.duration_ns)
                self._complete(flight, start_ns)
            elif self._failed_ns:
                delay_ns, self._failed_ns = self._failed_ns, 0
                yield Moment(self._env, Order.STEP_END).after(delay_ns)
            elif self._sources:
                self._sleeping = Moment(self._env, Order.WAKE)
                yield self._sleeping
            else:
                return

    def _stopped(self) -> bool:
        if self._error is not None:
            return True
        return self._stop_at_first and bool(self._violations)

    def _snapshot(self) -> CoreSnapshot:
        return ask(self._num_plans, self._core.snapshot)

    def _wake(self) -> None:
        if self._sleeping is not None:
            sleeping, self._sleeping = self._sleeping, None
            sleeping.after(0)

    def _fill(self) -> None:
        """Plan and dispatch until `lag + 1` steps are in flight, nothing can run, or a step fails."""
        while len(self._flights) < self._depth and not self._failed_ns and not self._stopped():
            self._checkpoint()
            if self._due_steps:
                self._submit_until(self._num_plans)
            for request in self._parts.faults.take_cancels(self._num_plans):
                self._cancel(request)
            self._core, disturbed = self._disturber.disturb(self._core, self._num_plans, self.now_ns)
            if self._stopped() or ("stall" in disturbed and self._flights):
                return
            plan = ask(self._num_plans, self._core.plan)
            if plan is None and "poll" in disturbed:
                plan = self._disturber.ask_again(self._core, self._num_plans, self.now_ns)
            if plan is None:
                if self._auditor is not None:
                    self._auditor.idle(self.now_ns, self._snapshot)
                for observer in self._observers:
                    observer.idle(self.now_ns)
                # Nothing would ever bring on the step of the next scripted request.
                if not self._flights and self._due_steps:
                    self._submit_until(self._due_steps[0])
                    continue
                return
            self._planned(plan)
            if self._parts.faults.take_failure(self._num_plans, self.now_ns):
                self._abandon(plan)
            elif not self._stopped():
                self._dispatch(plan)
            self._num_plans += 1

    def _planned(self, plan: StepPlan) -> None:
        now_ns, recorder = self.now_ns, self._recorder
        recorder.planned(now_ns, plan)
        if self._auditor is not None:
            self._auditor.planned(now_ns, plan, self._snapshot)
            if not self._stopped():
                # Once a page is owned twice, two counts of owned pages differ too: that would be no finding of its own.
                self._auditor.measured(now_ns, plan.step, recorder.newest_gauges)
        for observer in self._observers:
            observer.planned(now_ns, plan)

    def _dispatch(self, plan: StepPlan) -> None:
        rows = self._parts.script.rows(plan)
        pending = ask(plan.step, self._backend.execute, plan, rows)
        if self._auditor is not None:
            self._auditor.dispatched(self.now_ns, plan, rows, self._audited_device)
        self._flights.append(_Flight(plan, pending, self._parts.cost.duration_ns(plan)))

    def _abandon(self, plan: StepPlan) -> None:
        now_ns = self.now_ns
        effects = ask(plan.step, self._core.abandon, plan.step)
        self._recorder.abandoned(now_ns, plan, effects)
        if self._auditor is not None:
            self._auditor.abandoned(now_ns, plan.step, effects)
        for observer in self._observers:
            observer.abandoned(now_ns, plan, effects)
        # Even a step of no duration must not be planned anew at the same instant for ever.
        self._failed_ns = max(self._parts.cost.duration_ns(plan), 1)

    def _complete(self, flight: _Flight, start_ns: int) -> None:
        now_ns, plan = self.now_ns, flight.plan
        outcome = ask(plan.step, flight.pending.result)
        self._recorder.executed(start_ns, now_ns, outcome)
        if self._auditor is not None:
            self._auditor.executed(now_ns, plan, outcome)
        for observer in self._observers:
            observer.executed(now_ns, plan, outcome)
        effects = ask(plan.step, self._core.apply, outcome)
        self._recorder.applied(now_ns, effects)
        if self._auditor is not None:
            self._auditor.applied(now_ns, plan.step, effects, self._snapshot)
        for observer in self._observers:
            observer.applied(now_ns, plan.step, effects)
        if effects:
            self._count_ends(effects)
            self._feed()
        if self._progress is not None and self._recorder.steps % PROGRESS_EVERY_STEPS == 0:
            self._report()

    def _count_ends(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            if effect.kind in ("ended", "cancelled"):
                self._unfinished -= 1
                if self._auditor is not None:
                    self._auditor.request_done(**self._recorder.times_of(effect.request))

    def _report(self) -> None:
        if self._progress is not None:
            recorder = self._recorder
            live = recorder.count_of_state[0]
            submitted = recorder.num_requests
            total = self._parts.workload.total
            self._progress(Progress(recorder.steps, submitted, submitted - live, total, self.now_ns))
