"""What the simulator and the API promise beyond any invariant: each contract says in sentences what was not kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sim.mutants.api_contracts import API_CONTRACTS
from sim.mutants.pallas_contract import pallas_guard
from sim.replay import load_recorded, replay
from sim.run import run
from sim.scenario import Scenario
from sim.search.probe import probe
from sim.search.shrink import shrink
from sim.search.swarm import draw
from sim.workload import concrete_faults, generate


def _world(**keys: Any) -> Scenario:
    """A small world on the backend `none`."""
    settings: dict[str, Any] = {
        "name": "contract",
        "seed": 6,
        "core": {"batch_size": 3, "prefill_chunk": 4, "lag": 1},
        "cache": {"page_size": 3, "num_pages": 24, "max_sequence_length": 24},
        "backend": {"kind": "none"},
        "workload": {
            "arrivals": {"kind": "poisson", "request_rate": 4e5},
            "prompt_tokens": {"kind": "uniform", "min": 1, "max": 12},
            "output_tokens": {"kind": "uniform", "min": 2, "max": 9},
            "num_requests": 12,
        },
        "cost": {"kind": "fixed", "step_ns": 1000},
    }
    return Scenario.model_validate(settings | keys)


def streams() -> list[str]:
    """Faults that are drawn shift no arrival and no length."""
    scenario = _world(faults=[{"kind": "cancel_storm", "fraction": 0.5, "max_delay_seconds": 1e-5}])
    before = list(generate(scenario))
    concrete_faults(scenario)
    after = list(generate(scenario))
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b), None)
    return [] if at is None else [f"arrival {at} was {before[at]}, and {after[at]} once the cancels had been drawn"]


def faults() -> list[str]:
    """A cancel that names a step comes before that step is planned, and after the one before."""
    at_step, request = 5, 1
    scenario = _world(faults=[{"kind": "cancel", "request": request, "at_step": at_step}])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        run(scenario, plan_log=log)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = [line["plan"]["step"] if "plan" in line else "cancel" for line in lines if line.keys() & {"plan", "cancel"}]
    at = told.index("cancel")
    around = told[at - 1], told[at + 1]
    if around == (at_step - 1, at_step):
        return []
    return [f"the cancel before step {at_step} came between steps {around[0]} and {around[1]}"]


def replays() -> list[str]:
    """A run is the same again from its folder."""
    with tempfile.TemporaryDirectory() as folder:
        run(_world(), out=Path(folder))
        return list(replay(load_recorded(Path(folder))).differences)


def shrinks() -> list[str]:
    """A shrunk scenario breaks the statement that the large one broke first, and breaks it like that again."""
    scenario = draw(3, 1).model_copy(update={"plant": "MP08"})
    before, shrunk = probe(scenario), shrink(scenario, budget=300)
    again = probe(shrunk.scenario)
    asked = (before.id, shrunk.finding.step, shrunk.finding.trace_hash)
    shown = (again.id, again.step, again.trace_hash)
    return [] if shown == asked else [f"the scenario that broke {before.id} was shrunk to one that shows {shown}"]


CONTRACTS: Final[dict[str, Callable[[], list[str]]]] = {
    "streams": streams,
    "faults": faults,
    "replays": replays,
    "shrinks": shrinks,
    "pallas_guard": pallas_guard,
    **API_CONTRACTS,
}
"""By name: what was not kept, nothing where all was."""
