"""The simulation: arrivals, steps, cancels and faults on one integer clock, around the real core and backend.

    arrivals ----submit----> core <----cancel---- faults
                              |
    plan up to lag + 1 steps -+-> backend.execute -> ... oldest step's duration passes -> apply -> plan again

There is one event per step and per arrival, never one per token. A step's duration starts when the device is free: with
lag, the next step is already dispatched by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import simpy

from backends.protocol import Pending
from paged_attention.plan import CoreSnapshot, Effect, StepPlan
from sim.clock import Moment, Order
from sim.cores.checked import CoreFormError, raised
from sim.cores.protocol import ServingCore
from sim.device_reads import DeviceReads
from sim.disturbances import Disturber
from sim.hang import HangError, HangWatch
from sim.observer import listeners
from sim.part_calls import PartError, ask, part_error
from sim.parts import Parts, Progress
from sim.workload.arrival import Arrival

PROGRESS_EVERY_STEPS = 64


class Engine:
    """Runs one simulation to its end: nothing left to arrive, to cancel or to do, or the first violation."""

    def __init__(
        self,
        parts: Parts,
        *,
        stop_at_first: bool = True,
        audit_device: bool = True,
        hang_seconds: float = 0.0,
        progress: Callable[[Progress], None] | None = None,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        """`progress` is called now and then; `checkpoint` before every plan: what it raises ends the run.

        A call of the core that takes longer than `hang_seconds` (wall time; 0: any) ends it with a PartError.
        """
        self._core = parts.core
        self._backend = parts.backend
        self._script = parts.script
        self._cost = parts.cost
        self._faults = parts.faults
        self._recorder = parts.recorder
        self._auditor = parts.auditor
        self._audited_device = DeviceReads(parts.backend, lambda: self._num_plans) if audit_device else None
        self._fatal = parts.auditor.violations if parts.auditor is not None and stop_at_first else ()
        """Violations that end the run."""
        self._on_submitted = listeners(parts.observers, "submitted")
        self._on_cancelled = listeners(parts.observers, "cancelled")
        self._on_planned = listeners(parts.observers, "planned")
        self._on_idle = listeners(parts.observers, "idle")
        self._on_executed = listeners(parts.observers, "executed")
        self._on_applied = listeners(parts.observers, "applied")
        self._on_abandoned = listeners(parts.observers, "abandoned")
        self._on_ended = listeners(parts.observers, "ended")
        self._hang_seconds = hang_seconds
        self._progress = progress
        self._checkpoint = checkpoint
        self._env = simpy.Environment()
        self.now_ns = 0
        """Simulated time."""
        self._step_end = Moment(self._env, Order.STEP_END, self._step_ends)
        self._failure_end = Moment(self._env, Order.STEP_END, self._resume)
        self._wake_up = Moment(self._env, Order.WAKE, self._resume)
        self._over = self._env.event()
        self._depth = parts.core.policy.lag + 1
        self._flights: deque[tuple[StepPlan, Pending, int]] = deque()
        """Plan, pending outcome and duration in ns of each step in flight, oldest first."""
        self._started_ns = 0
        """When the oldest step in flight began to run."""
        self._num_plans = 0
        self._failed_ns = 0
        """Time that a failed step still has to take before the next plan."""
        self._disturber = Disturber(parts.faults, parts.recorder, parts.auditor)
        workload = parts.workload
        self._arrivals: Iterator[Arrival] = iter(workload)
        self._due_steps = deque(workload.at_steps or ())
        self._is_open = workload.at_steps is None and workload.concurrency is None
        self._concurrency = workload.concurrency
        self._total = workload.total
        self._unfinished = 0
        self._sources = 0
        """Those that can still bring work: while there are any, an idle engine sleeps instead of ending."""
        self._sleeping = False

    @property
    def num_plans(self) -> int:
        """Steps planned so far, failed ones included."""
        return self._num_plans

    @property
    def core(self) -> ServingCore:
        """The core that is served; a fork may have taken the place of the one that the run began with."""
        return self._core

    def run(self) -> None:
        """Simulate. Whatever a part raises comes out unchanged; what was recorded until then stays."""
        sources: list[Callable[[], None]] = []
        if self._is_open:
            sources.append(self._source(Order.ARRIVAL, self._open_arrivals()))
        if self._faults.cancels_at_ns:
            sources.append(self._source(Order.CANCEL, self._timed_cancels()))
        with self._watched():
            self._feed()
            self._go_on()
            for begin in sources:
                begin()
            self._env.run(until=self._over)

    def judge_end(self) -> None:
        """Let the auditor judge the run as a whole; only where it ran to its end and did not stop at a violation."""
        if self._fatal:
            return
        with self._watched():
            pending = ask(self._num_plans, self._core.pending)
            for ended in self._on_ended:
                ended(self.now_ns, pending)
            if self._auditor is not None:
                totals = self._recorder.totals(self.now_ns)
                self._auditor.finished(self.now_ns, pending, self._snapshot, self._audited_device, totals)

    @contextmanager
    def _watched(self) -> Generator[None]:
        """PartError: a call of the core did not return."""
        try:
            with HangWatch(self._hang_seconds):
                yield
        except HangError as error:
            raise PartError(f"step {self._num_plans}: {error}") from error

    def close(self) -> int:
        """Close what is still open in the record; return the time of the end in ns."""
        self._recorder.close(self.now_ns)
        return self.now_ns

    # Sources of work.

    def _source(self, order: Order, times_ns: Iterator[int]) -> Callable[[], None]:
        """Begins a source of work; it goes on at each time that it yields, until it ends."""

        def go_on(_: simpy.Event | None = None) -> None:
            now: Any = self._env.now
            self.now_ns = now
            for time_ns in times_ns:
                moment.after(time_ns - self.now_ns)
                return
            self._sources -= 1
            self._wake()

        moment = Moment(self._env, order, go_on)
        self._sources += 1
        return go_on

    def _open_arrivals(self) -> Iterator[int]:
        for arrival in self._arrivals:
            if arrival.time_ns > self.now_ns:
                yield arrival.time_ns
            self._submit(arrival)
            self._wake()

    def _feed(self) -> None:
        """Closed loop: submit until as many requests are unfinished as the workload keeps in the system."""
        while self._concurrency is not None and self._unfinished < self._concurrency:
            arrival = next(self._arrivals, None)
            if arrival is None:
                return
            self._submit(arrival)

    def _submit_until(self, step: int) -> None:
        """Scripted arrivals: submit those that come before `step` is planned."""
        while self._due_steps and self._due_steps[0] <= step:
            self._due_steps.popleft()
            self._submit(next(self._arrivals))

    def _timed_cancels(self) -> Iterator[int]:
        for at_ns, request in self._faults.cancels_at_ns:
            if at_ns > self.now_ns:
                yield at_ns
            self._cancel(request)
            self._wake()

    def _submit(self, arrival: Arrival) -> None:
        now_ns, refusal = self.now_ns, None
        request = self._script.request(arrival)
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
        for submitted in self._on_submitted:
            submitted(now_ns, request, effects, refusal)

    def _cancel(self, request: int) -> None:
        now_ns = self.now_ns
        effects = ask(self._num_plans, self._core.cancel, request)
        self._recorder.cancelled(now_ns, effects)
        if self._auditor is not None:
            self._auditor.cancelled(now_ns, request, effects)
        for cancelled in self._on_cancelled:
            cancelled(now_ns, request, effects)
        self._count_ends(effects)
        self._feed()

    # Steps.

    def _step_ends(self, event: simpy.Event) -> None:
        """The oldest step in flight has ended."""
        auditor, recorder = self._auditor, self._recorder
        now: Any = self._env.now
        self.now_ns = now_ns = now
        plan, pending, _ = self._flights.popleft()
        try:
            outcome = pending.result()
        except Exception as error:
            raise part_error(plan.step, pending.result, error) from error
        recorder.executed(self._started_ns, now_ns, outcome)
        if auditor is not None:
            auditor.executed(now_ns, plan, outcome)
        for executed in self._on_executed:
            executed(now_ns, plan, outcome)
        try:
            effects = self._core.apply(outcome)
        except Exception as error:
            raise part_error(plan.step, self._core.apply, error) from error
        recorder.applied(now_ns, effects)
        if auditor is not None:
            auditor.applied(now_ns, plan.step, effects, self._snapshot)
        for applied in self._on_applied:
            applied(now_ns, plan.step, effects)
        if effects:
            self._count_ends(effects)
            self._feed()
        if self._progress is not None and recorder.steps % PROGRESS_EVERY_STEPS == 0:
            self._report()
        self._go_on()

    def _resume(self, _: simpy.Event) -> None:
        now: Any = self._env.now
        self.now_ns = now
        self._go_on()

    def _go_on(self) -> None:
        """Plan what can be planned, then wait for a step to end or for work; with neither to come, the run ends."""
        self._fill()
        if self._fatal:
            self._over.succeed()
        elif self._flights:
            self._started_ns = self.now_ns
            self._step_end.after(self._flights[0][2])
        elif self._failed_ns:
            delay_ns, self._failed_ns = self._failed_ns, 0
            self._failure_end.after(delay_ns)
        elif self._sources:
            self._sleeping = True
        else:
            self._over.succeed()

    def _snapshot(self) -> CoreSnapshot:
        return ask(self._num_plans, self._core.snapshot)

    def _wake(self) -> None:
        if self._sleeping:
            self._sleeping = False
            self._wake_up.after(0)

    def _fill(self) -> None:
        """Plan and dispatch until `lag + 1` steps are in flight, nothing can run, or a step fails."""
        while len(self._flights) < self._depth and not self._failed_ns and not self._fatal:
            self._checkpoint()
            step, disturbed = self._num_plans, None
            if self._due_steps:
                self._submit_until(step)
            if step in self._faults.upset_steps:
                disturbed = self._upset()
                if "stall" in disturbed and self._flights:
                    return
            if self._fatal:
                return
            try:
                plan = self._core.plan()
            except Exception as error:
                raise part_error(step, self._core.plan, error) from error
            if plan is None and disturbed and "poll" in disturbed:
                plan = self._disturber.ask_again(self._core, step, self.now_ns)
            if plan is not None:
                self._planned(plan)
            elif not self._idle():
                return

    def _upset(self) -> frozenset[str]:
        """Cancel and disturb what is due before the next plan: the kinds of the disturbances."""
        for request in self._faults.take_cancels(self._num_plans):
            self._cancel(request)
        self._core, disturbed = self._disturber.disturb(self._core, self._num_plans, self.now_ns)
        return disturbed

    def _idle(self) -> bool:
        """The core has nothing to run. Whether there is somebody who would never come if nobody asked again."""
        if self._auditor is not None:
            self._auditor.idle(self.now_ns, self._snapshot)
        for idle in self._on_idle:
            idle(self.now_ns)
        # Nothing would ever bring on the step of the next scripted request.
        if self._flights or not self._due_steps:
            return False
        self._submit_until(self._due_steps[0])
        return True

    def _planned(self, plan: StepPlan) -> None:
        now_ns, auditor = self.now_ns, self._auditor
        gauges = self._recorder.planned(now_ns, plan)
        if auditor is not None:
            auditor.planned(now_ns, plan, self._snapshot)
            if not self._fatal:
                # Once a page is owned twice, two counts of owned pages differ too: that would be no finding of its own.
                auditor.measured(now_ns, plan.step, gauges)
        for planned in self._on_planned:
            planned(now_ns, plan)
        if self._faults.has_failures and self._faults.take_failure(self._num_plans, now_ns):
            self._abandon(plan)
        elif not self._fatal:
            self._dispatch(plan)
        self._num_plans += 1

    def _dispatch(self, plan: StepPlan) -> None:
        rows = self._script.rows(plan)
        try:
            pending = self._backend.execute(plan, rows)
        except Exception as error:
            raise part_error(plan.step, self._backend.execute, error) from error
        if self._auditor is not None:
            self._auditor.dispatched(self.now_ns, plan, rows, self._audited_device)
        self._flights.append((plan, pending, self._cost.duration_ns(plan)))

    def _abandon(self, plan: StepPlan) -> None:
        now_ns = self.now_ns
        effects = ask(plan.step, self._core.abandon, plan.step)
        self._recorder.abandoned(now_ns, plan, effects)
        if self._auditor is not None:
            self._auditor.abandoned(now_ns, plan.step, effects)
        for abandoned in self._on_abandoned:
            abandoned(now_ns, plan, effects)
        # Even a step of no duration must not be planned anew at the same instant for ever.
        self._failed_ns = max(self._cost.duration_ns(plan), 1)

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
            self._progress(Progress(recorder.steps, submitted, submitted - live, self._total, self.now_ns))
