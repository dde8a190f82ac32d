"""Planted bugs in the simulator and the verifier themselves (MD)."""

from __future__ import annotations

from sim.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
