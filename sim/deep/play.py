"""Plays a world: the simulator with the scenario's own core and backend, and a tape running."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from backends.protocol import Backend, Pending
from paged_attention.plan import ModelRows, StepOutcome, StepPlan
from sim.backend_wrapper import BackendWrapper
from sim.build import build_auditor, build_core, cache_spec, open_backend
from sim.cache_hash import cache_hash
from sim.cores.protocol import ServingCore
from sim.cost_model import cost_model
from sim.deep.places import NOBODY, PlaceProbe
from sim.deep.poisoner import Poisoner
from sim.deep.tape import Tape, Taping
from sim.deep.world import World
from sim.engine import Engine
from sim.event_log import EventLog
from sim.faults import FaultSchedule
from sim.observer import Bystander, Observer
from sim.part_calls import PartError
from sim.parts import Parts
from sim.planlog import PlanLogWriter
from sim.record import Recorder
from sim.script import RequestScript
from sim.workload import prompt_tokens

OBSERVED_FULL_EVERY: Final = 8
"""An observed run looks at the whole state each n-th step: whoever changes what it looks at does so often."""

Checkpoint = Callable[[], None]


class _EndlessError(Exception):
    """A run has made more plans than it may."""


def play(world: World, max_plans: int, checkpoint: Checkpoint) -> Tape:
    """Run a world to its end; what a part raises, or a run without end, is noted on the tape.

    `checkpoint` is called before every plan: what it raises comes out. SetupError, BackendUnavailableError: core or
    backend cannot be built like that.
    """
    tape = Tape()
    core = build_core(world.scenario, world.mutant, free_pages=world.free_pages, free_slots=world.free_slots)
    with ExitStack() as stack:
        backend = open_backend(world.scenario, world.mutant)
        stack.callback(backend.close)
        tape.holds_cache = backend.evidence(NOBODY, NOBODY) is not None
        recorder = Recorder(core.policy)
        engine = _engine(world, core, backend, recorder, tape, stack, _limited(max_plans, checkpoint))
        try:
            engine.run()
            engine.judge_end()
        except PartError as error:
            tape.crash = str(error)
        except _EndlessError:
            tape.crash = f"the run did not end within {max_plans} plans"
        engine.close()
        tape.finish(recorder)
        if tape.crash is None:
            tape.cache_hash = cache_hash(backend, cache_spec(world.scenario))
    return tape


def _limited(max_plans: int, checkpoint: Checkpoint) -> Checkpoint:
    left = max_plans

    def check() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _EndlessError
        checkpoint()

    return check


def _engine(
    world: World,
    core: ServingCore,
    backend: Backend,
    recorder: Recorder,
    tape: Tape,
    stack: ExitStack,
    checkpoint: Checkpoint,
) -> Engine:
    scenario, script = world.scenario, RequestScript(world.script, prompt_tokens)
    observers: list[Observer] = []
    if world.poison is not None:
        observers.append(Poisoner(backend, world.poison, scenario.cache.num_pages))
    names = np.argsort(np.array((0, *world.free_pages), np.int32)).astype(np.int32) if world.free_pages else None
    taping = Taping(tape, names)
    taping.state = core.snapshot if world.keep_states else None
    observers.append(taping)
    device: Backend = backend
    if world.device_pages:
        device = RenumberedPages(device, world.device_pages)
    if world.keep_places:
        device = probe = PlaceProbe(device, scenario.cache.page_size)
        observers.append(_KeepPlaces(tape, probe))
    auditor = None
    if world.observed:
        every = {"full_every": OBSERVED_FULL_EVERY, "only": None}
        audited = scenario.model_copy(update={"invariants": scenario.invariants.model_copy(update=every)})
        auditor = build_auditor(audited, core)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = PlanLogWriter(folder / "log.jsonl", core.policy, scenario.model.vocab_size, script.eos_position)
        observers += [EventLog(recorder), stack.enter_context(log)]
    parts = Parts(
        core=core,
        backend=device,
        script=script,
        cost=cost_model(scenario.cost),
        workload=world.workload(),
        faults=FaultSchedule(world.faults),
        recorder=recorder,
        auditor=auditor,
        observers=observers,
    )
    return Engine(parts, stop_at_first=False, hang_seconds=scenario.invariants.hang_seconds, checkpoint=checkpoint)


class RenumberedPages(BackendWrapper):
    """Page p of a plan is another page of the device; the plan is executed from its rows."""

    def __init__(self, backend: Backend, pages: tuple[int, ...]) -> None:
        """The backend is open already."""
        super().__init__(backend)
        self._pages = np.array(pages, np.int32)

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        """Execute the rows on the other pages."""
        table = self._pages[plan.table]
        table.flags.writeable = False
        return self.backend.execute(replace(plan, table=table, native=None), rows)


class _KeepPlaces(Bystander):
    """An observer that moves what the probe saw onto the tape, without rows that were dead on the device."""

    def __init__(self, tape: Tape, probe: PlaceProbe) -> None:
        self._tape, self._probe = tape, probe

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """See Observer."""
        seen = self._probe.seen.pop(plan.step, None)
        if seen is not None:
            self._tape.places.append(seen.of_live_rows(plan, outcome))
