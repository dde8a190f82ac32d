"""What the Pallas page writer promises beyond any run: none takes a page outside the pool to the device."""

from __future__ import annotations

import numpy as np


def pallas_guard() -> list[str]:
    """SEED-25: rows whose page lies outside the pool write nothing and raise nothing; the others are written."""
    import jax
    import jax.numpy as jnp

    from backends.pallas_mode import forget_raised, interpreted
    from backends.pallas_writer import write_rows

    num_pages, page_size, outside = 6, 4, [6, 99, -1, -6, 2**30]
    page = np.array([2, *outside], np.int32)
    pool = jnp.zeros((2, num_pages, page_size, 8), jnp.float32)
    rows = jnp.ones((len(page), 2, 8), jnp.float32)
    position = np.full(len(page), 3, np.int32)

    def body(pools: list[jax.Array]) -> list[jax.Array]:
        return write_rows(position, page[:, None], [rows, -rows], pools)

    try:
        with interpreted():
            written = [np.asarray(pool) for pool in jax.jit(body)([pool, pool])]
    except Exception as error:
        forget_raised()
        return [f"pages {outside} of a pool of {num_pages} are left out: found {type(error).__name__}: {error}"]
    broken: list[str] = []
    for name, found, word in zip("KV", written, (1, -1), strict=True):
        expected = np.zeros(pool.shape, np.float32)
        expected[:, 2, 3] = word
        places = sorted({place[1:3] for place in map(tuple, np.argwhere(found != expected).tolist())})
        if places:
            broken.append(f"only page 2, offset 3 is written: {name} differs at (page, offset) {places[:8]}")
    return broken
