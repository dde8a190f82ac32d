"""Planted bugs in the code under test, which the invariants must notice, and legal variants, which they must not."""

from sim.mutants.mutant import Mutant
from sim.mutants.registry import CANARY, MUTANTS, UnknownMutantError, find_mutant, planted

__all__ = ["CANARY", "MUTANTS", "Mutant", "UnknownMutantError", "find_mutant", "planted"]
