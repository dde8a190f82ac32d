"""Planted bugs in model input, output and sampling (MI)."""

from __future__ import annotations

from sim.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
