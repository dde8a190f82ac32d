"""Whether a scenario fits into this machine, estimated before anything is built."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim.scenario.models import Scenario

KeyPath = tuple[str, ...]

GIB: Final = 2**30
INT32: Final = 4
BYTES_PER_SLOT: Final = 256
"""Columns of a slot in the core, in the auditor and in a backend's batch: some 30 words of 4 or 8 bytes."""

BYTES_PER_PAGE: Final = 64
"""A page in the free lists of the core and of the auditor: a Python int and the pointers to it."""

BYTES_PER_PLACE: Final = 16
"""What the auditor's shadow pool keeps of one offset of a page, and of a position of a slot (invariants.shadow)."""

BYTES_PER_CHUNK_TOKEN: Final = 16
"""A prefill chunk is padded to its full length: token and position, on the host and for the device."""

BYTES_PER_REQUEST: Final = 100
"""Arrival, lengths, script and times of a request."""

ITEMSIZE: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a stored word; every other dtype has one."""


def physical_memory() -> int | None:
    """Bytes of memory in this machine; None: the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def host_bytes(scenario: Scenario) -> dict[KeyPath, int]:
    """What slots, pages, a chunk and the requests need in host memory, each under the key with the largest factor.

    A lower bound: token histories and page tables of core and auditor, free lists, and the pools of K and V where a
    backend holds them in host memory.
    """
    core, cache = scenario.core, scenario.cache
    table = -(-cache.max_sequence_length // cache.page_size)
    slots = core.batch_size * ((cache.max_sequence_length + 1 + table) * INT32 * 2 + BYTES_PER_SLOT)
    pages = cache.num_pages * (cache.page_size * BYTES_PER_PLACE + BYTES_PER_PAGE)
    chunk = core.prefill_chunk * BYTES_PER_CHUNK_TOKEN
    keys = ["num_pages", "page_size"]
    if scenario.backend.kind != "none":
        slots += core.batch_size * cache.max_sequence_length * BYTES_PER_PLACE
    if scenario.backend.kind != "none" and scenario.backend.platform == "cpu":
        word = 1 if cache.quantize else ITEMSIZE.get(cache.dtype, 1)
        pages += 2 * cache.layers * cache.kv_heads * cache.num_pages * cache.page_size * cache.head_dim * word
        keys += ["layers", "kv_heads", "head_dim"]
    longer = cache.max_sequence_length > core.batch_size
    return {
        ("cache", "max_sequence_length") if longer else ("core", "batch_size"): slots,
        ("cache", max(keys, key=lambda key: getattr(cache, key))): pages,
        ("core", "prefill_chunk"): chunk,
        ("workload", "num_requests"): (scenario.workload.num_requests or 0) * BYTES_PER_REQUEST,
    }
