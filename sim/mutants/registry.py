"""All planted bugs by name: what each does wrong, and which invariant must be the first to say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from backends.protocol import Backend
from sim.cores.protocol import ServingCore
from sim.mutants.backends import WrongOffset
from sim.mutants.cores import DoubleAllocation, LeakOnFinish


@dataclass(frozen=True, slots=True)
class Mutant:
    """A planted bug: it wraps the core or the backend, never both."""

    name: str
    sentence: str
    expected: str
    """The invariant that is expected to fire first."""
    core: Callable[[ServingCore], ServingCore] | None = None
    backend: Callable[[Backend], Backend] | None = None


class UnknownMutantError(Exception):
    """No mutant has that name; the message suggests one."""


MUTANTS: Final[dict[str, Mutant]] = {
    mutant.name: mutant
    for mutant in (
        Mutant("leak-on-finish", "A finished request gives back all its pages but the last.", "P10", core=LeakOnFinish),
        Mutant(
            "double-allocation",
            "A page that another request owns is handed out a second time.",
            "P1",
            core=DoubleAllocation,
        ),
        Mutant(
            "wrong-offset",
            "Decodes write their K/V one place behind the right one in its page.",
            "K1",
            backend=WrongOffset,
        ),
    )
}


def find_mutant(name: str) -> Mutant:
    """The mutant of that name. UnknownMutantError: there is none."""
    if name in MUTANTS:
        return MUTANTS[name]
    close = get_close_matches(name, MUTANTS, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(sorted(MUTANTS))}"
    raise UnknownMutantError(f"plant: there is no mutant '{name}'; {hint}")
