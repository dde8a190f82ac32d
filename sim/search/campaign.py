"""How quickly the fuzzer finds planted bugs, and how small what it finds becomes: the fuzzer's own benchmark.

A hunt is `kvproof fuzz --plant ID --seed S --stop first` and `kvproof replay` of what it wrote, function for function.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from sim.host_devices import compile_quickly
from sim.mutants import MUTANTS, Mutant, find_mutant, planted
from sim.replay import load_recorded, replay
from sim.search.fuzz import FuzzOptions, fuzz
from sim.selftest.drivers import scenario_of
from sim.workers import workers

CONTRACT: Final = "contract:"
MOST_REQUESTS: Final = 4
MOST_OPERATIONS: Final = 12
"""What a smallest scenario is meant to need at most."""


@dataclass(frozen=True, slots=True)
class Hunt:
    """What one search for one planted bug showed."""

    mutant: str
    where: str
    seed: int
    id: str
    """What broke first; "": nothing within the time."""
    seconds: float
    """Wall time until the first scenario that broke, compiling included."""
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
    """The file of the smallest scenario showed the same id, step and trace hash two more times."""

    @property
    def is_small(self) -> bool:
        """Whether what is left is as small as it is meant to be."""
        return self.requests <= MOST_REQUESTS and self.operations <= MOST_OPERATIONS


def can_be_shown(mutant: Mutant) -> bool:
    """Whether one run that the search draws can show the bug: no contract of the API, comparison of runs or variant."""
    return (
        mutant.applicable
        and not mutant.benign
        and mutant.where != "deep"
        and not mutant.driver.startswith(CONTRACT)
        and mutant.caught_by != ("contract",)
        and _is_drawn(mutant.driver)
    )


def _is_drawn(driver: str) -> bool:
    """Whether the search draws scenarios like this one: never with several devices or somebody else's writer."""
    if not driver:
        return True
    backend = scenario_of(driver).backend
    return not backend.mesh and backend.writer is None


def backend_of(mutant: Mutant) -> str:
    """The backend that shows it."""
    return "jax" if mutant.where == "device" else "none"


def hunt(name: str, seed: int, *, seconds: float = 60.0, runs: int | None = None) -> Hunt:
    """Search from a cold seed for the planted bug `name`, shrink what breaks first, and replay its file twice.

    `runs` bounds the scenarios; None: as many as `seconds` allow.
    """
    mutant = find_mutant(name)
    options = FuzzOptions(seed, seconds, runs, backend=backend_of(mutant), plant=mutant.id, stop="first")
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(options, Path(folder), lambda result: None)
        if not result.shrunk:
            return Hunt(mutant.id, mutant.where, seed, "", seconds, result.cpu_seconds, result.scenarios)
        ((pin, (_, shrunk)),) = result.shrunk.items()
        with planted(mutant):  # around both replays, so that they compile once
            again = [replay(load_recorded(result.files[pin])).same for _ in range(2)]
    return Hunt(
        mutant.id,
        mutant.where,
        seed,
        shrunk.finding.id,
        round(result.seconds[pin], 3),
        round(result.cpu_seconds, 3),
        result.scenarios,
        shrunk.num_requests,
        shrunk.num_operations,
        round(shrunk.seconds, 3),
        shrunk.tried,
        all(again),
    )


def campaign(
    names: Iterable[str] = (),
    seeds: Iterable[int] = (0,),
    *,
    seconds: float = 60.0,
    jobs: int = 1,
    host_only: bool = False,
) -> Iterator[Hunt]:
    """A hunt for each of the named bugs (none named: all that a run can show) from each seed, in order, as they end."""
    known = [mutant for mutant in MUTANTS.values() if can_be_shown(mutant)]
    wanted = tuple(names) or tuple(mutant.id for mutant in known if not host_only or mutant.where == "host")
    # Spawned workers even for one job: a cold start is part of what is measured, and a broken core may leave traces.
    with workers(jobs, compile_quickly) as pool:
        running = [pool.submit(hunt, name, seed, seconds=seconds) for name in wanted for seed in seeds]
        try:
            for one in running:
                yield one.result()
        finally:
            for one in running:
                one.cancel()


def figures(hunts: Iterable[Hunt]) -> dict[str, Any]:
    """Every hunt, medians over those that found something, and those that did not end as they should."""
    hunts = list(hunts)
    found = [one for one in hunts if one.id]
    names = ("seconds", "cpu_seconds", "scenarios", "requests", "operations", "shrink_seconds", "tried")
    return {
        "hunts": [asdict(one) for one in hunts],
        "medians": {name: median(getattr(one, name) for one in found) if found else None for name in names},
        "missed": [_named(one) for one in hunts if not one.id],
        "not_replayed": [_named(one) for one in found if not one.replayed],
        "large": [_named(one) for one in found if not one.is_small],
    }


def _named(one: Hunt) -> str:
    return f"{one.mutant} from seed {one.seed}"
