"""A page-write kernel for TPU, in Pallas: `backend: {writer: "backends.pallas_writer:write"}`.

A step's rows are cut into windows: rows of one page that lie together and are read, merged and put back as one copy.

    prefill  a window for each page that the chunk may touch, as high as a page
    decodes  a window for each slot, as high as the memory tile that holds its place (copies start at whole tiles)

The kernel takes windows in groups: it starts to read all of a group, merges and puts each back as it comes in, and
waits for the last one. A window that is written as a whole is not read. For a window without a row to write, and for one
whose page id lies outside the pool, nothing is copied in either direction. `backends.pallas_mode` is how it runs on a
CPU.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped

from paged_attention.cache import PagedAttentionCacheView
from paged_attention.model_io import PagedAttentionMetadata

GROUP_BYTES = 1 << 20
"""Size of a group's windows of K (those of V, and the rows to write, need as much again)."""
NO_PAGE = -1


class Windows(NamedTuple):
    """The places that a step's rows are for: rows low..high-1 of window n, which begins at row start of its page."""

    page: Int32[Array, " windows"]
    start: Int32[Array, " windows"]
    low: Int32[Array, " windows"]
    high: Int32[Array, " windows"]


def write(
    view: PagedAttentionCacheView,
    key: Shaped[Array, "tokens heads head_dim"],
    value: Shaped[Array, "tokens heads head_dim"],
    attn_meta: PagedAttentionMetadata,
) -> PagedAttentionCacheView:
    """The view with the rows of one part at their places; a `backends.jax_step.Writer`.

    Live slots of a step must be on different pages, as those of different sequences are. ValueError: a quantised view.
    """
    if view.quantizer is not None:
        raise ValueError("the Pallas writer writes no quantised pages: drop `cache.quantize` or `backend.writer`")
    pools = [view.key_pages, view.value_pages]
    tokens = [rows.astype(pools[0].dtype) for rows in (key, value)]
    if attn_meta.is_prefill_mode():
        position, length = attn_meta.prefill_position, attn_meta.prefill_length
        keys, values = write_chunk(position, length, attn_meta.prefill_page_table, tokens, pools)
    else:
        keys, values = write_rows(attn_meta.decodes_position, attn_meta.decodes_page_table, tokens, pools)
    return view.replace(key_pages=keys, value_pages=values)


def write_chunk(
    position: Int32[Array, " rows"],
    length: Int32[Array, ""],
    table: Int32[Array, " entries"],
    tokens: list[Shaped[Array, "rows heads head_dim"]],
    pools: list[Shaped[Array, "heads pages page_size head_dim"]],
) -> list[Any]:
    """The pools with those of a chunk's rows that stand before `length`, in windows of whole pages.

    Rows follow one another from position[0].
    """
    page_size, num_rows = pools[0].shape[2], position.shape[0]
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
        return shifted.reshape(num_windows, page_size, *rows.shape[1:]).swapaxes(1, 2)

    return _write_windows(windows, [spread(rows) for rows in tokens], pools, page_size)


def write_rows(
    position: Int32[Array, " slots"],
    table: Int32[Array, "slots entries"],
    tokens: list[Shaped[Array, "slots heads head_dim"]],
    pools: list[Shaped[Array, "heads pages page_size head_dim"]],
) -> list[Any]:
    """The pools with the row of each slot whose position is not negative, in one window for each slot."""
    page_size = pools[0].shape[2]
    height = _tile_rows(page_size, pools[0].dtype)
    page = jax.vmap(_entries)(table, (position // page_size)[:, None])[:, 0]
    offset = position % page_size
    low = offset % height
    windows = Windows(page, offset - low, low, low + (position >= 0))
    return _write_windows(windows, [rows[:, :, None] for rows in tokens], pools, height)


def _tile_rows(page_size: int, dtype: Any) -> int:
    """Rows of a memory tile: 32 bytes of each column; the whole page where it is no whole number of tiles."""
    rows = 32 // jnp.dtype(dtype).itemsize
    return page_size if page_size % rows else rows


def _entries(table: Int32[Array, " entries"], nth: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """These entries of a page table; NO_PAGE beyond its end."""
    return jnp.asarray(table).at[jnp.where(nth < 0, table.shape[0], nth)].get(mode="fill", fill_value=NO_PAGE)


def _write_windows(windows: Windows, new: list[Any], pools: list[Any], height: int) -> list[Any]:
    """The pools (heads, pages, page_size, head_dim) with `new` (windows, heads, height or 1, head_dim) written.

    A window of one row in `new` has that row for each of its rows. The pools are written in place where they are
    donated.
    """
    num_windows, num_heads, given, head_dim = new[0].shape
    group = max(1, min(num_windows, GROUP_BYTES // (num_heads * height * head_dim * new[0].dtype.itemsize)))
    num_groups = -(-num_windows // group)
    missing = num_groups * group - num_windows
    windows = windows._replace(page=jnp.where(windows.low < windows.high, windows.page, NO_PAGE))
    windows = Windows(*(jnp.pad(part, (0, missing), constant_values=NO_PAGE) for part in windows))
    num_scalars, num_pools = len(windows), len(pools)
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    rows = pl.BlockSpec((group, num_heads, given, head_dim), lambda step, *_: (step, 0, 0, 0))
    held = pltpu.VMEM((group, num_heads, height, head_dim), new[0].dtype)
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_scalars,
            grid=(num_groups,),
            in_specs=[rows, rows, in_memory, in_memory],
            out_specs=[in_memory, in_memory],
            scratch_shapes=[held, held, pltpu.SemaphoreType.DMA((num_pools, group))],
        ),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        input_output_aliases={num_scalars + len(new) + pool: pool for pool in range(num_pools)},
        name="write_page_windows",
    )(*windows, *new, *pools)


def _kernel(
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
    group, _, height, _ = held_key.shape
    num_pages = key_pages.shape[1]
    first = pl.program_id(0) * group
    pools = ((key_pages, held_key, new_key), (value_pages, held_value, new_value))

    def written(n: Any) -> Any:
        return (page[n] >= 0) & (page[n] < num_pages)

    def kept_in_part(n: Any) -> Any:
        return written(n) & (high[n] - low[n] < height)

    def copies(nth: Any, put_back: bool) -> list[Any]:
        n = first + nth
        begin = pl.multiple_of(start[n], height)
        ends = [(pages.at[:, page[n], pl.ds(begin, height)], held.at[nth]) for pages, held, _ in pools]
        return [
            pltpu.make_async_copy(*(reversed(both) if put_back else both), arrived.at[pool, nth])
            for pool, both in enumerate(ends)
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
            for _, held, new in pools:
                row = lax.broadcasted_iota(jnp.int32, held.shape[1:], 1)
                mine = (row >= low[n]) & (row < high[n])
                held[nth] = jnp.where(mine, new[nth], held[nth])
            for copy in copies(nth, put_back=True):
                copy.start()

    @pl.loop(0, group)
    def _finish(nth: Any) -> None:
        @pl.when(written(first + nth))
        def _wait() -> None:
            for copy in copies(nth, put_back=True):
                copy.wait()
