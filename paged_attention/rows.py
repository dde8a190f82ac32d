"""Turns the host's columns into the rows of a `StepPlan`."""

from __future__ import annotations

import numpy as np

from paged_attention.plan import UNKNOWN_TOKEN, Effect, StepPlan
from paged_attention.requests import NextIterationPlan
from paged_attention.sequences import Sequence
from paged_attention.slots import (
    ADMISSION,
    COUNT,
    NOBODY,
    NUM_PAGES,
    NUM_ROW_COLUMNS,
    POSITION,
    REQUEST,
    SAMPLES,
    SLOT,
    TOKEN,
    Seated,
    SlotTable,
)


def decode_rows(
    step: int, table: SlotTable, seated: Seated, effects: tuple[Effect, ...], native: NextIterationPlan
) -> StepPlan:
    """Make a plan of the seated alone; columns that have not changed are those of the plan before."""
    _, slots, request, admission, slot, ones, _, _, _ = seated
    start, tokens = table.position[slots], table.token[slots]
    start.setflags(write=False)
    tokens.setflags(write=False)
    num_pages, pages = table.tables(seated)
    return StepPlan(step, request, admission, slot, start, ones, ones, tokens, num_pages, pages, effects, native)


def mixed_rows(
    step: int,
    table: SlotTable,
    seated: Seated,
    prefill: Sequence,
    chunk: int,
    effects: tuple[Effect, ...],
    native: NextIterationPlan,
) -> StepPlan:
    """Make a plan of the next chunk of a prefill and of the seated."""
    start, total = prefill.fed, prefill.num_fed_tokens
    count = min(chunk, total - start)
    samples = int(start + count == total)
    num_pages = len(prefill.pages)
    table.columns[:NUM_ROW_COLUMNS, -1] = (
        prefill.request.id, prefill.admission, NOBODY, count, samples, start, UNKNOWN_TOKEN, num_pages
    )  # fmt: skip
    table.pages[-1] = native.prefill_request.page_indices
    columns, pages = table.columns[:NUM_ROW_COLUMNS].take(seated.lanes, axis=1), table.pages.take(seated.lanes, axis=0)
    tokens = np.concatenate((prefill.prefill.token_ids[start : start + count], columns[TOKEN, 1:]))
    for array in (columns, tokens, pages):
        array.setflags(write=False)
    return StepPlan(
        step,
        columns[REQUEST],
        columns[ADMISSION],
        columns[SLOT],
        columns[POSITION],
        columns[COUNT],
        columns[SAMPLES],
        tokens,
        columns[NUM_PAGES],
        pages,
        effects,
        native,
    )
