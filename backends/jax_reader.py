"""The reader model on the device: how many wrong words a row finds when it reads through its page table."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt32

from backends.words import lane_words, read_lane
from paged_attention.fingerprint import WORD_MASK, kv_id, salts
from paged_attention.layout import Layout


class PageReader:
    """Reads `lanes` words of each K and V vector at every position, in tiles of logical pages.

    The pages of all rows form one list, row after row; a loop of as many tiles as that list needs works it off, so that
    the cost follows the tokens that live, not the size of the batch, and no length compiles anything anew.
    """

    def __init__(
        self, layout: Layout, dtype: str, geometry: tuple[int, int, int, int], lanes: int, tile_pages: int
    ) -> None:
        layers, heads, page_size, head_dim = geometry
        self._layout, self._dtype = layout, dtype
        self._layers, self._heads, self._page_size = layers, heads, page_size
        self._tile_pages = tile_pages
        # The lanes of a page's tokens depend on the page's place in the sequence, with a short period.
        rotating = max(head_dim - 1, 1) if dtype == "int8" else head_dim
        period = rotating // np.gcd(page_size, rotating)
        position = np.arange(period)[:, None] * page_size + np.arange(page_size)
        lane = np.stack([read_lane(position, nth, head_dim, dtype) for nth in range(min(lanes, head_dim))], axis=1)
        self._lane: Int32[np.ndarray, "period lanes page"] = lane
        salt = np.moveaxis(salts(layers, heads, head_dim)[..., lane], (3, 4), (0, 1))
        self._salt: UInt32[np.ndarray, "period lanes layers 2 heads page"] = salt

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
        offset = jnp.arange(self._page_size, dtype=jnp.int32)

        def read_tile(nth: Any, wrong: Any) -> Any:
            entry = nth * tile + jnp.arange(tile, dtype=jnp.int32)
            row = jnp.minimum((entry[:, None] >= ends).sum(axis=1), num_rows - 1)
            logical = jnp.clip(entry - (ends[row] - num_pages[row]), 0, width - 1)
            position = logical[:, None] * self._page_size + offset
            live = (position < length[row][:, None]) & (entry < ends[-1])[:, None]
            identity = kv_id(base[row][:, None], position, jnp)
            found = self._count(pools, table[row, logical], logical, identity, live)
            return wrong.at[:, row].add(found)

        num_tiles = (ends[-1] + tile - 1) // tile
        # Heads stay apart until the end: they may be sharded.
        wrong = lax.fori_loop(0, num_tiles, read_tile, jnp.zeros((self._heads, num_rows), jnp.int32))
        return wrong.sum(axis=0)

    def _count(self, pools: list[tuple[Any, Any]], page: Any, logical: Any, identity: Any, live: Any) -> Any:
        """Wrong words of each head in each page of a tile: (heads, tile)."""
        word = jnp.dtype(WORD_MASK[self._dtype][0])
        offset = jnp.arange(self._page_size, dtype=jnp.int32)
        phase = logical % len(self._lane) if len(self._lane) > 1 else jnp.zeros((1,), jnp.int32)
        lanes, salts_of = jnp.asarray(self._lane)[phase], jnp.asarray(self._salt)[phase]
        wrong = jnp.zeros((self._heads, identity.shape[0]), jnp.int32)
        for nth in range(self._lane.shape[1]):
            held = [
                self._layout.read_lane(pool, page[:, None], offset, lanes[:, nth]) for pair in pools for pool in pair
            ]
            # Gathering and hashing in one loop is slower than one after the other.
            raw = lax.bitcast_convert_type(lax.optimization_barrier(jnp.stack(held)), word)
            # To (layers x 2, heads, tile, page), as the gathered words are.
            salt = jnp.moveaxis(salts_of[:, nth], 0, 3).reshape(raw.shape[:2] + salts_of.shape[:1] + offset.shape)
            expected = lane_words(identity, salt, lanes[:, nth], self._dtype, jnp)
            wrong += ((raw != expected) & live).sum(axis=(0, 3), dtype=jnp.int32)
        return wrong
