"""The whole selftest: canary first, then all jobs side by side, then what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Final

from invariants.catalogue import ACTIVE
from sim.host_devices import compile_quickly
from sim.mutants import CANARY, MUTANTS, Mutant
from sim.selftest.fate import Fate, alarms, kill, killed_alone
from sim.selftest.honest import Honest, honest_names, run_honest
from sim.workers import workers

CANDIDATES: Final = 12
"""Mutants that an invariant may try to be the sole killer of, the likeliest first."""

Progress = Callable[[int, int, str], None]
"""(jobs done, jobs in all, what was just done)."""


@dataclass(frozen=True, slots=True)
class SelftestOptions:
    """How much of the selftest runs."""

    jobs: int = 1
    only: tuple[str, ...] = ()
    """Ids of mutants and benign variants; (): all of them, and with them sole killers, library and vacuity."""
    host_only: bool = False
    """Leave out what needs a device or a second run."""


@dataclass(slots=True)
class Selftest:
    """What the selftest showed."""

    canary_caught: bool
    fates: list[Fate] = field(default_factory=list[Fate])
    waiting: list[Mutant] = field(default_factory=list[Mutant])
    """Mutants of features to come."""
    benign: list[str] = field(default_factory=list[str])
    false_alarms: list[str] = field(default_factory=list[str])
    sole_killers: dict[str, str] = field(default_factory=dict[str, str])
    """Invariant to a mutant that it notices with all others off."""
    sole_killer_missing: list[str] = field(default_factory=list[str])
    vacuous: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

    @property
    def survivors(self) -> list[Fate]:
        """Mutants that nobody noticed."""
        return [fate for fate in self.fates if not fate.killed_by]

    @property
    def passed(self) -> bool:
        """Whether the judge is awake and raises no false alarm."""
        failed = self.survivors or self.false_alarms or self.sole_killer_missing or self.vacuous
        return self.canary_caught and not failed and all(fate.replayed for fate in self.fates)

    def to_json(self) -> dict[str, Any]:
        """The result as a dict of JSON values."""
        waiting = [
            {"id": mutant.id, "applicable": False, "killed_by": None, "waits_for": mutant.waits_for}
            for mutant in self.waiting
        ]
        return {
            "passed": self.passed,
            "mutants": [fate.to_json() for fate in self.fates] + waiting,
            "killed": len(self.fates) - len(self.survivors),
            "applicable": len(self.fates),
            "false_alarms": self.false_alarms,
            "benign": self.benign,
            "canary": {"id": CANARY, "caught": self.canary_caught},
            "sole_killers": self.sole_killers,
            "sole_killer_missing": self.sole_killer_missing,
            "vacuous": self.vacuous,
            "seconds": round(self.seconds, 1),
        }


def selftest(options: SelftestOptions, progress: Progress) -> Selftest:
    """Run the selftest. With the canary surviving nothing else is run: its verdicts would mean nothing."""
    result = Selftest(canary_caught=bool(kill(CANARY).killed_by))
    if not result.canary_caught:
        return result
    mutants = [mutant for mutant in MUTANTS.values() if _chosen(mutant, options)]
    result.waiting = [mutant for mutant in mutants if not mutant.applicable]
    result.benign = [mutant.id for mutant in mutants if mutant.benign]
    whole = not options.only
    with workers(options.jobs, compile_quickly) as pool:
        # Those that compile take longest: they go first, so that no worker is left with one at the end.
        bugs = sorted((m for m in mutants if m.applicable and not m.benign), key=lambda m: m.where == "host")
        jobs: dict[Future[Any], str] = {pool.submit(kill, mutant.id): f"mutant {mutant.id}" for mutant in bugs}
        jobs |= {pool.submit(alarms, name): f"benign {name}" for name in result.benign}
        names = honest_names(host_only=options.host_only) if whole else ()
        jobs |= {pool.submit(run_honest, name): f"unchanged {name}" for name in names}
        honest: list[Honest] = []
        for found in _finished(jobs, progress):
            if isinstance(found, Fate):
                result.fates.append(found)
            elif isinstance(found, Honest):
                honest.append(found)
            else:
                result.false_alarms += found
        order = {name: nth for nth, name in enumerate(MUTANTS)}
        result.fates.sort(key=lambda fate: order[fate.id])
        if whole:
            result.false_alarms += sorted(alarm for run in honest for alarm in run.alarms)
            _judge_alone(result, pool, progress, host_only=options.host_only)
            if not options.host_only:
                result.vacuous = _vacuous(honest)
    return result


def _chosen(mutant: Mutant, options: SelftestOptions) -> bool:
    named = not options.only or mutant.id in options.only
    return named and (not options.host_only or mutant.where == "host")


def _finished(jobs: dict[Future[Any], str], progress: Progress) -> Iterable[Any]:
    try:
        for count, job in enumerate(as_completed(jobs), 1):
            found = job.result()
            progress(count, len(jobs), jobs[job])
            yield found
    except BaseException:
        for job in jobs:
            job.cancel()
        raise


def _judge_alone(result: Selftest, pool: ProcessPoolExecutor, progress: Progress, *, host_only: bool) -> None:
    """Each invariant with all others off: does it notice at least one mutant?"""
    jobs: dict[Future[Any], str] = {}
    for fate in result.fates:
        for name in fate.alone:
            result.sole_killers.setdefault(name, fate.id)
    for invariant in sorted(ACTIVE - result.sole_killers.keys()):
        likeliest = _likeliest(result.fates, invariant, declared=not host_only)[:CANDIDATES]
        pairs = tuple((fate.id, fate.driver) for fate in likeliest)
        if pairs:
            jobs[pool.submit(_alone, invariant, pairs)] = f"{invariant} alone"
        elif not host_only:
            result.sole_killer_missing.append(invariant)
    for invariant, mutant in _finished(jobs, progress):
        if mutant:
            result.sole_killers[invariant] = mutant
        else:
            result.sole_killer_missing.append(invariant)
    result.sole_killers = dict(sorted(result.sole_killers.items()))
    result.sole_killer_missing.sort()


def _likeliest(fates: list[Fate], invariant: str, *, declared: bool) -> list[Fate]:
    """Those in which an invariant fires or (`declared`) should, the likeliest first: by nothing that depends on the
    machine."""
    told = {fate.id: declared and invariant in MUTANTS[fate.id].caught_by for fate in fates}
    named = [fate for fate in fates if invariant in fate.fired or told[fate.id]]
    return sorted(named, key=lambda fate: (fate.where != "host", not told[fate.id], fate.steps))


def _alone(invariant: str, candidates: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    return invariant, killed_alone(invariant, candidates)


def _vacuous(honest: list[Honest]) -> list[str]:
    from sim.vacuity import vacuous

    return list(vacuous([run.summary for run in honest]))
