"""The unchanged code over the scenario library and the gauntlet: whatever the judge says there is a false alarm."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.host_devices import forced_count, run_with_devices, wanted_count
from sim.run import run
from sim.scenario import Scenario
from sim.selftest.drivers import GAUNTLET, LIBRARY, gauntlet, scenario_of


@dataclass(frozen=True, slots=True)
class Honest:
    """What an unchanged scenario showed."""

    name: str
    alarms: tuple[str, ...]
    summary: dict[str, Any]


def honest_names(*, host_only: bool) -> tuple[str, ...]:
    """The scenarios that plant nothing and run on any machine, the largest part of the library first."""
    library = tuple(sorted(path.stem for path in LIBRARY.glob("*.yaml")))
    kinds = ("host-",) if host_only else ("deep-", "mesh-", "device-", "host-")
    names = (*(() if host_only else library), *(name for kind in kinds for name in gauntlet(kind)))
    return tuple(
        name for name in names if (found := scenario_of(name)).plant is None and found.backend.platform == "cpu"
    )


def run_honest(name: str) -> Honest:
    """Run one of them, with deep checks where it is made for them."""
    scenario = scenario_of(name)
    summary = _summary(name, scenario)
    alarms = [f"{name}: {found['id']} at step {found['step']}: {found['message']}" for found in summary["violations"]]
    if summary["crash"]:
        alarms.append(f"{name}: {summary['crash']}")
    if name.startswith("deep-"):
        alarms += _deep(name, scenario, summary)
    return Honest(name, tuple(alarms), summary)


def _summary(name: str, scenario: Scenario) -> dict[str, Any]:
    count = wanted_count(scenario)
    if count <= forced_count():
        return run(scenario).summary
    path = next(folder / f"{name}.yaml" for folder in (GAUNTLET, LIBRARY) if (folder / f"{name}.yaml").is_file())
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["run", str(path), "--json", "--quiet", "--no-plots", "--out", str(Path(folder) / "run")]
        output, _ = run_with_devices(count, arguments)
    return json.loads(output)


def _deep(name: str, scenario: Scenario, summary: dict[str, Any]) -> list[str]:
    """Alarms of the deep checks; their counters join the summary's."""
    from sim.deep import deep_check

    result = deep_check(scenario)
    summary["invariants"] = {**summary["invariants"], **result.counters}
    return [f"{name}: {violation}" for violation in result.violations]
