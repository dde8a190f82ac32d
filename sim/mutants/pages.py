"""Planted bugs in the page manager (MP)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_MANAGER = "paged_attention.pages:HBMPageManager"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MP01",
        "The pool starts at page 0, so that the dummy is handed out.",
        ("P3",),
        edits=(Edit(f"{_MANAGER}.__init__", "Fifo(range(DUMMY_PAGE + 1,", "Fifo(range(DUMMY_PAGE,"),),
    ),
    Mutant(
        "MP04",
        "Freeing pages forgets the last one.",
        ("P10", "P12"),
        edits=(Edit(f"{_MANAGER}.free_hbm_pages", "extend(returned)", "extend(returned[:-1])"),),
    ),
)
