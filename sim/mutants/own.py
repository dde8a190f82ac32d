"""Planted bugs in places that the catalogues leave out (KP)."""

from __future__ import annotations

from sim.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
