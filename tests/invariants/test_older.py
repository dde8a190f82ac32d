"""Which older places are compared beside those that a step writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from invariants.older import STEPS_AHEAD, OlderPlaces
from invariants.shadow import Shadow

PAGE_SIZE, NUM_PAGES, WIDTH = 2, 10, 3


@st.composite
def held_pages(draw: st.DrawFn) -> list[list[int]]:
    """The pages of each slot, none of them twice."""
    pages = draw(st.permutations(range(1, NUM_PAGES)))
    counts = draw(st.lists(st.integers(0, WIDTH), min_size=1, max_size=3))
    return [[pages.pop() for _ in range(count)] for count in counts]


def books(pages: list[list[int]], written: set[int]) -> tuple[Any, Shadow]:
    """A ledger with these page lists, and a shadow that knows these places."""
    table = np.zeros((len(pages), WIDTH), np.int32)
    for slot, mine in enumerate(pages):
        table[slot, : len(mine)] = mine
    shadow = Shadow(NUM_PAGES, PAGE_SIZE)
    places = np.array(sorted(written), np.intp)
    shadow.write(places, np.ones(len(places), np.uint32), np.zeros(len(places), np.int64))
    return SimpleNamespace(table=table, page_size=PAGE_SIZE), shadow


@given(held_pages(), st.sets(st.integers(0, NUM_PAGES * PAGE_SIZE - 1)))
def test_only_written_places_of_held_pages_are_chosen_no_more_than_decodes_and_each_in_its_turn(
    pages: list[list[int]], written: set[int]
) -> None:
    ledger, shadow = books(pages, written)
    slots = np.arange(len(pages))
    older = OlderPlaces(ledger, shadow)
    due = {place for mine in pages for page in mine for place in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)}
    due &= written
    chosen = [older.next_places(slots).tolist() for _ in range(NUM_PAGES * PAGE_SIZE)]
    assert all(len(step) <= len(slots) for step in chosen)
    assert {place for step in chosen for place in step} == due


@given(held_pages())
def test_a_page_that_is_taken_later_gets_its_turn(pages: list[list[int]]) -> None:
    ledger, shadow = books(pages, set(range(NUM_PAGES * PAGE_SIZE)))
    slots = np.arange(len(pages))
    older = OlderPlaces(ledger, shadow)
    for _ in range(5):
        older.next_places(slots)
    ledger.table[0, WIDTH - 1] = page = ledger.table[0, WIDTH - 1] or NUM_PAGES - 1
    steps = NUM_PAGES * PAGE_SIZE + 2 * STEPS_AHEAD
    chosen = {place for _ in range(steps) for place in older.next_places(slots).tolist()}
    assert set(range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)) <= chosen
