"""Who owns which page of the pool: a FIFO free list and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.plan import DUMMY_PAGE
from paged_attention.pytree import Fifo


class HBMPageManager:
    """Hands out the pages 1 .. num_pages_per_layer - 1 of a pool and takes them back, first in, first out.

    Page 0 is the dummy: never handed out, ignored when freed.
    """

    def __init__(self, metadata: PagedAttentionCacheMetaData) -> None:
        self._metadata = metadata
        self._current_page_index = DUMMY_PAGE
        self._available_hbm_pages: Fifo[int] = Fifo(range(DUMMY_PAGE + 1, metadata.num_pages_per_layer))
        self._owned: set[int] = set()

    @property
    def metadata(self) -> PagedAttentionCacheMetaData:
        """The cache's static configuration."""
        return self._metadata

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self._metadata.page_size

    @property
    def current_page_index(self) -> int:
        """The dummy page's index."""
        return self._current_page_index

    @property
    def num_available_pages(self) -> int:
        """How many pages can be allocated now."""
        return len(self._available_hbm_pages)

    @property
    def free_pages(self) -> list[int]:
        """The free pages, in the order in which they will be handed out."""
        return list(self._available_hbm_pages)

    def order_free_pages(self, pages: Sequence[int]) -> None:
        """Hand the free pages out in this order. ValueError: `pages` does not name each free page once."""
        if sorted(pages) != sorted(self._available_hbm_pages):
            raise ValueError(f"expected each of the {self.num_available_pages} free pages once, found {len(pages)} ids")
        self._available_hbm_pages = Fifo(pages)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens: ceil(num_tokens / page_size)."""
        return -(-num_tokens // self._metadata.page_size)

    def alloc_hbm_pages(self, n: int) -> list[int]:
        """Take exactly `n` pages off the free list, or none of them ([]) where fewer are free.

        ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages: the number must not be negative")
        if n > len(self._available_hbm_pages):
            return []
        pages = self._available_hbm_pages.take(n)
        self._owned.update(pages)
        return pages

    def alloc_prefill_hbm_pages(self, prompt_len: int) -> list[int]:
        """Take the ceil(prompt_len / page_size) pages of a prompt (or chunk), or none of them ([]).

        ValueError: prompt_len is negative.
        """
        return self.alloc_hbm_pages(self.pages_for(prompt_len))

    def free_hbm_pages(self, pages: Sequence[int]) -> None:
        """Give pages back, in their order; the dummy page is ignored.

        ValueError: a page is out of range, not owned by anybody, or named twice; nothing changes then.
        """
        distinct = set(pages)
        returned = [page for page in pages if page != DUMMY_PAGE] if DUMMY_PAGE in distinct else pages
        distinct.discard(DUMMY_PAGE)
        if not (distinct <= self._owned and len(distinct) == len(returned)):
            self._refuse(returned)
        self._owned -= distinct
        self._available_hbm_pages.extend(returned)

    def _refuse(self, pages: Sequence[int]) -> NoReturn:
        last = self._metadata.num_pages_per_layer - 1
        for page in pages:
            if not 0 < page <= last:
                raise ValueError(f"cannot free page {page}: pages are 1 .. {last}; nothing was freed")
            if page not in self._owned:
                raise ValueError(f"cannot free page {page}: it is already free; nothing was freed")
        twice = sorted({page for page in pages if pages.count(page) > 1})
        raise ValueError(f"cannot free pages {twice} twice in one call; nothing was freed")
