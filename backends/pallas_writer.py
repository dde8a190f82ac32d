"""A page-write kernel for TPU, in Pallas: `backend: {writer: "backends.pallas_writer:write"}`.

A step's rows are cut into windows: rows of one page that lie together and are read, merged and put back as one copy.

    prefill  a window for each page that the chunk may touch, as high as a page
    decodes  a window for each slot, as high as the memory tile that holds its place (copies start at whole tiles)

The kernel takes windows in groups: it starts to read all of a group, merges and puts each back as it comes in, and
waits for the last one. A window that is written as a whole is not read. For a window without a row to write, and for
one whose page id lies outside the pool, nothing is copied in either direction. `backends.pallas_mode` is how the kernel
runs on a CPU.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from paged_attention.cache import PagedAttentionCacheView
from paged_attention.layout import LAYOUTS, Layout
from paged_attention.model_io import PagedAttentionMetadata

GROUP_BYTES = 1 << 20
"""Size of a group's windows of K (those of V, and the rows to write, need as much again)."""
TILE_BYTES = 32
"""Bytes of a column of a memory tile: a tile has as many rows as values fit into it."""
NO_PAGE = -1


class Windows(NamedTuple):
    """The places that a step's rows are for: rows low..high-1 of window n, which begins at row start of its page."""

    page: Int32[Array, " windows"]
    start: Int32[Array, " windows"]
    low: Int32[Array, " windows"]
    high: Int32[Array, " windows"]


def write(
    view: PagedAttentionCacheView, key: Any, value: Any, attn_meta: PagedAttentionMetadata
) -> PagedAttentionCacheView:
    """The view with the rows of one part at their places; a `backends.jax_step.Writer`.

    Live slots of a step must be on different pages, as those of different sequences are. ValueError: a quantised view.
    """
    if view.quantizer is not None:
        raise ValueError("the Pallas writer writes no quantised pages: drop `cache.quantize` or `backend.writer`")
    layout, pools = LAYOUTS[view.layout], [view.key_pages, view.value_pages]
    tokens = [rows.astype(view.key_pages.dtype) for rows in (key, value)]
    if attn_meta.is_prefill_mode():
        where = attn_meta.prefill_position, attn_meta.prefill_length, attn_meta.prefill_page_table
        keys, values = write_chunk(layout, pools, tokens, *where, view.metadata.page_size)
    else:
        where = attn_meta.decodes_position, attn_meta.decodes_page_table
        keys, values = write_slots(layout, pools, tokens, *where, view.metadata.page_size)
    return view.replace(key_pages=keys, value_pages=values)


def write_chunk(
    layout: Layout, pools: list[Any], tokens: list[Any], position: Any, length: Any, table: Any, page_size: int
) -> list[Any]:
    """The pools with the rows of a chunk that stand before `length`; arguments as in `paged_attention.writes`."""
    num_rows = position.shape[0]
    first, shift = position[0] // page_size, position[0] % page_size
    num_windows = (num_rows + 2 * page_size - 2) // page_size
    nth = jnp.arange(num_windows, dtype=jnp.int32)
    end = shift + jnp.clip(length - position[0], 0, num_rows)
    windows = Windows(
        page=_entries(table, first + nth),
        start=jnp.zeros_like(nth),
        low=jnp.clip(shift - nth * page_size, 0, page_size),
        high=jnp.clip(end - nth * page_size, 0, page_size),
    )

    def spread(rows: Any) -> Any:
        room = jnp.zeros((num_windows * page_size, *rows.shape[1:]), rows.dtype)
        shifted = lax.dynamic_update_slice_in_dim(room, rows, shift, axis=0)
        return _in_axes(layout, shifted.reshape(num_windows, page_size, *rows.shape[1:]))

    return _write_windows(layout, pools, [spread(rows) for rows in tokens], windows, page_size)


def write_slots(
    layout: Layout, pools: list[Any], tokens: list[Any], position: Any, table: Any, page_size: int
) -> list[Any]:
    """The pools with the token of each live slot; arguments as in `paged_attention.writes`."""
    height = _copied_rows(layout, page_size, pools[0].dtype)
    page = jax.vmap(_entries)(table, (position // page_size)[:, None])[:, 0]
    offset = position % page_size
    low = offset % height
    windows = Windows(page, offset - low, low, low + (position >= 0))
    return _write_windows(layout, pools, [_in_axes(layout, rows[:, None]) for rows in tokens], windows, height)


def _in_axes(layout: Layout, tokens: Any) -> Any:
    """Vectors (windows, rows, heads, head_dim) with the axes of each window as they are in a page."""
    reordered: Any = jax.vmap(layout.from_tokens)
    return reordered(tokens)


def _entries(table: Any, nth: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """These entries of a page table; NO_PAGE beyond its ends."""
    inside = jnp.where(nth < 0, table.shape[0], nth)
    return jnp.asarray(table).at[inside].get(mode="fill", fill_value=NO_PAGE)


def _copied_rows(layout: Layout, page_size: int, dtype: Any) -> int:
    """How many rows of a page must be copied to write one: those of a tile, or the page if that is no whole number."""
    if layout.axes[-2] != "page":
        return 1
    rows = TILE_BYTES // jnp.dtype(dtype).itemsize
    return page_size if page_size % rows else rows


def _row_axis(layout: Layout) -> int:
    """Where the rows lie in a window, which has the axes of a pool without that of the pages."""
    return [axis for axis in layout.axes if axis != "pages"].index("page")


def _write_windows(layout: Layout, pools: list[Any], new: list[Any], windows: Windows, height: int) -> list[Any]:
    """The pools with `new` (windows, *window) written; a window of one row has that row for each of its rows."""
    num_windows, *given = new[0].shape
    window = list(given)
    window[_row_axis(layout)] = height
    window_bytes = math.prod(window) * jnp.dtype(new[0].dtype).itemsize
    group = max(1, min(num_windows, GROUP_BYTES // window_bytes))
    num_groups = -(-num_windows // group)
    windows = windows._replace(page=jnp.where(windows.low < windows.high, windows.page, NO_PAGE))
    missing = num_groups * group - num_windows
    scalars = [jnp.pad(part, (0, missing), constant_values=NO_PAGE) for part in windows]
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    rows = pl.BlockSpec((group, *given), lambda step, *_: (step, 0, 0, 0))
    held = pltpu.VMEM((group, *window), new[0].dtype)
    return pl.pallas_call(
        partial(_kernel, layout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_groups,),
            in_specs=[rows, rows, in_memory, in_memory],
            out_specs=[in_memory, in_memory],
            scratch_shapes=[held, held, pltpu.SemaphoreType.DMA((len(pools), group))],
        ),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        input_output_aliases={len(scalars) + len(new) + pool: pool for pool in range(len(pools))},
        name="write_page_windows",
    )(*scalars, *new, *pools)


def _kernel(
    layout: Layout,
    page: Any,
    start: Any,
    low: Any,
    high: Any,
    new_key: Any,
    new_value: Any,
    _key_given: Any,
    _value_given: Any,
    key_pages: Any,
    value_pages: Any,
    held_key: Any,
    held_value: Any,
    arrived: Any,
) -> None:
    """One group of windows; the pools are given twice, as what goes in and what comes out, and lie in one place."""
    group, *window = held_key.shape
    height, num_pages = window[_row_axis(layout)], layout.num_pages(key_pages)
    first = pl.program_id(0) * group
    pools = ((key_pages, held_key, new_key), (value_pages, held_value, new_value))

    def written(n: Any) -> Any:
        return (page[n] >= 0) & (page[n] < num_pages)

    def kept_in_part(n: Any) -> Any:
        return written(n) & (high[n] - low[n] < height)

    def copies(nth: Any, *, put_back: bool) -> list[Any]:
        n = first + nth
        place = layout.index(page[n], pl.ds(pl.multiple_of(start[n], height), height))
        ends = [(pages.at[place], held.at[nth]) for pages, held, _ in pools]
        return [
            pltpu.make_async_copy(*((inside, outside) if put_back else (outside, inside)), arrived.at[pool, nth])
            for pool, (outside, inside) in enumerate(ends)
        ]

    @pl.loop(0, group)
    def _read(nth: Any) -> None:
        @pl.when(kept_in_part(first + nth))
        def _start() -> None:
            for copy in copies(nth, put_back=False):
                copy.start()

    @pl.loop(0, group)
    def _merge(nth: Any) -> None:
        n = first + nth

        @pl.when(kept_in_part(n))
        def _wait() -> None:
            for copy in copies(nth, put_back=False):
                copy.wait()

        @pl.when(written(n))
        def _put_back() -> None:
            row = lax.broadcasted_iota(jnp.int32, window, _row_axis(layout))
            mine = (row >= low[n]) & (row < high[n])
            for _, held, new in pools:
                held[nth] = jnp.where(mine, new[nth], held[nth])
            for copy in copies(nth, put_back=True):
                copy.start()

    @pl.loop(0, group)
    def _finish(nth: Any) -> None:
        @pl.when(written(first + nth))
        def _wait() -> None:
            for copy in copies(nth, put_back=True):
                copy.wait()
