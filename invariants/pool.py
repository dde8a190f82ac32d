"""The auditor's own view of the page pool: who holds each page, which are fenced, in what order the rest comes."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Literal

from invariants.records import Admission

FreeList = Literal["fifo", "lifo", "lowest", "any"]


class FreeOrder:
    """The declared order in which free pages are handed out: a model of the allocator's free list."""

    def __init__(self, num_pages: int, order: FreeList, first: Sequence[int] = ()) -> None:
        """`first` are the free pages at first, in hand-out order; (): ascending."""
        pages = list(first or range(1, num_pages))
        if order == "lifo":
            pages.reverse()  # A stack: what is handed out first lies on top.
        self.order = order
        self.pages: deque[int] = deque(pages if order in {"fifo", "lifo"} else ())
        self.heap: list[int] = sorted(pages) if order == "lowest" else []

    def next(self) -> int:
        """The page whose turn it is; -1: none is free, or no order is declared."""
        if self.order == "lowest":
            return self.heap[0] if self.heap else -1
        if not self.pages:
            return -1
        return self.pages[-1] if self.order == "lifo" else self.pages[0]

    def take(self, page: int) -> None:
        """Strike out a page, in turn or not; one that is not there changes nothing."""
        if self.order == "lifo" and self.pages and self.pages[-1] == page:
            self.pages.pop()
        elif self.order == "lowest" and page in self.heap:
            self.heap.remove(page)
            heapq.heapify(self.heap)
        elif page in self.pages:
            self.pages.remove(page)

    def take_all(self, pages: Sequence[int]) -> tuple[int, int] | None:
        """Strike out pages one after another; the first (expected, found) that was out of turn."""
        wrong = None
        queue = self.pages
        for page in pages:
            if self.order == "fifo" and queue and queue[0] == page:
                queue.popleft()
                continue
            due = self.next()
            if wrong is None and due not in {page, -1}:
                wrong = (due, page)
            self.take(page)
        return wrong

    def give(self, pages: Iterable[int]) -> None:
        """Pages came back, in this order."""
        if self.order == "lowest":
            for page in pages:
                heapq.heappush(self.heap, page)
        elif self.order != "any":
            self.pages.extend(pages)

    def listing(self) -> list[int] | None:
        """All free pages in hand-out order; None: no order is declared."""
        if self.order == "any":
            return None
        if self.order == "lowest":
            return sorted(self.heap)
        return list(reversed(self.pages)) if self.order == "lifo" else list(self.pages)


class Pool:
    """Pages 1 .. num_pages - 1: one that nobody holds is free, one whose holder was released is fenced."""

    def __init__(self, num_pages: int, order: FreeList, first: Sequence[int] = ()) -> None:
        self.num_pages = num_pages
        self.order = FreeOrder(num_pages, order, first)
        self.queue: deque[int] = self.order.pages if order == "fifo" else deque()
        """The free pages in hand-out order, where that is first in, first out."""
        self.holder: dict[int, Admission] = {}
        self.fences: dict[tuple[int, int], tuple[Admission, list[int]]] = {}
        self.num_fenced = 0
        self.untouched = True
        """Every page was handed out when it was free: an admission's list is what it holds."""

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self.num_pages - 1 - len(self.holder)

    @property
    def num_owned(self) -> int:
        """Pages that admissions hold, fenced ones not counted."""
        return len(self.holder) - self.num_fenced

    def free_pages(self) -> set[int]:
        """Every page that nobody holds."""
        return set(range(1, self.num_pages)).difference(self.holder)

    def fenced_pages(self) -> set[int]:
        """Every page that waits for a step in flight."""
        return {page for _, pages in self.fences.values() for page in pages}

    def take_next(self, admission: Admission, pages: Sequence[int]) -> bool:
        """Pages belong to an admission, if they are exactly the next of a first-in-first-out queue; else nothing."""
        queue = self.queue
        if len(pages) == 1:
            if not queue or queue[0] != pages[0]:
                return False
            self.holder[queue.popleft()] = admission
            return True
        if tuple(islice(queue, len(pages))) != pages:
            return False
        for _ in pages:
            self.holder[queue.popleft()] = admission
        return True

    def hold(self, admission: Admission, pages: Iterable[int]) -> None:
        """Pages belong to an admission from now on, though it was not their turn."""
        self.untouched = False
        for page in pages:
            self.holder[page] = admission

    def release(self, admission: Admission, order: tuple[int, ...], *, fenced: bool) -> None:
        """An admission gives back what it holds, in the order told; pages told that are not its own stay."""
        admission.released = True
        mine = admission.pages
        if order != tuple(mine) or not self.untouched:
            # A page that the core forgot is lost there; the books take it back, so that it is reported once.
            told = dict.fromkeys((*order, *mine))
            mine = [p for p in told if self.holder.get(p) is admission]
        if not fenced:
            self._free(mine)
        elif mine:
            self.fences[admission.request, admission.number] = (admission, mine)
            self.num_fenced += len(mine)

    def unfence(self, key: tuple[int, int], pages: Iterable[int]) -> None:
        """Pages of a released admission are free from now on; those that are not behind its fence stay."""
        admission, behind = self.fences[key]
        mine = [p for p in dict.fromkeys(pages) if self.holder.get(p) is admission]
        self.num_fenced -= len(mine)
        self._free(mine)
        left = [p for p in behind if p not in mine]
        if left:
            self.fences[key] = (admission, left)
        else:
            del self.fences[key]

    def steal(self, page: int) -> None:
        """A page was handed out although it was not free: it leaves its old holder's books."""
        admission = self.holder.pop(page)
        if admission.released:
            self.num_fenced -= 1
            key = (admission.request, admission.number)
            left = [p for p in self.fences[key][1] if p != page]
            if left:
                self.fences[key] = (admission, left)
            else:
                del self.fences[key]

    def _free(self, pages: list[int]) -> None:
        for page in pages:
            del self.holder[page]
        self.order.give(pages)
