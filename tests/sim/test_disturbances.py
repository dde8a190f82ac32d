"""Disturbances: an honest core does the same with them as without, and each of them shows the bug that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from paged_attention.plan import Effect, Request, StepPlan
from sim.build import build_core
from sim.cores.protocol import ServingCore
from sim.mutants.core_wrapper import CoreWrapper
from sim.scenario import Scenario
from sim.search.probe import Finding, probe
from sim.search.swarm import draw

KEPT = {"cancel", "fail"}
FAULTS: list[dict[str, Any]] = [
    {"kind": kind, "at_step": step} for step in range(1, 40, 3) for kind in ("fork", "poll")
] + [{"kind": "resubmit", "request": 0, "at_step": step} for step in range(6)]


def disturbed(scenario: Scenario, faults: list[dict[str, Any]]) -> Scenario:
    data = scenario.model_dump(by_alias=True)
    return Scenario.model_validate({**data, "faults": [f for f in data["faults"] if f["kind"] in KEPT] + faults})


@pytest.mark.parametrize("number", range(6))
def test_forks_looks_and_repeated_requests_change_nothing(number: int) -> None:
    calm, stormy = probe(disturbed(draw(31, number), [])), probe(disturbed(draw(31, number), FAULTS))
    assert (calm.message, stormy.message) == ("", "")
    assert calm.trace_hash == stormy.trace_hash


@pytest.mark.parametrize("number", range(6))
def test_a_host_that_comes_late_breaks_nothing(number: int) -> None:
    scenario = draw(32, number)
    scenario = scenario.model_copy(update={"core": scenario.core.model_copy(update={"lag": 1 + number % 2})})
    late = [{"kind": "stall", "at_step": step} for step in range(0, 60, 1 + number)]
    assert probe(disturbed(scenario, late)).message == ""


class TakesAnyId(CoreWrapper):
    """Accepts a request whose id is in use."""

    def submit(self, request: Request) -> tuple[Effect, ...]:
        if request.id in self.core.pending():
            return (Effect("submitted", request.id, 0),)
        return self.core.submit(request)


class ForgetsSome(CoreWrapper):
    """Leaves those who wait out of `pending`."""

    def pending(self) -> Mapping[int, str]:
        return {request: why for request, why in self.core.pending().items() if "waits" not in why}


class AnswersTheSecondTime(CoreWrapper):
    """Has a plan only for those who ask twice."""

    asked = 0

    def plan(self) -> StepPlan | None:
        self.asked += 1
        return None if self.asked == 4 else self.core.plan()


class SharedFork(CoreWrapper):
    """Its fork is itself."""

    def fork(self) -> ServingCore:
        return self


CROWD = draw(31, 0).model_copy(update={"faults": ()})


def shown(wrapper: type[CoreWrapper], faults: list[dict[str, Any]]) -> Finding:
    data = CROWD.model_dump(by_alias=True)
    data["invariants"] |= {"full_every": 256}
    data["core"] |= {"lag": 1, "batch_size": 1, "mix": "mixed"}
    requests = [{"prompt_tokens": 1, "output_tokens": 8}] * 3
    data["cache"] |= {"page_size": 4, "num_pages": 12, "max_sequence_length": 16}
    data["workload"]["arrivals"] = {"kind": "script", "requests": requests}
    scenario = Scenario.model_validate({**data, "faults": faults})
    return probe(scenario, core=lambda asked: wrapper(build_core(asked)))


@pytest.mark.parametrize(
    ("wrapper", "fault", "broken"),
    [
        (TakesAnyId, {"kind": "resubmit", "request": 2, "at_step": 3}, "S13"),
        (ForgetsSome, {"kind": "poll", "at_step": 3}, "S6"),
        (AnswersTheSecondTime, {"kind": "poll", "at_step": 3}, "S11"),
        (SharedFork, {"kind": "fork", "at_step": 3}, "S2"),
    ],
    ids=["resubmit", "pending", "poll", "fork"],
)
def test_a_disturbance_shows_the_bug_that_nothing_else_shows(
    wrapper: type[CoreWrapper], fault: dict[str, Any], broken: str
) -> None:
    assert shown(wrapper, []).message == ""
    assert shown(wrapper, [fault]).id == broken


def test_the_message_names_the_step_at_which_a_repeated_request_was_taken() -> None:
    finding = shown(TakesAnyId, [{"kind": "resubmit", "request": 2, "at_step": 3}])
    assert "request 2" in finding.message
    assert "unfinished" in finding.message
