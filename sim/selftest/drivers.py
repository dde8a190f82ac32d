"""What a planted bug is driven through: gauntlet scenarios, deep checks, contracts of the API, and vacuity."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sim.host_devices import forced_count, run_with_devices, wanted_count
from sim.mutants import Mutant, planted
from sim.run import Report, run
from sim.scenario import Scenario, dump_scenario, load_scenario

LIBRARY: Final = Path(__file__).parents[2] / "scenarios"
GAUNTLET: Final = LIBRARY / "gauntlet"
VACUITY: Final = "vacuity"
CONTRACT: Final = "contract:"
CRASH: Final = "crash"

Stop = Literal["first", "never"]


@dataclass(frozen=True, slots=True)
class Shown:
    """What one driver showed of one mutant."""

    driver: str
    killed_by: str = ""
    """The id that fired first, "crash" where the core raised, "" where nobody noticed."""
    steps: int = 0
    """Steps planned until it was noticed."""
    fired: tuple[str, ...] = ()
    """Every id that fired, in catalogue-independent order of first appearance."""
    digests: bytes = b""
    """The run's rolling hash after each step."""
    complaint: str = ""
    """The first violation in words."""


@functools.cache
def gauntlet(prefix: str) -> tuple[str, ...]:
    """Names of the gauntlet scenarios that begin with `prefix`, in order."""
    return tuple(sorted(path.stem for path in GAUNTLET.glob(f"{prefix}*.yaml")))


@functools.cache
def scenario_of(driver: str) -> Scenario:
    """The scenario of a driver, from the gauntlet or the library."""
    path = GAUNTLET / f"{driver}.yaml"
    return load_scenario(path if path.is_file() else LIBRARY / f"{driver}.yaml")


def drivers_of(mutant: Mutant) -> tuple[str, ...]:
    """The drivers to try on a mutant, its own first."""
    if mutant.driver.startswith(CONTRACT) or mutant.driver == VACUITY:
        return (mutant.driver,)
    if VACUITY in mutant.caught_by:
        return (VACUITY,)
    usual = gauntlet(f"{mutant.where}-")
    return tuple(dict.fromkeys((mutant.driver, *usual))) if mutant.driver else usual


def drive(mutant: Mutant, driver: str, *, only: frozenset[str] | None = None, stop: Stop = "first") -> Shown:
    """Run a mutant through a driver, with these invariants only (None: all)."""
    if driver.startswith(CONTRACT):
        return _contract(mutant, driver)
    if driver == VACUITY:
        return _vacuity(mutant)
    scenario = judged(scenario_of(driver), mutant.id, only, stop)
    if mutant.where == "deep":
        return _deep(scenario, mutant, driver, only)
    if wanted_count(scenario) > forced_count():
        return _in_own_process(driver, scenario)
    return shown(driver, run(scenario))


def judged(scenario: Scenario, plant: str | None, only: frozenset[str] | None = None, stop: Stop = "first") -> Scenario:
    """The scenario with a planted bug and other judges."""
    changes = {"stop": stop, "only": None if only is None else tuple(sorted(only))}
    return scenario.model_copy(update={"plant": plant, "invariants": scenario.invariants.model_copy(update=changes)})


def shown(driver: str, report: Report) -> Shown:
    """What a run showed."""
    digests = bytes(report.recorder.hash.step_digests)
    violations, crash = report.violations, report.summary["crash"]
    if violations:
        first = violations[0]
        ids = tuple(dict.fromkeys(violation.id for violation in violations))
        return Shown(driver, first.id, first.step + 1, ids, digests, str(first))
    if crash:
        return Shown(driver, CRASH, report.summary["steps"], (CRASH,), digests, str(crash))
    return Shown(driver, digests=digests)


def _in_own_process(driver: str, scenario: Scenario) -> Shown:
    """A sharded run: how many devices JAX shows is fixed once it has started."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{driver}.yaml"
        dump_scenario(scenario, path)
        arguments = ["run", str(path), "--json", "--quiet", "--no-plots", "--out", str(Path(folder) / "run")]
        output, _ = run_with_devices(wanted_count(scenario), arguments)
    summary: dict[str, Any] = json.loads(output)
    violations = summary["violations"]
    if not violations:
        crash = summary["crash"]
        return Shown(driver, CRASH, summary["steps"], (CRASH,), complaint=crash) if crash else Shown(driver)
    first = violations[0]
    ids = tuple(dict.fromkeys(str(violation["id"]) for violation in violations))
    return Shown(driver, ids[0], first["step"] + 1, ids, complaint=f"{first['id']}: {first['message']}")


def _deep(scenario: Scenario, mutant: Mutant, driver: str, only: frozenset[str] | None) -> Shown:
    from sim.deep import deep_check

    result = deep_check(scenario, only=only or frozenset(mutant.caught_by))
    if not result.violations:
        return Shown(driver)
    first = result.violations[0]
    ids = tuple(dict.fromkeys(violation.id for violation in result.violations))
    return Shown(driver, first.id, max(first.step, 0) + 1, ids, complaint=str(first))


def _contract(mutant: Mutant, driver: str) -> Shown:
    from sim.mutants.contracts import CONTRACTS

    with planted(mutant):
        try:
            broken = CONTRACTS[driver.removeprefix(CONTRACT)]()
        except Exception as error:  # a mutant may break anything at all
            broken = [f"{type(error).__name__}: {error}"]
    if not broken:
        return Shown(driver)
    return Shown(driver, mutant.caught_by[0], fired=(mutant.caught_by[0],), complaint=broken[0])


def _vacuity(mutant: Mutant) -> Shown:
    from sim.vacuity import vacuous

    summaries = [run(judged(scenario_of(name), mutant.id)).summary for name in gauntlet("host-")]
    honest = [run(judged(scenario_of(name), None)).summary for name in gauntlet("host-")]
    new = sorted(set(vacuous(summaries)) - set(vacuous(honest)))
    if not new:
        return Shown(VACUITY)
    return Shown(VACUITY, VACUITY, fired=(VACUITY,), complaint=f"never checked: {', '.join(new)}")
