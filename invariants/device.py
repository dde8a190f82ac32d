"""What the auditor asks of a backend: its reading methods, structurally."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import UInt, UInt32
from numpy import ndarray

from paged_attention.plan import CacheBuffers, Evidence, Ints, WrongPlace

Words = UInt[ndarray, "places layers 2 kv_heads head_dim"]
"""The raw words of each place, in the word dtype of the cache."""


class Device(Protocol):
    """The part of `backends.protocol.Backend` that an auditor reads through."""

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """Compare places with the fingerprints of ids (0: never written); the first wrong ones."""
        ...

    def verify_words(self, pages: Ints, offsets: Ints, words: Words, limit: int = 8) -> tuple[WrongPlace, ...]:
        """The same with the raw words themselves."""
        ...

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """What lies on the device now; None: this backend holds no cache."""
        ...

    def buffers(self) -> CacheBuffers | None:
        """The arrays that hold the cache now; None: this backend holds no cache."""
        ...
