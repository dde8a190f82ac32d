"""What the host counts for each slot of the decode batch, as columns: one array operation a step, not one a request."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from paged_attention.plan import UNKNOWN_TOKEN

NOBODY = -1
NEVER = 2**31 - 1
"""A turn that does not come."""

# The first eight are the fields of a plan's row, in its order.
REQUEST, ADMISSION, SLOT, POSITION, COUNT, SAMPLES, NUM_PAGES, TOKEN, KEY, END, LAST_STEP = range(11)
NUM_ROW_COLUMNS, NUM_COLUMNS = 8, 11


class SlotTable:
    """Eleven int32 columns of width batch_size + 1, and the pages and tokens of whoever sits in each slot.

    The last lane is the prefill's: whatever row it has in the step at hand. So one `take` reads a whole plan.

    column      meaning                                                                     free slot
    request     request id                                                                  -1
    admission   admission number                                                            -1
    slot        the slot's own number                                                       the same
    position    position of the token whose K/V the next step writes; -1: none to come      -1
    count       tokens that a step writes                                                   1
    samples     tokens that a step yields                                                   1
    num_pages   pages in use                                                                0
    token       the token at `position`, UNKNOWN_TOKEN while it is on the device            -1
    key         serial number of the admission, unique in this engine                       -1
    end         the turn after which nothing is left to be planned                        NEVER
    last_step   the last step that ran the slot                                             -1

    A turn moves every running slot on by one token. `pages[slot]` is its page list, then dummy pages.
    `history[slot, p]` is the token at position p, for the positions from where the slot was joined. `num_changes`
    counts who came and went.
    """

    def __init__(self, batch_size: int, max_sequence_length: int, max_num_pages: int) -> None:
        self.columns: Int32[np.ndarray, "11 lanes"] = np.full((NUM_COLUMNS, batch_size + 1), NOBODY, np.int32)
        self.columns[SLOT, :-1] = np.arange(batch_size)
        self.columns[COUNT] = self.columns[SAMPLES] = 1
        self.columns[NUM_PAGES] = 0
        self.columns[END] = NEVER
        self.pages: Int32[np.ndarray, "lanes pages"] = np.zeros((batch_size + 1, max_num_pages), np.int32)
        # Position max_sequence_length is sampled but never written.
        self.history: Int32[np.ndarray, "slots positions"] = np.zeros((batch_size, max_sequence_length + 1), np.int32)
        self.num_changes = 0
        self._advance: Int32[np.ndarray, " slots"] = np.zeros(batch_size, np.int32)
        self._lanes: NDArray[np.intp] | None = None
        self.turns = 0
        self._first_end = NEVER
        """No slot's end comes before this turn."""
        self.bind()

    def bind(self) -> None:
        """Name the slots' columns: views of `columns`, so that a step reads all of them at once."""
        slots = self.columns[:, :-1]
        self.position: NDArray[np.int32] = slots[POSITION]
        self.num_pages: NDArray[np.int32] = slots[NUM_PAGES]
        self.token: NDArray[np.int32] = slots[TOKEN]
        self.key: NDArray[np.int32] = slots[KEY]
        self.end: NDArray[np.int32] = slots[END]
        self.last_step: NDArray[np.int32] = slots[LAST_STEP]

    def lanes(self, *, prefill: bool, decodes: bool) -> NDArray[np.intp]:
        """The lanes of a step: the prefill's, then the slots with a token to come, ascending."""
        if self._lanes is None:
            self._lanes = np.concatenate(([len(self.position)], self.position.__ge__(0).nonzero()[0]))
        return self._lanes[0 if prefill else 1 : None if decodes else 1]

    def join(
        self,
        slot: int,
        request: int,
        admission: int,
        position: int,
        num_pages: int,
        token: int,
        key: int,
        remaining: int,
        last_step: int,
    ) -> None:
        """Seat an admission in a free slot; `remaining` of its tokens are still to be planned."""
        end = self.turns + remaining
        self.columns[:, slot] = (request, admission, slot, position, 1, 1, num_pages, token, key, end, last_step)
        self.history[slot, position] = token
        self._first_end = min(self._first_end, end)
        self._change(slot, advance=1)

    def remaining(self, slot: int) -> int:
        """How many tokens of a running slot are still to be planned."""
        return self.end.item(slot) - self.turns

    def stop(self, slot: int) -> None:
        """Let a slot run no further; whoever sits there stays until `clear`."""
        self.position[slot], self.end[slot] = NOBODY, NEVER
        self._change(slot, advance=0)

    def clear(self, slot: int) -> None:
        """Make a slot nobody's."""
        self.columns[:, slot] = NOBODY, NOBODY, slot, NOBODY, 1, 1, 0, UNKNOWN_TOKEN, NOBODY, NEVER, NOBODY
        self._change(slot, advance=0)

    def _change(self, slot: int, advance: int) -> None:
        self._advance[slot] = advance
        self._lanes = None
        self.num_changes += 1

    def advance(self, step: int) -> list[int]:
        """Move every running slot on by one token; stop and return the slots that have none to come."""
        self.position += self._advance
        self.token.fill(UNKNOWN_TOKEN)
        self.last_step.fill(step)
        self.turns += 1
        if self.turns < self._first_end:
            return []
        spent: list[int] = (self.end == self.turns).nonzero()[0].tolist()
        for slot in spent:
            self.stop(slot)
        self._first_end = int(self.end.min())
        return spent

    def restore(self, columns: Int32[np.ndarray, "11 rows"]) -> None:
        """Put back what `columns` were before an `advance`, for the slots that have not changed hands since."""
        columns = columns[:, self.key[columns[SLOT]] == columns[KEY]]
        self.columns[:, columns[SLOT]] = columns
        self._advance[columns[SLOT]] = 1
        self.turns -= 1
        self._first_end = self.turns
        self._lanes = None
        self.num_changes += 1
