"""Faults of a scenario, ordered for the engine: what comes before which step or time."""

from __future__ import annotations

from collections.abc import Iterable

from sim.scenario.models import CancelFault, ConcreteFault, Disturbance, ResubmitFault


class FaultSchedule:
    """Cancels, failed steps and disturbances, each taken exactly once.

    Steps are counted from 0 over all plans, failed ones included. A cancel at step k happens before step k is planned;
    a failure at step k lets the plan be made and then never run.
    """

    def __init__(self, faults: Iterable[ConcreteFault]) -> None:
        self.cancels_at_ns: list[tuple[int, int]] = []
        """(time in ns, request), by time; equal times keep the order of the scenario."""
        self._cancels_at_step: dict[int, list[int]] = {}
        self._failing_steps: set[int] = set()
        self._failures_at_ns: list[int] = []
        self._disturbances_at_step: dict[int, list[Disturbance | ResubmitFault]] = {}
        self.resubmitted: set[int] = set()
        """Requests that are submitted twice."""
        self.upset_steps: set[int] = set()
        """Steps before whose plan something is due: cancels or disturbances."""
        for fault in faults:
            if isinstance(fault, CancelFault):
                self._add_cancel(fault)
            elif isinstance(fault, Disturbance | ResubmitFault):
                self._disturbances_at_step.setdefault(fault.at_step, []).append(fault)
                if isinstance(fault, ResubmitFault):
                    self.resubmitted.add(fault.request)
            elif fault.at_step is not None:
                self._failing_steps.add(fault.at_step)
            elif fault.at_ns is not None:
                self._failures_at_ns.append(fault.at_ns)
        self.has_failures = bool(self._failing_steps or self._failures_at_ns)
        self.upset_steps.update(self._cancels_at_step, self._disturbances_at_step)
        self.cancels_at_ns.sort(key=lambda timed: timed[0])
        self._failures_at_ns.sort(reverse=True)

    def _add_cancel(self, fault: CancelFault) -> None:
        if fault.at_step is not None:
            self._cancels_at_step.setdefault(fault.at_step, []).append(fault.request)
        elif fault.at_ns is not None:
            self.cancels_at_ns.append((fault.at_ns, fault.request))

    def take_cancels(self, step: int) -> list[int]:
        """Requests to cancel before `step` is planned."""
        return self._cancels_at_step.pop(step, [])

    def take_disturbances(self, step: int) -> list[Disturbance | ResubmitFault]:
        """What else happens before `step` is planned, in the order of the scenario."""
        return self._disturbances_at_step.pop(step, [])

    def take_failure(self, step: int, now_ns: int) -> bool:
        """Whether the step planned now fails."""
        if step in self._failing_steps:
            self._failing_steps.discard(step)
            return True
        if self._failures_at_ns and self._failures_at_ns[-1] <= now_ns:
            self._failures_at_ns.pop()
            return True
        return False
