"""In which order the axes of a page pool lie, and how one reaches a place in it.

Everything that depends on the order of the axes is here: writer, reader, verifier and sharding all go through a
`Layout`. "Rest" below is (head_dim,) for vectors and () for per-token scales of a quantised pool.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from jaxtyping import Shaped

from paged_attention import tiles

Pages = Any
"""One array of a pool: NumPy or JAX."""


class Layout(Protocol):
    """The order of the axes heads, pages, page (offsets within a page) and head_dim; a hashable value."""

    @property
    def name(self) -> str:
        """What a scenario calls it."""
        ...

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names, first to last."""
        ...

    def shape(self, heads: int, pages: int, page: int, head_dim: int) -> tuple[int, ...]:
        """Shape of a pool."""
        ...

    def num_pages(self, pool: Pages) -> int:
        """Number of pages of a pool."""
        ...

    def index(self, page: Any, offset: Any) -> tuple[Any, ...]:
        """What to index a pool with to reach places, given arrays of page ids and offsets of one shape."""
        ...

    def from_tokens(self, tokens: Shaped[np.ndarray, "tokens heads *rest"]) -> Any:
        """Token-first vectors in the axis order that `pool[index(page, offset)]` has."""
        ...

    def to_tokens(self, places: Any) -> Any:
        """The inverse of `from_tokens`."""
        ...

    def read_page(self, pool: Pages, page: Any) -> Any:
        """One whole page as (page_size, heads, *rest); `page` may be traced."""
        ...

    def write_page(self, pool: Pages, page: Any, tokens: Any) -> Any:
        """A pool with one whole page replaced by `tokens` (page_size, heads, *rest), under `jax.jit`."""
        ...

    def write_token(self, pool: Pages, page: Any, offset: Any, token: Any) -> Any:
        """A pool with one place replaced by `token` (heads, *rest), under `jax.jit`."""
        ...

    def read_words(self, pool: Pages, page: Any, offset: Any, lane: Any) -> Any:
        """Single words of every head: (heads, *places); offset and lane have that shape, page that of places."""
        ...


class HeadsFirst:
    """(heads, pages, page, head_dim): each head's pages lie together, as Pallas' paged attention kernels want them."""

    name = "heads_first"
    axes = ("heads", "pages", "page", "head_dim")

    def shape(self, heads: int, pages: int, page: int, head_dim: int) -> tuple[int, ...]:
        """Shape of a pool."""
        return (heads, pages, page, head_dim)

    def num_pages(self, pool: Pages) -> int:
        """Number of pages of a pool."""
        return int(pool.shape[1])

    def index(self, page: Any, offset: Any) -> tuple[Any, ...]:
        """Index of places in a pool."""
        return (slice(None), page, offset)

    def from_tokens(self, tokens: Any) -> Any:
        """(tokens, heads, *rest) to (heads, tokens, *rest)."""
        return tokens.swapaxes(0, 1)

    def to_tokens(self, places: Any) -> Any:
        """(heads, tokens, *rest) to (tokens, heads, *rest)."""
        return places.swapaxes(0, 1)

    def read_page(self, pool: Pages, page: Any) -> Any:
        """One whole page as (page_size, heads, *rest)."""
        heads, _, *of_page = pool.shape
        return tiles.get(pool, (0, page, 0, 0), (heads, 1, *of_page), self.axes).squeeze(1).swapaxes(0, 1)

    def write_page(self, pool: Pages, page: Any, tokens: Any) -> Any:
        """A pool with one whole page replaced."""
        return tiles.put(pool, tokens.swapaxes(0, 1)[:, None], (0, page, 0, 0), self.axes)

    def write_token(self, pool: Pages, page: Any, offset: Any, token: Any) -> Any:
        """A pool with one place replaced."""
        return tiles.put(pool, token[:, None, None], (0, page, offset, 0), self.axes)

    def read_words(self, pool: Pages, page: Any, offset: Any, lane: Any) -> Any:
        """Single words of every head: (heads, *places)."""
        import jax
        from jax import lax

        _, num_pages, page_size, head_dim = pool.shape

        def by_index(words: Any, offset: Any, lane: Any) -> Any:
            return words.at[page, offset, lane].get(mode="promise_in_bounds")

        def flat(words: Any, offset: Any, lane: Any) -> Any:
            if num_pages * page_size * head_dim > np.iinfo(np.int32).max:
                return by_index(words, offset, lane)
            # One flat index a place costs half of what three do on the CPU.
            place = ((page * page_size + offset) * head_dim + lane).astype(np.uint32)
            return words.reshape(-1).at[place].get(mode="promise_in_bounds")

        # Head by head: they may be sharded. A TPU keeps pages in tiles: flat, it would copy the whole pool.
        return lax.platform_dependent(pool, offset, lane, tpu=jax.vmap(by_index), default=jax.vmap(flat))


class PagesFirst:
    """(pages, page, heads, head_dim): all heads of a token lie together, so that a token is written in one piece.

    It is written faster than heads_first; a kernel that wants the pages of a head side by side needs the other one.
    """

    name = "pages_first"
    axes = ("pages", "page", "heads", "head_dim")

    def shape(self, heads: int, pages: int, page: int, head_dim: int) -> tuple[int, ...]:
        """Shape of a pool."""
        return (pages, page, heads, head_dim)

    def num_pages(self, pool: Pages) -> int:
        """Number of pages of a pool."""
        return int(pool.shape[0])

    def index(self, page: Any, offset: Any) -> tuple[Any, ...]:
        """Index of places in a pool."""
        return (page, offset)

    def from_tokens(self, tokens: Any) -> Any:
        """Vectors as they are: (tokens, heads, *rest)."""
        return tokens

    def to_tokens(self, places: Any) -> Any:
        """Vectors as they are: (tokens, heads, *rest)."""
        return places

    def read_page(self, pool: Pages, page: Any) -> Any:
        """One whole page as (page_size, heads, *rest)."""
        return tiles.get(pool, (page, 0, 0, 0), (1, *pool.shape[1:]), self.axes).squeeze(0)

    def write_page(self, pool: Pages, page: Any, tokens: Any) -> Any:
        """A pool with one whole page replaced."""
        return tiles.put(pool, tokens[None], (page, 0, 0, 0), self.axes)

    def write_token(self, pool: Pages, page: Any, offset: Any, token: Any) -> Any:
        """A pool with one place replaced."""
        return tiles.put(pool, token[None, None], (page, offset, 0, 0), self.axes)

    def read_words(self, pool: Pages, page: Any, offset: Any, lane: Any) -> Any:
        """Single words of every head: (heads, *places)."""
        import jax.numpy as jnp
        from jax import lax

        place = jnp.stack([jnp.broadcast_to(page, offset.shape), offset, lane], axis=-1)
        # Heads are an axis of both, so that they may be sharded; a vmap over them would transpose the pool.
        dimensions = lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(0, 1, 3),
            start_index_map=(0, 1, 3),
            operand_batching_dims=(2,),
            start_indices_batching_dims=(0,),
        )
        return lax.gather(pool, place, dimensions, (1, 1, 1, 1), mode="promise_in_bounds")


HEADS_FIRST: Layout = HeadsFirst()
PAGES_FIRST: Layout = PagesFirst()
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (HEADS_FIRST, PAGES_FIRST)}
"""Every layout, by name."""
