"""What attention is, without pages: softmax over everything that a token may see, in float64."""

from __future__ import annotations

import numpy as np


def attend(query, keys, values, scale: float):
    """Grouped-query attention of the newest rows of one sequence.

    `query` (rows, query_heads, head_dim) stands at the last `rows` positions of keys and values (positions, kv_heads,
    head_dim); query head h reads K and V head h // (query_heads // kv_heads).
    """
    query, keys, values = (np.asarray(array, np.float64) for array in (query, keys, values))
    rows, query_heads, _ = query.shape
    mixed = np.zeros_like(query)
    for row in range(rows):
        seen = len(keys) - rows + row + 1
        for head in range(query_heads):
            kv_head = head // (query_heads // keys.shape[1])
            score = keys[:seen, kv_head] @ query[row, head] * scale
            weight = np.exp(score - score.max())
            mixed[row, head] = weight @ values[:seen, kv_head] / weight.sum()
    return mixed
