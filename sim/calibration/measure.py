"""Times the real steps of a scenario on its device, one at a time, after a run that compiles everything."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from backends.protocol import Backend, Pending
from paged_attention.plan import ModelRows, StepOutcome, StepPlan
from sim.backend_wrapper import BackendWrapper
from sim.build import build_auditor, build_core, open_backend
from sim.calibration.features import Kind, features
from sim.cost_model import cost_model
from sim.engine import Engine
from sim.faults import FaultSchedule
from sim.part_calls import PartError
from sim.parts import Parts
from sim.record import Recorder
from sim.scenario import Scenario
from sim.script import RequestScript
from sim.workload import concrete_faults, generate, prompt_tokens


class CalibrationError(Exception):
    """The scenario's steps cannot be measured; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Steps in the order in which they ran, each timed twice."""

    kinds: list[Kind]
    features: Int64[np.ndarray, "steps features"]
    times_ns: Int64[np.ndarray, "2 steps"]
    """Of the first and of the second timed run: the fastest of the passes over each step."""
    device: dict[str, str]


def measure(scenario: Scenario, max_steps: int, repeats: int = 1) -> Samples:
    """Run a scenario once judged, which compiles, and twice timed, `repeats` passes each; `max_steps` at most.

    Other processes make a step slower, never faster: of the passes of a timed run the fastest counts, step by step. The
    passes of both runs take turns.

    BackendUnavailableError, SetupError, UnknownCoreError, TraceError: as for `sim.run.run`. CalibrationError: there is
    nothing to be timed, or the steps are wrong.
    """
    if scenario.backend.kind == "none":
        raise CalibrationError("the backend 'none' executes nothing; choose one that does: --set backend.kind=jax")
    if scenario.plant is not None:
        raise CalibrationError(f"{scenario.name} plants the bug '{scenario.plant}': take that key out")
    _play(scenario, max_steps, judged=True)
    passes = [_play(scenario, max_steps) for _ in range(2 * repeats)]
    first = passes[0]
    if any(other.steps != first.steps for other in passes):
        raise CalibrationError("two runs of the scenario took different steps; kvproof run --deep says where they part")
    return Samples(
        kinds=[kind for kind, _ in first.steps],
        features=np.array([values for _, values in first.steps], np.int64),
        times_ns=np.array([other.times_ns for other in passes], np.int64).reshape(repeats, 2, -1).min(axis=0),
        device=first.device,
    )


@dataclass(slots=True)
class _Timed:
    """What a run leaves behind."""

    steps: list[tuple[Kind, tuple[int, ...]]] = field(default_factory=list[tuple[Kind, tuple[int, ...]]])
    times_ns: list[int] = field(default_factory=list[int])
    device: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class _Done:
    """A step that has run already."""

    outcome: StepOutcome

    def result(self) -> StepOutcome:
        return self.outcome


class StepTimer(BackendWrapper):
    """A backend that waits for each step as it is dispatched, and notes the wall time from call to result."""

    def __init__(self, backend: Backend, timed: _Timed) -> None:
        super().__init__(backend)
        self._timed = timed

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        """Execute a step and wait for it."""
        start_ns = time.perf_counter_ns()
        outcome = self.backend.execute(plan, rows).result()
        self._timed.times_ns.append(time.perf_counter_ns() - start_ns)
        self._timed.steps.append(features(plan))
        return _Done(outcome)


class _EnoughError(Exception):
    """As many steps ran as were asked for."""


def _play(scenario: Scenario, max_steps: int, judged: bool = False) -> _Timed:
    timed = _Timed()

    def stop_when_enough() -> None:
        if len(timed.steps) >= max_steps:
            raise _EnoughError

    core = build_core(scenario)
    auditor = build_auditor(scenario, core) if judged else None
    backend = open_backend(scenario)
    try:
        timed.device = dict(backend.describe())
        parts = Parts(
            core=core,
            backend=StepTimer(backend, timed),
            script=RequestScript(scenario, prompt_tokens),
            cost=cost_model(scenario.cost),
            workload=generate(scenario),
            faults=FaultSchedule(concrete_faults(scenario)),
            recorder=Recorder(core.policy),
            auditor=auditor,
        )
        Engine(parts, hang_seconds=scenario.invariants.hang_seconds, checkpoint=stop_when_enough).run()
    except _EnoughError:
        pass
    except PartError as error:
        raise CalibrationError(f"{scenario.name} crashes: {error}; kvproof run shows it") from error
    finally:
        backend.close()
    if auditor is not None and auditor.violations:
        raise CalibrationError(f"{scenario.name} does not hold: {auditor.violations[0]}; kvproof run shows it")
    return timed
