"""A backend around a backend: what a plan loses or changes on its way to the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import UInt32

from backends.protocol import Backend, CacheSpec, DeviceSpec, ModelSpec, Pending, Words
from paged_attention.plan import CacheBuffers, Evidence, Ints, ModelRows, StepPlan, WrongPlace


class BackendWrapper:
    """A backend that passes everything on; subclasses override what they change."""

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

    def buffers(self) -> CacheBuffers | None:
        """See Backend."""
        return self.backend.buffers()

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[np.ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """See Backend."""
        return self.backend.verify(pages, offsets, kv_ids, limit)

    def verify_words(self, pages: Ints, offsets: Ints, words: Words, limit: int = 8) -> tuple[WrongPlace, ...]:
        """See Backend."""
        return self.backend.verify_words(pages, offsets, words, limit)

    def poison(self, pages: Ints, how: Literal["nan", "big"]) -> None:
        """See Backend."""
        self.backend.poison(pages, how)

    def describe(self) -> Mapping[str, str]:
        """See Backend."""
        return self.backend.describe()

    def close(self) -> None:
        """See Backend."""
        self.backend.close()


class RowsOnly(BackendWrapper):
    """Takes the core's native plan away, so that every step is executed from its neutral rows."""

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        """Execute the rows."""
        return self.backend.execute(replace(plan, native=None), rows)
