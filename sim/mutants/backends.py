"""Planted bugs on the way to the device: a wrapper changes what the real backend is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import UInt32

from backends.protocol import Backend, CacheSpec, DeviceSpec, ModelSpec, Pending
from paged_attention.plan import Evidence, Ints, ModelRows, StepPlan, WrongPlace


class BackendWrapper:
    """A backend that passes everything on; a mutant overrides what it breaks."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def open(self, cache: CacheSpec, model: ModelSpec, devices: DeviceSpec) -> None:
        """See Backend."""
        self.backend.open(cache, model, devices)

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        """See Backend."""
        return self.backend.execute(plan, rows)

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """See Backend."""
        return self.backend.evidence(slots, pages)

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[np.ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """See Backend."""
        return self.backend.verify(pages, offsets, kv_ids, limit)

    def poison(self, pages: Ints, how: Literal["nan", "big"]) -> None:
        """See Backend."""
        self.backend.poison(pages, how)

    def describe(self) -> Mapping[str, str]:
        """See Backend."""
        return self.backend.describe()

    def close(self) -> None:
        """See Backend."""
        self.backend.close()


class WrongOffset(BackendWrapper):
    """Decode rows are executed at offset (position + 1) % page_size of the right page."""

    _page_size = 1

    def open(self, cache: CacheSpec, model: ModelSpec, devices: DeviceSpec) -> None:
        """Remember the page size."""
        self._page_size = cache.page_size
        self.backend.open(cache, model, devices)

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        """Execute the plan's rows, decodes shifted by one within their page."""
        size = self._page_size
        in_page = plan.start % size
        shifted = np.where(plan.slot >= 0, plan.start - in_page + (in_page + 1) % size, plan.start).astype(np.int32)
        return self.backend.execute(replace(plan, start=shifted, native=None), rows)
