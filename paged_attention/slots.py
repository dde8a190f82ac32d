"""What the host counts for each slot of the decode batch, as columns: one array operation a step, not one a request."""

import sys
from array import array
from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from paged_attention.plan import UNKNOWN_TOKEN, Ints

NOBODY = -1
NEVER = 2**31 - 1
"""A turn that does not come."""

# The first eight are the fields of a plan's row.
REQUEST, ADMISSION, SLOT, COUNT, SAMPLES, POSITION, TOKEN, NUM_PAGES, KEY, END, LAST_STEP = range(11)
NUM_ROW_COLUMNS, NUM_COLUMNS = 8, 11


class Seated(NamedTuple):
    """Who has a token to come, by ascending slot; read-only, and the same object until somebody comes or goes."""

    lanes: NDArray[np.intp]
    """The prefill's lane, then the slots."""
    slots: NDArray[np.intp]
    request: Ints
    admission: Ints
    slot: Ints
    ones: Ints
    """Tokens that each of them writes and yields in a step."""
    key: Ints
    next_place: NDArray[np.intp]
    """Where each one's token at position 1 stands in `SlotTable.tokens`: that behind position p is p places on."""
    hands: int
    """How often slots had changed hands by then."""


class SlotTable:
    """Eleven int32 columns of width batch_size + 1, and the pages and tokens of whoever sits in each slot.

    The last lane is the prefill's: whatever row it has in the step at hand. So one `take` reads a whole plan.

    column      meaning                                                                     free slot
    request     request id                                                                  -1
    admission   admission number                                                            -1
    slot        the slot's own number                                                       the same
    count       tokens that a step writes                                                   1
    samples     tokens that a step yields                                                   1
    position    position of the token whose K/V the next step writes; -1: none to come      -1
    token       the token at `position`, UNKNOWN_TOKEN while it is on the device            -1
    num_pages   pages in use                                                                0
    key         serial number of the admission, unique in this engine                       -1
    end         the turn after which nothing is left to be planned                        NEVER
    last_step   the last step that ran the slot                                             -1

    A turn moves every seated slot on by one token. `pages[slot]` is its page list, then dummy pages.
    `history[slot, p]` is the token at position p, for the positions from where the slot was joined; `tokens` is the
    same array with one axis.
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
        self._next_place: NDArray[np.intp] = np.arange(batch_size) * self.history.shape[1] + 1
        """`next_place` of each slot, see `Seated`."""
        self.turns = 0
        self._hands = 0
        """How often a slot has been given to somebody or taken back."""
        self._running = array("q")
        """The slots that have a token to come, ascending."""
        self._advance: Int32[np.ndarray, " slots"] = np.zeros(batch_size, np.int32)
        """1 for each of them."""
        self._first_end = NEVER
        """No slot's end comes before this turn."""
        self.bind()

    def bind(self) -> None:
        """Name the slots' columns: views of `columns`, so that a step reads all of them at once; look anew who sits."""
        slots = self.columns[:, :-1]
        self.position: NDArray[np.int32] = slots[POSITION]
        self.num_pages: NDArray[np.int32] = slots[NUM_PAGES]
        self.token: NDArray[np.int32] = slots[TOKEN]
        self.key: NDArray[np.int32] = slots[KEY]
        self.end: NDArray[np.int32] = slots[END]
        self.last_step: NDArray[np.int32] = slots[LAST_STEP]
        self.tokens: NDArray[np.int32] = self.history.reshape(-1)
        self.nobody = self._frozen(b"")
        self._seated: Seated | None = None
        self._tables: tuple[Ints, Int32[np.ndarray, "rows pages"]] | None = None

    @property
    def seated(self) -> Seated:
        """Who has a token to come."""
        if self._seated is None:
            self._seated = self._frozen(self._running.tobytes())
        return self._seated

    def _frozen(self, running: bytes) -> Seated:
        lanes = np.frombuffer(len(self.position).to_bytes(8, sys.byteorder) + running, np.intp)
        slots = lanes[1:]
        columns, next_place = self.columns.take(slots, axis=1), self._next_place[slots]
        columns.setflags(write=False)
        next_place.setflags(write=False)
        return Seated(
            lanes,
            slots,
            columns[REQUEST],
            columns[ADMISSION],
            columns[SLOT],
            columns[COUNT],
            columns[KEY],
            next_place,
            self._hands,
        )

    def _seat(self, slot: int) -> None:
        insort(self._running, slot)
        self._change(slot, advance=1)

    def _unseat(self, slot: int) -> None:
        if self._advance[slot]:
            del self._running[bisect_left(self._running, slot)]
            self._change(slot, advance=0)

    def still_seats(self, seated: Seated) -> bool:
        """Whether no slot has changed hands since then."""
        return self._hands == seated.hands

    def tables(self, seated: Seated) -> tuple[Ints, Int32[np.ndarray, "rows pages"]]:
        """Page counts and page lists of the seated; the same arrays until one of them changes."""
        if self._tables is None:
            num_pages, pages = self.num_pages[seated.slots], self.pages.take(seated.slots, axis=0)
            num_pages.setflags(write=False)
            pages.setflags(write=False)
            self._tables = num_pages, pages
        return self._tables

    def forget_tables(self) -> None:
        """Look at the page lists anew: one of them has changed."""
        self._tables = None

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
        self.columns[:, slot] = (request, admission, slot, 1, 1, position, token, num_pages, key, end, last_step)
        self.history[slot, position] = token
        self._first_end = min(self._first_end, end)
        self._hands += 1
        self._seat(slot)

    def remaining(self, slot: int) -> int:
        """How many tokens of a seated slot are still to be planned."""
        return self.end.item(slot) - self.turns

    def stop(self, slot: int) -> None:
        """Let a slot run no further; whoever sits there stays until `clear`."""
        self.position[slot], self.end[slot] = NOBODY, NEVER
        self._unseat(slot)

    def clear(self, slot: int) -> None:
        """Make a slot nobody's."""
        self.columns[:, slot] = NOBODY, NOBODY, slot, 1, 1, NOBODY, UNKNOWN_TOKEN, 0, NOBODY, NEVER, NOBODY
        self._hands += 1
        self._unseat(slot)

    def _change(self, slot: int, advance: int) -> None:
        self._advance[slot] = advance
        self._seated = self._tables = None

    def advance(self, step: int) -> list[int]:
        """Move every seated slot on by one token; stop and return the slots that have none to come."""
        self.position += self._advance
        self.token.fill(UNKNOWN_TOKEN)
        self.last_step.fill(step)
        self.turns += 1
        if self.turns < self._first_end:
            return []
        spent: list[int] = (self.end == self.turns).nonzero()[0].tolist()
        for slot in spent:
            self.stop(slot)
        self._first_end = self.end.item(self.end.argmin())
        return spent

    def restore(self, seated: Seated, position: Ints, token: Ints, last_step: Ints) -> None:
        """Put back what was before an `advance`, for the slots that have not changed hands since.

        `position` and `token` are those of the seated, `last_step` the whole column.
        """
        same = (self.key[seated.slots] == seated.key).nonzero()[0]
        slots = seated.slots[same]
        self.position[slots], self.token[slots], self.last_step[slots] = position[same], token[same], last_step[slots]
        for slot in slots[self.end[slots] == NEVER].tolist():
            self.end[slot] = self.turns
            self._seat(slot)
        self.turns -= 1
        self._first_end = self.turns
