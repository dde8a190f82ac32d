"""What the host counts for each slot of the decode batch, as columns: one array operation a step, not one a request."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from paged_attention.plan import UNKNOWN_TOKEN

NOBODY = -1

# The first eight are the fields of a plan's decode row, in its order.
REQUEST, ADMISSION, SLOT, POSITION, COUNT, SAMPLES, NUM_PAGES, TOKEN, KEY, REMAINING, LAST_STEP = range(11)
NUM_ROW_COLUMNS, NUM_COLUMNS = 8, 11


class SlotTable:
    """Eleven int32 columns of width batch_size, and the tokens of whoever sits in each slot.

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
    remaining   tokens still to be planned; -1: none to come                                -1
    last_step   the last step that ran the slot                                             -1

    `history[slot, p]` is the token at position p, for the positions from where the slot was joined.
    `num_changes` counts who came and went.
    """

    def __init__(self, batch_size: int, max_sequence_length: int) -> None:
        self.columns: Int32[np.ndarray, "11 slots"] = np.full((NUM_COLUMNS, batch_size), NOBODY, np.int32)
        self.columns[SLOT] = np.arange(batch_size)
        self.columns[COUNT] = self.columns[SAMPLES] = 1
        self.columns[NUM_PAGES] = 0
        # Position max_sequence_length is sampled but never written.
        self.history: Int32[np.ndarray, "slots positions"] = np.zeros((batch_size, max_sequence_length + 1), np.int32)
        self.num_changes = 0
        self._advance: Int32[np.ndarray, " slots"] = np.zeros(batch_size, np.int32)
        self._running: NDArray[np.intp] | None = None
        self.bind()

    def bind(self) -> None:
        """Name the columns: views of `columns`, so that a step reads all of them at once."""
        self.position: NDArray[np.int32] = self.columns[POSITION]
        self.num_pages: NDArray[np.int32] = self.columns[NUM_PAGES]
        self.token: NDArray[np.int32] = self.columns[TOKEN]
        self.key: NDArray[np.int32] = self.columns[KEY]
        self.remaining: NDArray[np.int32] = self.columns[REMAINING]
        self.last_step: NDArray[np.int32] = self.columns[LAST_STEP]

    def running(self) -> NDArray[np.intp]:
        """Slots with a token to come, ascending."""
        if self._running is None:
            self._running = self.position.__ge__(0).nonzero()[0]
        return self._running

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
        """Seat an admission in a free slot."""
        self.columns[:, slot] = (
            request, admission, slot, position, 1, 1, num_pages, token, key, remaining, last_step
        )  # fmt: skip
        self.history[slot, position] = token
        self._change(slot, advance=1)

    def stop(self, slot: int) -> None:
        """Let a slot run no further; whoever sits there stays until `clear`."""
        self.position[slot] = self.remaining[slot] = NOBODY
        self._change(slot, advance=0)

    def clear(self, slot: int) -> None:
        """Make a slot nobody's."""
        self.columns[:, slot] = NOBODY, NOBODY, slot, NOBODY, 1, 1, 0, UNKNOWN_TOKEN, NOBODY, NOBODY, NOBODY
        self._change(slot, advance=0)

    def _change(self, slot: int, advance: int) -> None:
        self._advance[slot] = advance
        self._running = None
        self.num_changes += 1

    def advance(self, step: int) -> list[int]:
        """Move every running slot on by one token; stop and return the slots that have none to come."""
        self.position += self._advance
        self.remaining -= self._advance
        self.token.fill(UNKNOWN_TOKEN)
        self.last_step.fill(step)
        spent: list[int] = (self.remaining == 0).nonzero()[0].tolist()
        for slot in spent:
            self.stop(slot)
        return spent

    def restore(self, slots: NDArray[np.intp], columns: Int32[np.ndarray, "11 rows"]) -> None:
        """Put back what `columns` were before an `advance`, for the slots that have not changed hands since."""
        kept = (self.key[slots] == columns[KEY]).nonzero()[0]
        self.columns[:, slots[kept]] = columns[:, kept]
        self._advance[slots[kept]] = 1
        self._running = None
        self.num_changes += 1
