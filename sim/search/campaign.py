"""How quickly the search finds planted bugs, and how small what it finds becomes: the fuzzer's own benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

from sim.mutants import MUTANTS, Mutant, find_mutant, planted
from sim.scenario import Scenario
from sim.search.probe import Finding, probe
from sim.search.shrink import shrink
from sim.search.swarm import draw

CONTRACT: Final = "contract:"


@dataclass(frozen=True, slots=True)
class Hunt:
    """What one search for one planted bug showed."""

    mutant: str
    seed: int
    id: str
    """What broke first; "": nothing within the time."""
    seconds: float
    """Wall time until the first scenario that broke, planting and compiling included."""
    cpu_seconds: float
    """The same in CPU time, all threads together: what is left where a machine is shared."""
    scenarios: int
    """Scenarios run until then."""
    requests: int = 0
    """Left in the smallest scenario."""
    operations: int = 0
    shrink_seconds: float = 0.0
    tried: int = 0
    """Scenarios run by the shrinker."""
    replayed: bool = False
    """The smallest scenario broke in the same way two more times: id, step and trace hash."""


def can_be_shown(mutant: Mutant) -> bool:
    """Whether one run of the simulator can show the bug: no contract of the API, no comparison of runs, no variant."""
    return (
        mutant.applicable
        and not mutant.benign
        and mutant.where != "deep"
        and not mutant.driver.startswith(CONTRACT)
        and mutant.caught_by != ("contract",)
    )


def backend_of(mutant: Mutant) -> str:
    """The backend that shows it."""
    return "jax" if mutant.where == "device" else "none"


def hunt(name: str, seed: int, *, seconds: float = 60.0) -> Hunt:
    """Search from a cold seed for the planted bug `name`, shrink what breaks first, and see it again twice."""
    mutant, start, cpu_start = find_mutant(name), time.monotonic(), time.process_time()
    with planted(mutant):
        scenario = _drawn(mutant, seed, 0)
        finding, scenarios = probe(scenario, is_planted=True), 1
        while not finding.id and time.monotonic() - start < seconds:
            scenario = _drawn(mutant, seed, scenarios)
            finding, scenarios = probe(scenario, is_planted=True), scenarios + 1
        found, cpu_seconds = time.monotonic(), time.process_time() - cpu_start
        if not finding.id:
            return Hunt(mutant.id, seed, "", found - start, cpu_seconds, scenarios)
        shrunk = shrink(scenario, is_planted=True)
        done = time.monotonic()
        again = {_shown(probe(shrunk.scenario, is_planted=True)) for _ in range(2)}
    return Hunt(
        mutant.id,
        seed,
        finding.id,
        found - start,
        cpu_seconds,
        scenarios,
        shrunk.num_requests,
        shrunk.num_operations,
        done - found,
        shrunk.tried,
        again == {_shown(shrunk.finding)},
    )


def _drawn(mutant: Mutant, seed: int, number: int) -> Scenario:
    return draw(seed, number, backend=backend_of(mutant)).model_copy(update={"plant": mutant.id})


def _shown(finding: Finding) -> tuple[str, int, str]:
    return finding.id, finding.step, finding.trace_hash


def campaign(names: Iterable[str] = (), seeds: Iterable[int] = (0,), *, seconds: float = 60.0) -> Iterator[Hunt]:
    """A hunt for each of the named bugs (none named: all that a run can show) from each seed, as they end."""
    wanted = tuple(names) or tuple(mutant.id for mutant in MUTANTS.values() if can_be_shown(mutant))
    for name in wanted:
        for seed in seeds:
            yield hunt(name, seed, seconds=seconds)


def medians(hunts: Iterable[Hunt]) -> dict[str, Any]:
    """Medians over the hunts that found something, and the hunts that missed."""
    hunts = list(hunts)
    found = [asdict(one) for one in hunts if one.id]
    names = ("seconds", "cpu_seconds", "scenarios", "requests", "operations", "shrink_seconds", "tried")
    return {
        **{name: median(one[name] for one in found) if found else None for name in names},
        "hunts": len(hunts),
        "missed": [f"{one.mutant} from seed {one.seed}" for one in hunts if not one.id],
    }
