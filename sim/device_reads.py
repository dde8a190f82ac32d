"""What the judge reads off a device: where a broken cache makes reading fail, that is its backend's crash."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt32

from backends.protocol import Backend, Words
from paged_attention.plan import CacheBuffers, Evidence, Ints, WrongPlace
from sim.part_calls import ask


class DeviceReads:
    """A backend's reading methods. Each raises PartError where the backend raises."""

    def __init__(self, backend: Backend, step: Callable[[], int]) -> None:
        """`step` says at which step it is read."""
        self._backend, self._step = backend, step

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[np.ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """See Backend."""
        return ask(self._step(), self._backend.verify, pages, offsets, kv_ids, limit)

    def verify_words(self, pages: Ints, offsets: Ints, words: Words, limit: int = 8) -> tuple[WrongPlace, ...]:
        """See Backend."""
        return ask(self._step(), self._backend.verify_words, pages, offsets, words, limit)

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """See Backend."""
        return ask(self._step(), self._backend.evidence, slots, pages)

    def buffers(self) -> CacheBuffers | None:
        """See Backend."""
        return ask(self._step(), self._backend.buffers)
