"""The reference pages say what the code says."""

from __future__ import annotations

import pytest

from invariants.catalogue import CATALOGUE
from sim.mutants import MUTANTS
from sim.reference_pages import DOCS, PAGES, page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_makes_of_it(name: str) -> None:
    stale = f"docs/{name} is out of date: run python -m sim.reference_pages"
    assert (DOCS / name).read_text(encoding="utf-8") == page(name), stale


def test_every_invariant_and_every_mutant_is_on_its_page() -> None:
    invariants, mutants = (page(name) for name in PAGES)
    assert all(f"### {name}\n" in invariants for name in CATALOGUE)
    assert all(f"| {mutant.id} |" in mutants for mutant in MUTANTS.values())
