"""Turns any scenario into the same one with every request, cancel and failed step spelled out and placed by step."""

from __future__ import annotations

from paged_attention.plan import Effect, Request, StepPlan
from sim.observer import Bystander
from sim.scenario import Scenario
from sim.scenario.models import CancelFault, Disturbance, FailFault, ResubmitFault
from sim.scenario.workload_models import ScriptedArrivals, ScriptedRequest
from sim.script import RequestScript
from sim.search.probe import Finding, probe
from sim.workload import generate, prompt_tokens


def concrete(scenario: Scenario) -> tuple[Scenario, Finding]:
    """The scenario up to its first violation, spelled out, and what the original showed.

    Requests keep their numbers, so that prompts, seeds and tokens stay what they were. A cancel that came while steps
    were in flight comes before the same plan, though between other outcomes.
    """
    tape = _Tape()
    finding = probe(scenario, observers=(tape,))
    script = RequestScript(scenario, prompt_tokens)
    requests = [
        _spelled_out(step, script.request(arrival), script)
        for step, arrival in zip(tape.submitted_before, generate(scenario), strict=False)
    ]
    workload = scenario.workload.model_copy(
        update={
            "arrivals": ScriptedArrivals(kind="script", requests=tuple(requests)),
            "prompt_tokens": None,
            "output_tokens": None,
            "num_requests": None,
            "end_by": "max_tokens",
        }
    )
    disturbances = [f for f in scenario.faults if isinstance(f, Disturbance | ResubmitFault)]
    # Whatever names a request that never came does nothing to the core.
    end = workload.first_request_id + len(requests)
    faults = [f for f in (*tape.faults, *disturbances) if getattr(f, "request", 0) < end]
    data = scenario.model_copy(update={"workload": workload, "faults": tuple(faults)})
    return Scenario.model_validate(data.model_dump(by_alias=True)), finding


def _spelled_out(step: int, request: Request, script: RequestScript) -> ScriptedRequest:
    prompt, eos = len(request.prompt), script.eos_position(request.id)
    return ScriptedRequest(
        at_step=step,
        prompt_tokens=prompt,
        output_tokens=request.max_tokens,
        eos_after=eos - prompt + 1 if eos >= 0 else None,
    )


class _Tape(Bystander):
    """An observer that notes what was done to the core, and how many steps had been planned before."""

    def __init__(self) -> None:
        self._plans = 0
        self.submitted_before: list[int] = []
        self.faults: list[CancelFault | FailFault] = []

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """See Observer."""
        self.submitted_before.append(self._plans)

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self.faults.append(CancelFault(kind="cancel", request=request, at_step=self._plans))

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """See Observer."""
        self._plans += 1

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self.faults.append(FailFault(kind="fail", at_step=self._plans - 1))
