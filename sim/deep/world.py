"""What a relation may change: everything about a run, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeGuard

from sim.mutants import Mutant
from sim.scenario import Scenario
from sim.scenario.models import CancelFault, ConcreteFault, FailFault
from sim.workload import Arrival, Workload, concrete_faults, generate

MAX_REQUESTS: Final = 200
MAX_TOKENS: Final = 30_000
"""Prompt and output tokens of all requests together: a deep check plays the same requests a dozen times and more."""

MIN_REQUESTS: Final = 8
"""So many are played however long they are."""

Fault = CancelFault | FailFault
How = Literal["nan", "big"]


@dataclass(frozen=True, slots=True)
class Poison:
    """What is overwritten, and with what."""

    how: How
    where: Literal["free pages", "dummy page"]
    """`free pages`: the dummy too; whoever is given a page then finds poison in it, up to its very tail."""

    def __str__(self) -> str:
        return f"{'NaN' if self.how == 'nan' else 'a large finite value'} in the {self.where}"


@dataclass(frozen=True, slots=True)
class World:
    """One run: who comes when, what they are served by, and what else is done to it."""

    scenario: Scenario
    """Sizes, policy, backend and model."""
    script: Scenario
    """Whose requests they are, whatever sizes `scenario` has."""
    mutant: Mutant | None
    arrivals: tuple[Arrival, ...]
    at_steps: tuple[int, ...] | None
    """Of scripted arrivals, one for each; None: by time or closed loop."""
    concurrency: int | None
    faults: tuple[Fault, ...]
    free_pages: tuple[int, ...] = ()
    free_slots: tuple[int, ...] = ()
    device_pages: tuple[int, ...] = ()
    """Page p of the plan is page device_pages[p] of the device; (): itself."""
    poison: Poison | None = None
    observed: bool = False
    """With auditor, event log and plan log."""
    keep_places: bool = False
    """Look at what each step has written."""
    keep_states: bool = False
    """Look at the core's state now and then."""

    @property
    def is_open_loop(self) -> bool:
        """Whether requests come at times of their own."""
        return self.concurrency is None and self.at_steps is None

    def workload(self) -> Workload:
        """The arrivals, to be read once."""
        return Workload(iter(self.arrivals), self.concurrency, len(self.arrivals), at_steps=self.at_steps)

    def sized(self, *, core: dict[str, Any] | None = None, cache: dict[str, Any] | None = None) -> Scenario:
        """The scenario with other sizes."""
        scenario = self.scenario
        changes = {
            "core": scenario.core.model_copy(update=core or {}),
            "cache": scenario.cache.model_copy(update=cache or {}),
        }
        return scenario.model_copy(update=changes)


def world_of(scenario: Scenario, mutant: Mutant | None) -> World:
    """The first requests of a scenario, served as it says: up to MAX_REQUESTS, and within MAX_TOKENS."""
    workload = generate(scenario)
    arrivals = _first(workload)
    kept = {arrival.request for arrival in arrivals}
    faults = concrete_faults(scenario)
    return World(
        scenario=scenario,
        script=scenario,
        mutant=mutant,
        arrivals=arrivals,
        at_steps=None if workload.at_steps is None else tuple(workload.at_steps[: len(arrivals)]),
        concurrency=workload.concurrency,
        faults=tuple(fault for fault in faults if _matters(fault, kept)),
    )


def _matters(fault: ConcreteFault, kept: set[int]) -> TypeGuard[Fault]:
    """Disturbances change nothing that two runs could be compared by."""
    return isinstance(fault, FailFault) or (isinstance(fault, CancelFault) and fault.request in kept)


def _first(workload: Workload) -> tuple[Arrival, ...]:
    arrivals: list[Arrival] = []
    tokens = 0
    for arrival in workload:
        tokens += arrival.prompt_tokens + arrival.output_tokens
        if len(arrivals) == MAX_REQUESTS or (tokens > MAX_TOKENS and len(arrivals) >= MIN_REQUESTS):
            break
        arrivals.append(arrival)
    return tuple(arrivals)
