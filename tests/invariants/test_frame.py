"""Which places are compared beside those that a step writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from invariants.frame import STEPS_AHEAD, FramePlaces

PAGE_SIZE, NUM_PAGES, WIDTH = 2, 10, 3
MANY_PAGES = 4096
"""Of the pool: more than are ever held here."""
ROUND = NUM_PAGES * PAGE_SIZE + 2 * STEPS_AHEAD
"""Steps after which each page had its turn."""


@st.composite
def held_pages(draw: st.DrawFn) -> list[list[int]]:
    """The pages of each slot, none of them twice."""
    pages = draw(st.permutations(range(1, NUM_PAGES)))
    counts = draw(st.lists(st.integers(0, WIDTH), min_size=1, max_size=3))
    return [[pages.pop() for _ in range(count)] for count in counts]


def books(pages: list[list[int]], page_size: int = PAGE_SIZE) -> Any:
    """A ledger with these page lists."""
    table = np.zeros((len(pages), WIDTH), np.int32)
    for slot, mine in enumerate(pages):
        table[slot, : len(mine)] = mine
    newest = np.array([mine[-1] if mine else 0 for mine in pages], np.int32)
    policy = SimpleNamespace(num_pages=MANY_PAGES)
    return SimpleNamespace(policy=policy, table=table, newest_page=newest, page_size=page_size)


@given(held_pages())
def test_all_places_of_held_pages_are_chosen_and_no_others_no_more_at_once_than_decodes(pages: list[list[int]]) -> None:
    slots = np.arange(len(pages))
    frame = FramePlaces(books(pages))
    due = {place for mine in pages for page in mine for place in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)}
    chosen = [frame.next_places(slots).tolist() for _ in range(ROUND)]
    assert all(len(step) <= len(slots) for step in chosen)
    assert {place for step in chosen for place in step} == due


@given(held_pages())
def test_a_page_that_is_taken_later_gets_its_turn(pages: list[list[int]]) -> None:
    ledger = books(pages)
    slots = np.arange(len(pages))
    frame = FramePlaces(ledger)
    for _ in range(5):
        frame.next_places(slots)
    ledger.table[0, WIDTH - 1] = page = ledger.table[0, WIDTH - 1] or NUM_PAGES - 1
    chosen = {place for _ in range(ROUND) for place in frame.next_places(slots).tolist()}
    assert set(range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)) <= chosen


@given(st.integers(1, 40), st.sampled_from([1, 4, 16, 64]))
def test_the_newest_page_of_each_decode_is_looked_at_again_and_again(decodes: int, page_size: int) -> None:
    slots = np.arange(decodes)
    ledger = books([[1 + slot] for slot in range(decodes)], page_size)
    # Many pages beside, so that a turn by page id alone would take long to come round.
    ledger.table = np.arange(1, 1 + decodes * 50, dtype=np.int32).reshape(decodes, 50)
    frame = FramePlaces(ledger)
    turns = -(-2 * page_size // STEPS_AHEAD) + 1
    chosen = np.concatenate([frame.next_places(slots) for _ in range(turns * max(STEPS_AHEAD, 2 * page_size))])
    assert set(range(page_size, (1 + decodes) * page_size)) <= set(chosen.tolist())


@given(held_pages(), st.integers(0, 2), st.sampled_from([-1, MANY_PAGES, 2**31 - 1]))
def test_a_page_outside_the_pool_is_not_looked_at(pages: list[list[int]], at: int, outside: int) -> None:
    ledger = books(pages)
    ledger.table[0, at] = ledger.newest_page[0] = outside
    frame = FramePlaces(ledger)
    chosen = np.concatenate([frame.next_places(np.arange(len(pages))) for _ in range(ROUND)])
    assert set((chosen // PAGE_SIZE).tolist()) == {int(page) for page in ledger.table.flat if 0 < page < MANY_PAGES}
