"""What a simulation is made of, and how far one has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.protocol import Backend
from invariants.auditor import Auditor
from sim.cores.protocol import ServingCore
from sim.cost_model import CostModel
from sim.faults import FaultSchedule
from sim.observer import Observer
from sim.record import Recorder
from sim.script import RequestScript
from sim.workload.arrival import Workload


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
