"""What the Pallas page writer promises beyond any run: none takes a page outside the pool to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from jaxtyping import Shaped


def pallas_guard() -> list[str]:
    """SEED-25: rows whose page lies outside the pool write nothing and raise nothing; the others are written."""
    import jax
    import jax.numpy as jnp

    from backends.pallas_mode import forget_raised, interpreted
    from backends.pallas_writer import write_slots
    from paged_attention.layout import HEADS_FIRST

    num_pages, page_size, outside = 6, 4, [6, 99, -1, -6, 2**30]
    table = jnp.array([[2], *([page] for page in outside)], jnp.int32)
    position = jnp.full(len(table), 3, jnp.int32)
    rows = jnp.ones((len(table), 2, 8), jnp.float32)
    pool = jnp.zeros((2, num_pages, page_size, 8), jnp.float32)

    def body(pools: list[Any]) -> list[Any]:
        return write_slots(HEADS_FIRST, pools, [rows, -rows], position, table, page_size)

    try:
        with interpreted():
            compiled = cast("Callable[[list[Any]], list[Any]]", jax.jit(body))
            found: Shaped[np.ndarray, "kinds heads pages page_size head_dim"] = np.stack(compiled([pool, pool]))
    except Exception as error:
        forget_raised()
        return [f"pages {outside} of a pool of {num_pages} are left out: found {type(error).__name__}: {error}"]
    expected = np.zeros(found.shape, np.float32)
    expected[0, :, 2, 3], expected[1, :, 2, 3] = 1, -1
    places = np.unique(np.argwhere(found != expected)[:, [0, 2, 3]], axis=0)
    return [f"only page 2, offset 3 changes: found (K|V, page, offset) {wrong} otherwise" for wrong in places.tolist()]
