"""Planted bugs in cache writes and reads (MK)."""

from __future__ import annotations

from sim.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
