"""What becomes of one mutant: the work of one job, done in a process of its own."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

from invariants.catalogue import ACTIVE
from sim.mutants import Mutant, find_mutant, planted
from sim.run import run
from sim.selftest.drivers import VACUITY, Shown, drive, drivers_of, gauntlet, judged, scenario_of, shown

LIMIT_SECONDS: Final = {"host": 10.0, "device": 60.0, "deep": 60.0}
"""Seconds in which a mutant must be noticed, by what it takes to see it."""


class TooLongError(BaseException):
    """A job took longer than it may; no `except Exception` on the way may take it for a crash of the core."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a mutant."""

    id: str
    where: str
    killed_by: str
    driver: str
    steps: int
    seconds: float
    """Wall seconds until it was noticed, compiling included."""
    fired: tuple[str, ...] = ()
    """Every id that fires where the run goes on."""
    replayed: bool = True
    """The same violation at the same step with the same hash in a second run."""
    alone: tuple[str, ...] = ()
    """Ids that notice it with all others off, as far as they were tried."""
    complaint: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fate as a dict of JSON values."""
        return {
            "id": self.id,
            "applicable": True,
            "killed_by": self.killed_by or None,
            "driver": self.driver,
            "seconds": round(self.seconds, 3),
            "steps": self.steps,
            "where": self.where,
            "fired": list(self.fired),
            "replayed": self.replayed,
            "complaint": self.complaint,
        }


def kill(mutant_id: str) -> Fate:
    """Drive a mutant until somebody notices, then once more to see that it replays and who else notices."""
    mutant = find_mutant(mutant_id)
    start = time.perf_counter()
    last = Shown("")
    try:
        # Planted once for all runs, so that what they compile is compiled once; vacuity also looks at the honest code.
        with nullcontext() if drivers_of(mutant) == (VACUITY,) else planted(mutant):
            with _at_most(2 * LIMIT_SECONDS[mutant.where]):
                for driver in drivers_of(mutant):
                    last = drive(mutant, driver)
                    if last.killed_by:
                        break
            seconds = time.perf_counter() - start
            if not last.killed_by:
                return Fate(mutant_id, mutant.where, "", last.driver, 0, seconds)
            with _at_most(LIMIT_SECONDS[mutant.where]):
                same = _told(drive(mutant, last.driver)) == _told(last)
            fired = _fired(mutant, last)
            alone = [name for name in _worth_trying(mutant, last.killed_by, fired) if _alone(mutant, last.driver, name)]
    except TooLongError as error:
        return Fate(mutant_id, mutant.where, "", last.driver, 0, time.perf_counter() - start, complaint=str(error))
    return Fate(
        mutant_id,
        mutant.where,
        last.killed_by,
        last.driver,
        last.steps,
        seconds,
        fired,
        same,
        tuple(alone),
        last.complaint,
    )


def _told(shown: Shown) -> tuple[str, int, bytes]:
    """What a replay must show again: the words may name a wall clock, where that is the planted bug."""
    return shown.killed_by, shown.steps, shown.digests


def _fired(mutant: Mutant, first: Shown) -> tuple[str, ...]:
    """Every id that fires where the run goes on; a broken core may run for ever then."""
    try:
        with _at_most(LIMIT_SECONDS[mutant.where]):
            return drive(mutant, first.driver, stop="never").fired
    except TooLongError:
        return first.fired


def _worth_trying(mutant: Mutant, killed_by: str, fired: tuple[str, ...]) -> tuple[str, ...]:
    """Ids to try alone while the mutant's programs are compiled; what planning alone shows costs little later on."""
    if mutant.where == "host":
        return ()
    named = dict.fromkeys((killed_by, *mutant.caught_by))
    return tuple(name for name in named if name in fired and name in ACTIVE)


def alarms(mutant_id: str) -> list[str]:
    """What the judge says of a legal variant, driver by driver: it should be nothing."""
    mutant = find_mutant(mutant_id)
    names = gauntlet("host-") + (gauntlet("device-") if mutant.where == "device" else ())
    found: list[str] = []
    for name in names:
        seen = shown(name, run(judged(scenario_of(name), mutant_id)))
        if seen.killed_by:
            found.append(f"{mutant_id} in {name}: {seen.complaint}")
    return found


def killed_alone(invariant: str, candidates: tuple[tuple[str, str], ...]) -> str:
    """The first of the (mutant, driver) pairs that is noticed with `invariant` alone on, or ""."""
    for name, driver in candidates:
        mutant = find_mutant(name)
        # What fires late needs a run that lasts: planning alone is quick enough to try every driver.
        others = drivers_of(mutant) if mutant.where == "host" else ()
        if any(_alone(mutant, one, invariant) for one in dict.fromkeys((driver, *others))):
            return name
    return ""


def _alone(mutant: Mutant, driver: str, invariant: str) -> bool:
    try:
        with _at_most(LIMIT_SECONDS[mutant.where]):
            return drive(mutant, driver, only=frozenset({invariant})).killed_by == invariant
    except TooLongError:
        return False


@contextmanager
def _at_most(seconds: float) -> Generator[None]:
    """Raise TooLongError in the body after so many wall seconds; without effect outside the main thread's process."""

    def expire(signum: int, frame: object) -> None:
        raise TooLongError(f"not noticed within {seconds:g} s: the code under test hangs")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
