"""Which places are looked at beside those that a step writes: pages in turn, so that none waits for ever."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from numpy.typing import NDArray

from invariants.ledger import Ledger

STEPS_AHEAD = 32
"""For so many steps places are chosen at once. Who ends meanwhile does no harm: the shadow knows every place."""


class FramePlaces:
    """Whole pages that running decodes hold, written or not: half of them their newest, by slot; half any, by page id.

    Places of one page lie side by side, so that reading them costs a fraction of what as many scattered ones do.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._offsets = np.arange(ledger.page_size, dtype=np.int32)
        self._chosen: NDArray[np.int32] = np.zeros(0, np.int32)
        self._next = 0
        self._slot = self._page = 0
        """The newest slot and page chosen."""

    def next_places(self, slots: Int[ndarray, " decodes"]) -> Int[ndarray, " places"]:
        """As many as there are decode rows; fewer where these hold no more, and at the end of a round."""
        if self._next >= len(self._chosen):
            self._chosen, self._next = self._choose(slots), 0
        first, self._next = self._next, self._next + len(slots)
        return self._chosen[first : self._next]

    def _choose(self, slots: Int[ndarray, " decodes"]) -> NDArray[np.int32]:
        """The places of the next pages, for some steps; of all pages, where there are no more."""
        ledger = self.ledger
        half = max(len(slots) * STEPS_AHEAD // ledger.page_size // 2, 1)
        in_turn = _after(slots, self._slot)[:half]
        held = np.flatnonzero(np.bincount(self._of_the_pool(ledger.table.take(slots, axis=0)), minlength=1))
        pages = _after(held, self._page)[:half]
        if len(in_turn):
            self._slot = int(in_turn[-1])
        if len(pages):
            self._page = int(pages[-1])
        newest = self._of_the_pool(ledger.newest_page.take(in_turn))
        both = np.concatenate((newest, pages.astype(np.int32)))
        return (both[:, None] * np.array(ledger.page_size, np.int32) + self._offsets).reshape(-1)

    def _of_the_pool(self, pages: Int[ndarray, "..."]) -> Int[ndarray, " some"]:
        """The pages that can be looked at: not the dummy, which pads tables, and none that a broken core made up."""
        return pages[(pages > 0) & (pages < self.ledger.policy.num_pages)]


def _after(ascending: Int[ndarray, " n"], newest: int) -> Int[ndarray, " n"]:
    """All of them, from the first one above `newest` on, round and round."""
    return np.roll(ascending, -int(np.searchsorted(ascending, newest, side="right")))
