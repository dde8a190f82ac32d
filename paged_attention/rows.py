"""Turns the host's columns into the rows of a `StepPlan`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from paged_attention.plan import Effect, StepPlan
from paged_attention.requests import NextIterationPlan
from paged_attention.sequences import Sequence
from paged_attention.slots import NOBODY, NUM_ROW_COLUMNS, TOKEN, SlotTable


def make_plan(
    step: int,
    table: SlotTable,
    prefill: Sequence | None,
    chunk: int,
    effects: tuple[Effect, ...],
    native: NextIterationPlan,
) -> tuple[StepPlan, Int32[np.ndarray, "11 rows"]]:
    """Make a plan of every running slot, where decodes are scheduled, behind one prefill row where there is one.

    Also returned: the columns of its rows, as the table has them now.
    """
    fed = None
    if prefill is not None:
        start = prefill.fed
        count = min(chunk, prefill.num_fed_tokens - start)
        samples = int(start + count == prefill.num_fed_tokens)
        num_pages = len(prefill.pages)
        table.columns[:NUM_ROW_COLUMNS, -1] = (
            prefill.request.id, prefill.admission, NOBODY, start, count, samples, num_pages, 0
        )  # fmt: skip
        table.pages[-1] = native.prefill_request.page_indices
        fed = prefill.prefill.token_ids[start : start + count]
    lanes = table.lanes(prefill=fed is not None, decodes=native.schedule_decodes)
    columns, pages = table.columns.take(lanes, axis=1), table.pages.take(lanes, axis=0)
    tokens = columns[TOKEN] if fed is None else np.concatenate((fed, columns[TOKEN, 1:]))
    for array in (columns, tokens, pages):
        array.flags.writeable = False
    request, admission, slot, starts, counts, sampled, sizes, _ = columns[:NUM_ROW_COLUMNS]
    plan = StepPlan(step, request, admission, slot, starts, counts, sampled, tokens, sizes, pages, effects, native)
    return plan, columns
