"""How K/V of a step reach their pages: one function a part for NumPy, one for JAX.

    prefill  row i of the chunk is the token at position[i]; it is real where position[i] < length
    decodes  row s is the token that slot s writes at position[s]; it is real where position[s] >= 0
    place    of the token at position p: page table[p // page_size], offset p % page_size

`pools` and `tokens` are matching lists of arrays (K, V, and the scales of both where pages are quantised): pools in the
order of a layout's axes, tokens as (tokens, heads, *rest). Rows that are not real are dropped.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from paged_attention.layout import Layout

Pools = list[Any]
Tokens = list[Any]


class Part(NamedTuple):
    """One part of a step's writes: how it is checked, and done in NumPy and JAX."""

    check: Callable[..., None]
    numpy: Callable[..., Pools]
    jax: Callable[..., Pools]


def check_pages(pages: Int32[np.ndarray, " n"], num_pages: int) -> None:
    """ValueError: a page id is outside the pool; JAX would clamp it, or wrap it around to another page."""
    wrong = pages[(pages < 0) | (pages >= num_pages)]
    if wrong.size:
        raise ValueError(f"page ids must lie in 0..{num_pages - 1}, the pages of a layer; found {wrong.tolist()[:8]}")


def check_logical(logical: Int32[np.ndarray, " n"], num_entries: int) -> None:
    """ValueError: a token lies beyond the page table of its sequence."""
    if logical.size and logical.max() >= num_entries:
        raise ValueError(
            f"a page table of {num_entries} entries has no place for a token on logical page {logical.max()}: "
            f"give the sequence more pages before the step"
        )


def check_prefill(position: Any, length: Any, table: Any, page_size: int, num_pages: int) -> None:
    """ValueError: a real row of the chunk has no place in the pool."""
    logical = position[position < length] // page_size
    check_logical(logical, len(table))
    check_pages(table[logical], num_pages)


def check_decodes(position: Any, table: Any, page_size: int, num_pages: int) -> None:
    """ValueError: a live slot's token has no place in the pool."""
    slots = np.flatnonzero(position >= 0)
    logical = position[slots] // page_size
    check_logical(logical, table.shape[1])
    check_pages(table[slots, logical], num_pages)


def write_prefill_numpy(
    layout: Layout, pools: Pools, tokens: Tokens, position: Any, length: Any, table: Any, page_size: int
) -> Pools:
    """Copies of `pools` with each real row of a chunk at its place: the obvious loop."""
    written = [pool.copy() for pool in pools]
    for pool, rows in zip(written, tokens, strict=True):
        for row, place in enumerate(position.tolist()):
            if place < length:
                pool[layout.index(table[place // page_size], place % page_size)] = rows[row]
    return written


def write_decodes_numpy(
    layout: Layout, pools: Pools, tokens: Tokens, position: Any, table: Any, page_size: int
) -> Pools:
    """Copies of `pools` with each live slot's token at its place: the obvious loop."""
    written = [pool.copy() for pool in pools]
    for pool, rows in zip(written, tokens, strict=True):
        for slot, place in enumerate(position.tolist()):
            if place >= 0:
                pool[layout.index(table[slot, place // page_size], place % page_size)] = rows[slot]
    return written


def write_prefill_jax(
    layout: Layout, pools: Pools, tokens: Tokens, position: Any, length: Any, table: Any, page_size: int
) -> Pools:
    """`pools` with a chunk's rows at their places, page by page; rows follow one another from position[0].

    A page is read, merged and put back, so that what an earlier chunk wrote to its first part stays. A page id outside
    the pool writes nothing.
    """
    import jax.numpy as jnp
    from jax import lax

    num_rows, num_pages = position.shape[0], layout.num_pages(pools[0])
    start = position[0]
    num_real = jnp.clip(length - start, 0, num_rows)
    first, shift = start // page_size, start % page_size
    num_touched = jnp.where(num_real > 0, (shift + num_real + page_size - 1) // page_size, 0)
    # A page of room on both sides: the slice for the first and the last page may reach beyond the chunk.
    room = [jnp.pad(rows, [(page_size, page_size)] + [(0, 0)] * (rows.ndim - 1)) for rows in tokens]

    def write_one(nth: Any, pools: Pools) -> Pools:
        row = nth * page_size - shift
        logical = first + nth
        page = table[jnp.minimum(logical, table.shape[0] - 1)]
        rows = row + jnp.arange(page_size)
        inside = (logical < table.shape[0]) & (page >= 0) & (page < num_pages)
        keep = ~((rows >= 0) & (rows < num_real) & inside)
        merged: Pools = []
        for pool, source in zip(pools, room, strict=True):
            new = lax.dynamic_slice_in_dim(source, row + page_size, page_size)
            old = layout.read_page(pool, page)
            mask = keep.reshape(-1, *[1] * (new.ndim - 1))
            merged.append(layout.write_page(pool, page, jnp.where(mask, old, new)))
        return merged

    return lax.fori_loop(0, num_touched, write_one, list(pools))


def write_decodes_jax(layout: Layout, pools: Pools, tokens: Tokens, position: Any, table: Any, page_size: int) -> Pools:
    """`pools` with each live slot's token at its place; whatever has no place in the pool is dropped."""
    import jax.numpy as jnp

    num_pages = layout.num_pages(pools[0])
    logical = position // page_size
    entry = jnp.clip(logical, 0, table.shape[1] - 1)
    page = jnp.take_along_axis(table, entry[:, None], axis=1)[:, 0]
    live = (position >= 0) & (logical < table.shape[1]) & (page >= 0)
    # One past the end is dropped; -1 would wrap around to the last page in every mode.
    page = jnp.where(live, page, num_pages)
    index = layout.index(page, position % page_size)
    return [pool.at[index].set(layout.from_tokens(rows), mode="drop") for pool, rows in zip(pools, tokens, strict=True)]


PREFILL = Part(check_prefill, write_prefill_numpy, write_prefill_jax)
DECODES = Part(check_decodes, write_decodes_numpy, write_decodes_jax)
