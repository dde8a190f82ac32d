"""All planted bugs and benign variants by id."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Final

from sim.mutants import (
    benign,
    decoder,
    inputs,
    layouts,
    model_io,
    own,
    own_device,
    pages,
    paired,
    pallas,
    schedule,
    seed,
    tables,
    verifier,
    wrapped,
    writes,
)
from sim.mutants.edit import applied
from sim.mutants.mutant import Mutant

FAMILIES: Final = (
    wrapped,
    pages,
    tables,
    writes,
    layouts,
    schedule,
    model_io,
    inputs,
    verifier,
    seed,
    own,
    own_device,
    paired,
    pallas,
    decoder,
    benign,
)

MUTANTS: Final[dict[str, Mutant]] = {mutant.id: mutant for family in FAMILIES for mutant in family.MUTANTS}
"""Planted bugs and benign variants, family by family."""

CANARY: Final = "double-allocation"
"""The planted bug that every fuzz and selftest must find first: if it survives, the verifier is broken."""


class UnknownMutantError(Exception):
    """No mutant has that name, or it cannot be planted yet; the message suggests one."""


def find_mutant(name: str) -> Mutant:
    """The mutant of that id, case ignored. UnknownMutantError: there is none, or it waits for a feature."""
    by_name = {known.lower(): mutant for known, mutant in MUTANTS.items()}
    mutant = by_name.get(name.lower())
    if mutant is None:
        close = get_close_matches(name.lower(), by_name, n=1)
        hint = f"did you mean '{by_name[close[0]].id}'?" if close else "see kvproof list mutants"
        raise UnknownMutantError(f"plant: there is no mutant '{name}'; {hint}")
    if not mutant.applicable:
        raise UnknownMutantError(f"plant: mutant {mutant.id} cannot be planted yet: it waits for {mutant.waits_for}")
    return mutant


@contextmanager
def planted(mutant: Mutant | None) -> Generator[None]:
    """Run the body with the mutant's edits in force; wrappers are the builder's part."""
    with applied(mutant.edits if mutant is not None else ()):
        yield
