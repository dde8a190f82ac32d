"""Planted bugs in the rules SEED-01 to SEED-32: the behaviour that each forbids."""

from __future__ import annotations

from sim.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
