"""Which older tokens are looked at beside those that a step writes: page after page, so that none waits for ever."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from numpy.typing import NDArray

from invariants.ledger import Ledger
from invariants.shadow import Shadow

STEPS_AHEAD = 64
"""For so many steps places are chosen at once. Who ends meanwhile does no harm: the shadow knows every place."""


class OlderPlaces:
    """The written places of the pages that running decodes hold, in turn by page id, round and round.

    Places of one page lie side by side, so that reading them costs a fraction of what as many scattered ones do.
    """

    def __init__(self, ledger: Ledger, shadow: Shadow) -> None:
        self.ledger, self.shadow = ledger, shadow
        self._offsets = np.arange(ledger.page_size, dtype=np.int32)
        self._chosen: NDArray[np.int32] = np.zeros(0, np.int32)
        self._next = 0
        self._page = 0
        """The newest page chosen."""

    def next_places(self, slots: Int[ndarray, " decodes"]) -> Int[ndarray, " places"]:
        """As many as there are decode rows; fewer where these hold no more, and at the end of a round."""
        if self._next >= len(self._chosen):
            self._chosen, self._next = self._choose(slots), 0
        first, self._next = self._next, self._next + len(slots)
        return self._chosen[first : self._next]

    def _choose(self, slots: Int[ndarray, " decodes"]) -> NDArray[np.int32]:
        """The next pages, for some steps; all of them, where there are no more."""
        held = self.ledger.table.take(slots, axis=0)
        # Padding of a table is page 0, which nobody holds.
        pages = np.unique(held[held > 0])
        turned = np.roll(pages, -int(np.searchsorted(pages, self._page, side="right")))
        turned = turned[: -(-len(slots) * STEPS_AHEAD // self.ledger.page_size)]
        if len(turned):
            self._page = int(turned[-1])
        places = (turned[:, None] * np.array(self.ledger.page_size, np.int32) + self._offsets).reshape(-1)
        return places[self.shadow.ids.take(places) != 0]
