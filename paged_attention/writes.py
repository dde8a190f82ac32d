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
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from paged_attention.layout import Layout
from paged_attention.tiles import is_scale

Pools = list[Any]
Tokens = list[Any]
Write = Callable[[Pools, Tokens], Pools]


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
    """`pools` with a chunk's rows at their places; rows follow one another from position[0].

    Pages that the chunk fills are written in one piece each, and read nothing; its first and last page, where it fills
    them in part, are read, merged and put back, so that what an earlier chunk wrote there stays. A page id outside the
    pool writes nothing.
    """
    import jax.numpy as jnp
    from jax import lax

    num_rows, num_pages = position.shape[0], layout.num_pages(pools[0])
    start = position[0]
    num_real = jnp.clip(length - start, 0, num_rows)
    head = jnp.minimum(-start % page_size, num_real)
    num_whole = (num_real - head) // page_size
    tail = head + num_whole * page_size

    def page_of(row: Any) -> Any:
        logical = (start + row) // page_size
        page = table[jnp.minimum(logical, table.shape[0] - 1)]
        return jnp.where((logical < table.shape[0]) & (page >= 0), page, num_pages)

    def merge(pools: Pools, tokens: Tokens, count: Any, first_rows: Any) -> Pools:
        def merge_page(pools: Pools, first_row: Any, page: Any) -> Pools:
            rows = first_row + jnp.arange(page_size)
            keep = ~((rows >= 0) & (rows < num_real))
            merged: Pools = []
            for pool, source in zip(pools, tokens, strict=True):
                new, old = source.at[rows].get(mode="clip"), layout.read_page(pool, page)
                mask = keep.reshape(-1, *[1] * (new.ndim - 1))
                merged.append(layout.write_page(pool, page, jnp.where(mask, old, new)))
            return merged

        return _in_turn(merge_page, pools, count, num_pages, first_rows, page_of(first_rows))

    def put(pools: Pools, tokens: Tokens, count: Any, first_rows: Any) -> Pools:
        def put_page(pools: Pools, first_row: Any, page: Any) -> Pools:
            pieces = [lax.dynamic_slice_in_dim(source, first_row, page_size) for source in tokens]
            return [layout.write_page(pool, page, piece) for pool, piece in zip(pools, pieces, strict=True)]

        return _in_turn(put_page, pools, count, num_pages, first_rows, page_of(first_rows))

    def whole_pages_put(pools: Pools, tokens: Tokens) -> Pools:
        # The row, before the chunk's first one perhaps, that lies at the start of each page written in part.
        edges = jnp.stack([jnp.where(head > 0, -(start % page_size), tail), tail])
        pools = merge(pools, tokens, (head > 0).astype(jnp.int32) + (tail < num_real), edges)
        if num_rows < page_size:
            return pools
        return put(pools, tokens, num_whole, head + jnp.arange(num_rows // page_size) * page_size)

    def all_pages_merged(pools: Pools, tokens: Tokens) -> Pools:
        first = -(start % page_size)
        count = jnp.where(num_real > 0, -((first - num_real) // page_size), 0)
        return merge(pools, tokens, count, first + jnp.arange(num_rows // page_size + 2) * page_size)

    # After a second loop over scales, a TPU lays their whole array out anew.
    by_kind = partial(_each_kind, layout, whole_pages_put, all_pages_merged)
    return lax.platform_dependent(list(pools), list(tokens), tpu=by_kind, default=whole_pages_put)


def write_decodes_jax(layout: Layout, pools: Pools, tokens: Tokens, position: Any, table: Any, page_size: int) -> Pools:
    """`pools` with each live slot's token at its place; whatever has no place in the pool is dropped."""
    import jax.numpy as jnp
    from jax import lax

    num_pages = layout.num_pages(pools[0])
    logical = position // page_size
    entry = jnp.clip(logical, 0, table.shape[1] - 1)
    page = jnp.take_along_axis(table, entry[:, None], axis=1)[:, 0]
    live = (position >= 0) & (logical < table.shape[1]) & (page >= 0)
    page = jnp.where(live, page, num_pages)
    offset = position % page_size

    def at_once(pools: Pools, tokens: Tokens) -> Pools:
        return _scatter(layout, pools, tokens, page, offset)

    def one_by_one(pools: Pools, tokens: Tokens) -> Pools:
        return _one_by_one(layout, pools, tokens, page, offset)

    # A CPU scatters bfloat16 word by word: a loop of whole tokens costs half of that. For a scatter of scales, a TPU
    # lays their whole array out anew.
    cpu = one_by_one if pools[0].dtype == jnp.bfloat16 else at_once
    by_kind = partial(_each_kind, layout, at_once, one_by_one)
    return lax.platform_dependent(list(pools), list(tokens), cpu=cpu, tpu=by_kind, default=at_once)


def _each_kind(layout: Layout, write_vectors: Write, write_scales: Write, pools: Pools, tokens: Tokens) -> Pools:
    """`pools`, of which the arrays of vectors and those of scales are written in two ways."""
    written = list(pools)
    for scales, write in ((False, write_vectors), (True, write_scales)):
        nth = [n for n, pool in enumerate(pools) if is_scale(pool, layout.axes) == scales]
        if nth:
            some = write([pools[n] for n in nth], [tokens[n] for n in nth])
            written = [some[nth.index(n)] if n in nth else pool for n, pool in enumerate(written)]
    return written


def _scatter(layout: Layout, pools: Pools, tokens: Tokens, page: Any, offset: Any) -> Pools:
    """`pools` with each row at its (page, offset). One past the last page is dropped; -1 would wrap around to it."""
    index = layout.index(page, offset)
    return [pool.at[index].set(layout.from_tokens(rows), mode="drop") for pool, rows in zip(pools, tokens, strict=True)]


def _one_by_one(layout: Layout, pools: Pools, tokens: Tokens, page: Any, offset: Any) -> Pools:
    """As `_scatter`, in a loop over the rows."""
    import jax.numpy as jnp
    from jax import lax

    def put_token(pools: Pools, row: Any, page: Any, offset: Any) -> Pools:
        vectors = [lax.dynamic_index_in_dim(rows, row, keepdims=False) for rows in tokens]
        return [layout.write_token(pool, page, offset, one) for pool, one in zip(pools, vectors, strict=True)]

    num_pages = layout.num_pages(pools[0])
    return _in_turn(put_token, pools, len(page), num_pages, jnp.arange(len(page)), page, offset)


def _in_turn(put: Callable[..., Pools], pools: Pools, count: Any, num_pages: int, row: Any, page: Any, *to: Any) -> Any:
    """put(pools, row[n], page[n], ...) for every n below `count` with a page in the pool.

    The other turns repeat one of these: writing on a condition would copy the pools.
    """
    import jax.numpy as jnp
    from jax import lax

    nth = jnp.arange(row.shape[0])
    good = (nth < count) & (page < num_pages)
    nth = jnp.where(good, nth, jnp.argmax(good))
    places = [array[nth] for array in (row, page, *to)]

    def turn(n: Any, pools: Pools) -> Pools:
        return put(pools, *(array[n] for array in places))

    return lax.fori_loop(0, jnp.where(good.any(), count, 0), turn, list(pools))


PREFILL = Part(check_prefill, write_prefill_numpy, write_prefill_jax)
DECODES = Part(check_decodes, write_decodes_numpy, write_decodes_jax)
