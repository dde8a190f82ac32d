"""Legal variants of our own code, declared as such: whoever complains about one is wrong."""

from __future__ import annotations

from sim.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
