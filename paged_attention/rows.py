"""Turns the host's columns into the rows of a `StepPlan`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from paged_attention.plan import Effect, StepPlan
from paged_attention.requests import NextIterationPlan
from paged_attention.sequences import Sequence
from paged_attention.slots import NOBODY, NUM_PAGES, NUM_ROW_COLUMNS, TOKEN


def make_plan(
    step: int,
    slots: NDArray[np.intp],
    columns: Int32[np.ndarray, "11 rows"],
    page_table: Int32[np.ndarray, "slots max_num_pages"],
    prefill: Sequence | None,
    chunk: int,
    effects: tuple[Effect, ...],
    native: NextIterationPlan,
) -> StepPlan:
    """Make a plan of the decode rows of `slots`, behind one prefill row where there is one.

    `columns` is a fresh copy of the slots' columns of the `SlotTable`; `page_table` is the whole host batch's.
    """
    block = columns[:NUM_ROW_COLUMNS]
    tokens = columns[TOKEN]
    if prefill is None:
        table = page_table[slots, : block[NUM_PAGES].max()]
    else:
        start = prefill.fed
        count = min(chunk, prefill.num_fed_tokens - start)
        samples = int(start + count == prefill.num_fed_tokens)
        num_pages = len(prefill.pages)
        tokens = np.concatenate((prefill.prefill.token_ids[start : start + count], tokens), dtype=np.int32)
        block = np.empty((NUM_ROW_COLUMNS, 1 + len(slots)), np.int32)
        block[:, 1:] = columns[:NUM_ROW_COLUMNS]
        block[:, 0] = (
            prefill.request.id, prefill.admission, NOBODY, start, count, samples, num_pages, 0
        )  # fmt: skip
        table = np.zeros((1 + len(slots), block[NUM_PAGES].max()), np.int32)
        table[0, :num_pages] = prefill.pages
        table[1:] = page_table[slots, : table.shape[1]]
    for array in (block, tokens, table):
        array.flags.writeable = False
    request, admission, slot, start_of, count_of, samples_of, num_pages_of, _ = block
    return StepPlan(
        step, request, admission, slot, start_of, count_of, samples_of, tokens, num_pages_of, table, effects, native
    )
