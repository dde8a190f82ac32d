"""The hash of what lies in the cache when a run is over: two backends that did the same end with the same bits."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import numpy as np

from backends.protocol import CacheSpec
from invariants.device import Device
from paged_attention.fingerprint import WORD_MASK

PAGES_AT_ONCE: Final = 256
MAX_BYTES: Final = 256 * 2**20
"""Larger caches are not read back whole: their placement is what the auditor checks."""


def cache_hash(device: Device, cache: CacheSpec) -> str | None:
    """Hash the raw K/V words of every page but the dummy, in page order.

    None: there is no cache, or one larger than MAX_BYTES.
    """
    word_bytes = np.dtype(WORD_MASK[cache.dtype][0]).itemsize
    words = 2 * cache.layers * cache.kv_heads * cache.num_pages * cache.page_size * cache.head_dim
    if words * word_bytes > MAX_BYTES:
        return None
    digest = blake2b(digest_size=8)
    nobody = np.empty(0, np.int32)
    for first in range(1, cache.num_pages, PAGES_AT_ONCE):
        pages = np.arange(first, min(first + PAGES_AT_ONCE, cache.num_pages), dtype=np.int32)
        evidence = device.evidence(nobody, pages)
        if evidence is None:
            return None
        digest.update(evidence.keys.tobytes())
        digest.update(evidence.values.tobytes())
    return digest.hexdigest()
