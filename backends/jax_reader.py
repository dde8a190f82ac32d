"""The reader model on the device: how many wrong words a row finds when it reads through its page table."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt32

from backends.words import lane_words, read_lane, read_vector, vector_salt
from paged_attention.fingerprint import WORD_MASK, kv_id
from paged_attention.layout import Layout


class PageReader:
    """Reads `lanes` words of every position, each out of another K or V vector (`words.read_vector`), page by page.

    The pages of all rows form one list, row after row; a loop of as many tiles as that list needs works it off, so that
    the cost follows the tokens that live, not the size of the batch, and no length compiles anything anew.
    """

    def __init__(
        self, layout: Layout, dtype: str, geometry: tuple[int, int, int, int], lanes: int, tile_pages: int
    ) -> None:
        self._layout, self._dtype, self._lanes, self._tile_pages = layout, dtype, lanes, tile_pages
        self._layers, self._heads, self._page_size, self._head_dim = geometry

    def wrong_words(
        self,
        pools: list[tuple[Any, Any]],
        table: Int32[Array, "rows pages"],
        length: Int32[Array, " rows"],
        base: UInt32[Array, " rows"],
    ) -> Int32[Array, " rows"]:
        """For each row, the number of words at positions 0 .. length - 1 that are not those of `base`'s tokens.

        `pools` are the key and value words of each layer.
        """
        num_rows, width = table.shape
        tile = min(self._tile_pages, num_rows * width)
        num_pages = jnp.minimum((length + self._page_size - 1) // self._page_size, width)
        ends = jnp.cumsum(num_pages)

        def read_tile(nth: Any, wrong: Any) -> Any:
            entry = nth * tile + jnp.arange(tile, dtype=jnp.int32)
            row = jnp.minimum((entry[:, None] >= ends).sum(axis=1), num_rows - 1)
            logical = jnp.clip(entry - (ends[row] - num_pages[row]), 0, width - 1)
            # Beyond the end of the list nothing is below its length.
            end = jnp.where(entry < ends[-1], length[row], 0)
            found = self._count(pools, table[row, logical], logical, end, base[row])
            return wrong.at[:, row].add(found)

        num_tiles = (ends[-1] + tile - 1) // tile
        # Heads stay apart until the end: they may be sharded.
        wrong = lax.fori_loop(0, num_tiles, read_tile, jnp.zeros((self._heads, num_rows), jnp.int32))
        return wrong.sum(axis=0)

    def _count(self, pools: list[tuple[Any, Any]], page: Any, logical: Any, end: Any, base: Any) -> Any:
        """Wrong words of each head in each page of a tile: (heads, tile)."""
        word = jnp.dtype(WORD_MASK[self._dtype][0])
        num_vectors = self._layers * 2 * self._heads
        vector = jnp.arange(num_vectors, dtype=jnp.int32).reshape(-1, self._heads)
        # Positions whose turn it is to read one vector lie num_vectors apart.
        apart = jnp.arange(0, self._page_size, num_vectors, dtype=jnp.int32)
        first = logical * self._page_size
        wrong = jnp.zeros((self._heads, page.shape[0]), jnp.int32)
        for nth in range(self._lanes):
            # From the vector whose turn it is at a page's first position to each vector: (layers x 2, heads, n, tile).
            # The tile comes last, so that the innermost loops are long.
            turn = read_vector(first, end, nth, num_vectors, jnp)
            # Unsigned: the remainder of a signed number takes five operations more.
            away = (vector[:, :, None, None] - turn + num_vectors).astype(jnp.uint32) % num_vectors
            offset = away.astype(jnp.int32) + apart[:, None]
            position = first + offset
            live = (offset < self._page_size) & (position < end)
            lane = read_lane(position, nth, self._head_dim, self._dtype, jnp)
            # What is gathered is worked out before, in a loop of its own, and so is what it is compared with.
            inside, lane = lax.optimization_barrier((jnp.minimum(offset, self._page_size - 1), lane))
            held = [
                self._layout.read_words(pool, page, inside[k], lane[k])
                for k, pool in enumerate(pool for pair in pools for pool in pair)
            ]
            raw = lax.bitcast_convert_type(lax.optimization_barrier(jnp.stack(held)), word)
            salt = vector_salt(vector[:, :, None, None], lane, self._head_dim, jnp)
            expected = lane_words(kv_id(base, position, jnp), salt, lane, self._dtype, jnp)
            wrong += ((raw != expected) & live).sum(axis=(0, 2), dtype=jnp.int32)
        return wrong
