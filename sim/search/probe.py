"""One scenario through the real engine, core and judge, with nothing written and nothing drawn: what did it show?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

from backends.protocol import Backend
from invariants.violation import Violation
from sim.build import build_auditor, build_core, open_backend
from sim.cores.protocol import ServingCore
from sim.cost_model import cost_model
from sim.engine import Engine
from sim.faults import FaultSchedule
from sim.hang import HangError, HangWatch
from sim.metrics import run_figures
from sim.mutants import Mutant, find_mutant, planted
from sim.observer import Observer
from sim.part_calls import PartError
from sim.parts import Parts
from sim.record import Recorder
from sim.scenario import Scenario
from sim.script import RequestScript
from sim.sometimes import Sometimes
from sim.workload import Workload, concrete_faults, generate, prompt_tokens

STUCK: Final = frozenset({"S11", "L1", "L2", "L3"})
"""Statements after whose breach it matters what each unfinished request waits for."""

CoreMaker = Callable[[Scenario], ServingCore]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a scenario showed: `id` is that of the first violation, CRASH, HANG, or "" where everything held."""

    id: str
    step: int
    """The newest step when it was found; of a crash or hang the completed steps, of a run that held all its plans."""
    trace_hash: str
    message: str
    plans: int
    """Steps planned: each of them was checked."""
    violation: Violation | None = None
    cause: str = ""
    """Of a crash the class of what was raised, of a hang the call that did not return."""

    @property
    def pin(self) -> str:
        """What tells this bug from others: the id, of a crash or hang with its cause."""
        return f"{self.id}-{self.cause}" if self.cause else self.id


def probe(
    scenario: Scenario,
    *,
    core: CoreMaker | None = None,
    observers: Sequence[Observer] = (),
    sometimes: Counter[str] | None = None,
    is_planted: bool = False,
    hang_seconds: float | None = None,
) -> Finding:
    """Run a scenario to its first violation. Raises what `sim.run.run` raises before a run begins.

    `core` makes the core under test; None: the one that the scenario names, with its planted bug. `sometimes` takes in
    how often each situation of SOMETIMES came up. `is_planted`: the bug's edits are in force already (a search plants
    them once: compiled programs would be lost with every run). `hang_seconds` takes the place of the scenario's.
    """
    mutant = find_mutant(scenario.plant) if scenario.plant else None
    with nullcontext() if is_planted else planted(mutant):
        built = build_core(scenario, mutant) if core is None else core(scenario)
        return probe_parts(scenario, built, generate(scenario), mutant, observers, sometimes, hang_seconds)


def probe_parts(
    scenario: Scenario,
    core: ServingCore,
    workload: Workload,
    mutant: Mutant | None = None,
    observers: Sequence[Observer] = (),
    sometimes: Counter[str] | None = None,
    hang_seconds: float | None = None,
) -> Finding:
    """`probe` with a core that is built already, and with a workload."""
    patience = scenario.invariants.hang_seconds if hang_seconds is None else hang_seconds
    recorder = Recorder(core.policy)
    situations = Sometimes(recorder)
    if sometimes is not None:
        observers = (*observers, situations)
    auditor = build_auditor(scenario, core)
    backend: Backend = open_backend(scenario, mutant)
    try:
        parts = Parts(
            core=core,
            backend=backend,
            script=RequestScript(scenario, prompt_tokens),
            cost=cost_model(scenario.cost),
            workload=workload,
            faults=FaultSchedule(concrete_faults(scenario)),
            recorder=recorder,
            auditor=auditor,
            observers=observers,
        )
        engine = Engine(parts, hang_seconds=patience)
        crash: PartError | None = None
        try:
            engine.run()
            engine.judge_end()
        except PartError as error:
            crash = error
        end_ns = engine.close()
        if crash is None and not auditor.violations:
            auditor.summarised(run_figures(recorder, end_ns, workload.skipped))
    finally:
        backend.close()
    if sometimes is not None:
        sometimes.update(situations.hits)
    digest, plans = recorder.hash.hexdigest, engine.num_plans
    if auditor.violations:
        first = auditor.violations[0]
        message = str(first) + (_unfinished(engine.core, patience) if first.id in STUCK else "")
        return Finding(first.id, first.step, digest, message, plans, first)
    if crash is not None:
        return Finding(crash.id, recorder.steps, digest, str(crash), plans, cause=crash.cause)
    return Finding("", plans, digest, "", plans)


def _unfinished(core: ServingCore, patience: float) -> str:
    """What a core says of each request that it has not finished."""
    try:
        with HangWatch(patience):
            pending = core.pending()
    except (Exception, HangError) as error:  # a core that is broken already may break here too
        return f" [pending() raised {type(error).__name__}: {error}]"
    return f" [{'; '.join(f'request {request}: {why}' for request, why in pending.items()) or 'nothing is pending'}]"
