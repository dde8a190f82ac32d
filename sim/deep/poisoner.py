"""Spoils what nobody may read: pages when they are given back (and all of them at first), or the dummy page."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from backends.protocol import Backend
from paged_attention.plan import DUMMY_PAGE, Effect, StepPlan
from sim.deep.world import Poison
from sim.observer import Bystander

DUMMY = np.array([DUMMY_PAGE], np.int32)


class Poisoner(Bystander):
    """An observer that poisons pages of an open backend, between dispatches.

    A page is spoilt as soon as its owner gives it back, fenced or not: the steps that may still touch it for the old
    owner were dispatched before. Since every page is spoilt before it has an owner, the tail of a page is poison too.
    The dummy is spoilt anew before each step, for padding writes to it.
    """

    def __init__(self, backend: Backend, poison: Poison, num_pages: int) -> None:
        self._backend = backend
        self._poison = poison
        self._num_pages = num_pages
        if poison.where == "free pages":
            backend.poison(np.arange(num_pages, dtype=np.int32), poison.how)

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._spoil(effects)

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """See Observer; comes before the step is dispatched."""
        self._spoil(plan.effects)
        self._backend.poison(DUMMY, self._poison.how)

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._spoil(effects)

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._spoil(effects)

    def _spoil(self, effects: Iterable[Effect]) -> None:
        if self._poison.where == "free pages":
            freed = (page for effect in effects if effect.kind == "freed" for page in effect.pages)
            pages = [page for page in freed if 0 <= page < self._num_pages]
            if pages:
                self._backend.poison(np.array(pages, np.int32), self._poison.how)
