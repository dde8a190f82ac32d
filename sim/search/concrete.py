"""Turns any scenario into the same scenario with every request, cancel and failed step spelled out and placed by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paged_attention.plan import Effect, Request, StepOutcome, StepPlan
from sim.scenario import Scenario
from sim.scenario.models import CancelFault, FailFault
from sim.scenario.workload_models import ScriptedArrivals, ScriptedRequest, WorkloadSettings
from sim.script import RequestScript
from sim.search.probe import probe


class _Tape:
    """An observer that notes what was done to the core, and before which step."""

    def __init__(self, scenario: Scenario) -> None:
        self._steps = 0
        self._scenario = scenario
        self.requests: list[tuple[int, Request]] = []
        self.faults: list[CancelFault | FailFault] = []

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        self.requests.append((self._steps, request))

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        self.faults.append(CancelFault(kind="cancel", request=request, at_step=self._steps))

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        self._steps += 1

    def idle(self, now_ns: int) -> None:
        pass

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        pass

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        pass

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        self.faults.append(FailFault(kind="fail", at_step=self._steps - 1))

    def ended(self, now_ns: int, pending: Mapping[int, str]) -> None:
        pass
