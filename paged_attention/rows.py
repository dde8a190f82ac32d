"""Turns the host's columns into the rows of a `StepPlan`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from paged_attention.plan import Effect, StepPlan
from paged_attention.requests import NextIterationPlan
from paged_attention.sequences import Sequence
from paged_attention.slots import NOBODY


def make_plan(
    step: int,
    slots: Int32[np.ndarray, " decode_rows"],
    columns: Int32[np.ndarray, "8 decode_rows"],
    page_table: Int32[np.ndarray, "slots max_num_pages"],
    prefill: Sequence | None,
    chunk: int,
    effects: tuple[Effect, ...],
    native: NextIterationPlan,
) -> StepPlan:
    """Copy one prefill row (where there is one) and the decode rows of `slots` into a plan.

    `columns` are the slots' columns of the `SlotTable`; `page_table` is the whole host batch's.
    """
    first = 1 if prefill else 0
    block = np.ones((7, first + len(slots)), np.int32)
    block[:2, first:] = columns[:2]
    block[2, first:] = slots
    block[3, first:] = columns[3]
    block[6, first:] = columns[4]
    tokens = columns[5].copy()
    if prefill:
        start = prefill.fed
        count = min(chunk, prefill.num_fed_tokens - start)
        samples = int(start + count == prefill.num_fed_tokens)
        block[:, 0] = (
            prefill.request.id, prefill.admission, NOBODY, start, count, samples, len(prefill.pages)
        )  # fmt: skip
        tokens = np.concatenate((prefill.prefill.token_ids[start : start + count], tokens), dtype=np.int32)
    width = int(block[6].max())
    table = np.zeros((block.shape[1], width), np.int32)
    table[first:] = page_table[slots, :width]
    if prefill:
        table[0, : len(prefill.pages)] = prefill.pages
    for array in (block, tokens, table):
        array.setflags(write=False)
    request, admission, slot, start_of, count_of, samples_of, num_pages = block
    return StepPlan(
        step, request, admission, slot, start_of, count_of, samples_of, tokens, num_pages, table, effects, native
    )
