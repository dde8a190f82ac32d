"""What of a plan explains how long its step takes on a device."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np

from paged_attention.plan import StepPlan

Kind = Literal["prefill", "decode", "mixed"]
"""Which rows a step has: with them the compiled program changes, and with it everything."""

KINDS: Final[tuple[Kind, ...]] = ("prefill", "decode", "mixed")
FEATURES: Final = ("prefill_tokens", "decodes", "context_tokens", "prefill_pairs")
"""prefill_tokens: of rows that prefill; decodes: rows that decode; context_tokens: K/V that all rows read, those of the
step included; prefill_pairs: (token, token that it attends to) of rows that prefill."""


def features(plan: StepPlan) -> tuple[Kind, tuple[int, ...]]:
    """The kind of a step and its FEATURES."""
    start, count = plan.start, plan.count
    prefills = (plan.slot < 0) | (count != 1)
    num_prefills = int(np.count_nonzero(prefills))
    num_decodes = plan.num_rows - num_prefills
    context = int(start.sum(dtype=np.int64) + count.sum(dtype=np.int64))
    if not num_prefills:
        return "decode", (0, num_decodes, context, 0)
    first, length = start[prefills].astype(np.int64), count[prefills].astype(np.int64)
    tokens = int(length.sum())
    # The token at position p attends to p + 1 tokens.
    pairs = int(first @ length) + (int(length @ length) + tokens) // 2
    return "mixed" if num_decodes else "prefill", (tokens, num_decodes, context, pairs)
