"""What the host counts for each slot of the decode batch, as columns: one array operation a step, not one a request."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

NOBODY = -1

_COLUMNS = ("request", "admission", "key", "position", "num_pages", "token", "remaining", "last_step")


class SlotTable:
    """Eight int32 columns of width batch_size, and the tokens of whoever sits in each slot.

    column      meaning                                                                     free slot
    request     request id                                                                  -1
    admission   admission number                                                            -1
    key         serial number of the admission, unique in this engine                       -1
    position    position of the token whose K/V the next step writes                        -1
    num_pages   pages in use                                                                 0
    token       the token at `position`, UNKNOWN_TOKEN while it is on the device            -1
    remaining   tokens still to be planned                                                  -1
    last_step   the last step that ran the slot                                             -1

    `history[slot, p]` is the token at position p, for the positions that the slot itself has sampled.
    """

    def __init__(self, batch_size: int, max_sequence_length: int) -> None:
        self.columns: Int32[np.ndarray, "8 slots"] = np.full((len(_COLUMNS), batch_size), NOBODY, np.int32)
        # Position max_sequence_length is sampled but never written.
        self.history: Int32[np.ndarray, "slots positions"] = np.zeros((batch_size, max_sequence_length + 1), np.int32)
        self.bind()
        self.num_pages[:] = 0

    def bind(self) -> None:
        """Name the columns: views of `columns`, so that a step reads all of them at once."""
        self.request: NDArray[np.int32] = self.columns[0]
        self.admission: NDArray[np.int32] = self.columns[1]
        self.key: NDArray[np.int32] = self.columns[2]
        self.position: NDArray[np.int32] = self.columns[3]
        self.num_pages: NDArray[np.int32] = self.columns[4]
        self.token: NDArray[np.int32] = self.columns[5]
        self.remaining: NDArray[np.int32] = self.columns[6]
        self.last_step: NDArray[np.int32] = self.columns[7]

    def clear(self, slot: int) -> None:
        """Make a slot nobody's."""
        self.columns[:, slot] = NOBODY
        self.num_pages[slot] = 0
