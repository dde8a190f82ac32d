"""Planted bugs on the way to the device: a wrapper changes what the real backend is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from backends.protocol import CacheSpec, DeviceSpec, ModelSpec, Pending
from paged_attention.plan import ModelRows, StepPlan
from sim.backend_wrapper import BackendWrapper


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
