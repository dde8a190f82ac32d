"""Planted bugs, each a wrapper around the real core or backend, to prove that the invariants notice them."""

from sim.mutants.registry import MUTANTS, Mutant, UnknownMutantError, find_mutant

__all__ = ["MUTANTS", "Mutant", "UnknownMutantError", "find_mutant"]
