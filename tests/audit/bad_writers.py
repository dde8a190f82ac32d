"""Write kernels that put every token at its place, and copy whole pools on a TPU to do so."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def places(view: Any, attn_meta: Any) -> tuple[Any, Any]:
    """Page (past the end: nothing is written) and offset of every row of a part."""
    size, num_pages = view.metadata.page_size, view.key_pages.shape[1]
    if attn_meta.is_prefill_mode():
        position, table = attn_meta.prefill_position, attn_meta.prefill_page_table
        return jnp.where(position < attn_meta.prefill_length, table[position // size], num_pages), position % size
    position, table = attn_meta.decodes_position, attn_meta.decodes_page_table
    page = table[jnp.arange(position.shape[0]), position // size]
    return jnp.where(position >= 0, page, num_pages), position % size


def flat(view: Any, key: Any, value: Any, attn_meta: Any) -> Any:
    """Through a flat view of the pages: the same bytes on a CPU, another tiling on a TPU."""
    page, offset = places(view, attn_meta)
    heads, num_pages, size, dim = view.key_pages.shape

    def write(pool: Any, rows: Any) -> Any:
        lines = pool.reshape(heads, num_pages * size, dim)
        return lines.at[:, page * size + offset].set(rows.swapaxes(0, 1), mode="drop").reshape(pool.shape)

    return view.replace(key_pages=write(view.key_pages, key), value_pages=write(view.value_pages, value))


def converted(view: Any, key: Any, value: Any, attn_meta: Any) -> Any:
    """In float32, and back."""
    page, offset = places(view, attn_meta)

    def write(pool: Any, rows: Any) -> Any:
        wide = pool.astype(jnp.float32)
        new = rows.swapaxes(0, 1).astype(jnp.float32) + wide[:, page, offset] * 0
        return wide.at[:, page, offset].set(new, mode="drop").astype(pool.dtype)

    return view.replace(key_pages=write(view.key_pages, key), value_pages=write(view.value_pages, value))


def raising(view: Any, key: Any, value: Any, attn_meta: Any) -> Any:
    """No kernel at all."""
    raise TypeError("this kernel knows no such view")
