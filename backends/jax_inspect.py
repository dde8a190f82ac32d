"""The host's side of looking into the pages: pads requests to compiled sizes, and words what came back."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import functools
from bisect import bisect_left
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, UInt32
from numpy.typing import NDArray

from backends import jax_probe as probe
from backends.jax_programs import Programs
from backends.jax_step import Pools
from backends.protocol import Words
from backends.words import check_places, differing, scale_bits
from paged_attention.fingerprint import WORD_MASK, words
from paged_attention.plan import CacheBuffers, Ints, ShardedArray, WrongPlace

_PADDING = np.full(probe.PLACES_PER_CALL[-1], probe.PADDING, np.int32)


def page_words(programs: Programs, pools: Pools, pages: Ints) -> NDArray[np.unsignedinteger[Any]]:
    """Copies of whole pages' raw words, axes (2 for K and V, layers, heads, pages, page_size, head_dim)."""
    cache = programs.model.cache
    if not len(pages):
        none = (2, cache.layers, cache.kv_heads, 0, cache.page_size, cache.head_dim)
        return np.zeros(none, WORD_MASK[programs.model.dtype][0])
    offset = np.arange(cache.page_size, dtype=np.int32)
    held: list[Any] = []
    for part in parts(pages, probe.PAGES_PER_CALL):
        places = np.repeat(part, len(offset)), np.tile(offset, len(part))
        held.append(_fetch(programs, pools, *places)[0])
    stacked = np.concatenate(held)
    by_page = stacked.reshape(len(pages), len(offset), *stacked.shape[1:])
    return np.ascontiguousarray(by_page.transpose(3, 2, 4, 0, 1, 5))


def first_wrong(
    programs: Programs, pools: Pools, pages: Ints, offsets: Ints, kv_ids: UInt32[np.ndarray, " places"], limit: int
) -> list[WrongPlace]:
    """The first wrong ones among places, by place, then layer, K before V, then head.

    ValueError: a place lies outside the cache.
    """
    wrong: list[WrongPlace] = []
    for at in range(0, len(pages), probe.PLACES_PER_CALL[-1]):
        part = slice(at, min(at + probe.PLACES_PER_CALL[-1], len(pages)))
        count = part.stop - at
        width = probe.PLACES_PER_CALL[bisect_left(probe.PLACES_PER_CALL, count)]
        rest = _PADDING[: width - count]
        columns = (pages[part], rest, offsets[part], rest, kv_ids[part].view(np.int32), rest)
        packed = np.concatenate(columns).reshape(3, width)
        # A NumPy array or list of the few words costs a tenth of what `any` or `bool` of a JAX array does.
        if any(np.asarray(programs.differing_bits(width)(pools, packed)).tolist()):
            check_places(pages, offsets, programs.model.cache)
            for few in parts(packed[:, :count].T, probe.PAGES_PER_CALL * programs.model.cache.page_size):
                wrong += _details(programs, pools, few.T, limit - len(wrong))
                if len(wrong) == limit:
                    return wrong
    return wrong


def _details(programs: Programs, pools: Pools, places: Int32[np.ndarray, "3 places"], limit: int) -> list[WrongPlace]:
    pages, offsets, kv_ids = places
    found, scales = _fetch(programs, pools, pages, offsets)
    ids = kv_ids.view(np.uint32)[:, None, None, None, None]
    expected = words(ids, programs.model.salts, programs.model.dtype)
    if scales is not None:
        found = np.concatenate([found, scales[..., None]], axis=-1)
        expected = np.concatenate([expected, scale_bits(ids, programs.model.salts[..., :1])], axis=-1)
    return differing(found, expected, pages, offsets, limit)


def first_other(
    programs: Programs, pools: Pools, pages: Ints, offsets: Ints, expected: Words, limit: int
) -> list[WrongPlace]:
    """The first places that hold other words than these, in the order of `first_wrong`; compared on the host.

    ValueError: a place lies outside the cache.
    """
    check_places(pages, offsets, programs.model.cache)
    wrong: list[WrongPlace] = []
    size = probe.PAGES_PER_CALL * programs.model.cache.page_size
    for at in range(0, len(pages), size):
        few = slice(at, at + size)
        found = _fetch(programs, pools, pages[few], offsets[few])[0]
        wrong += differing(found, expected[few], pages[few], offsets[few], limit - len(wrong))
        if len(wrong) == limit:
            break
    return wrong


def _fetch(programs: Programs, pools: Pools, pages: Any, offsets: Any) -> tuple[Any, Any]:
    """Raw words and scale bits of places, no more than PAGES_PER_CALL pages hold, as copies."""
    width = probe.PAGES_PER_CALL * programs.model.cache.page_size
    found, scales = programs.place_words(width)(pools, padded(pages, width), padded(offsets, width))
    count = len(pages)
    return np.array(np.asarray(found)[:count]), None if scales is None else np.array(np.asarray(scales)[:count])


def cache_buffers(programs: Programs, pools: Pools, given: Pools) -> CacheBuffers:
    """The live arrays with the shape and dtype of a pool, those of `given` that a step did not take, and the shards."""
    kinds = {(pool.shape, pool.dtype) for pool in pools}
    platform = programs.mesh.devices.flat[0].platform
    live = [array for array in jax.live_arrays(platform) if (array.shape, array.dtype) in kinds]
    live = [array for array in live if not array.is_deleted()]
    kept = [pool for pool in given if not pool.is_deleted()]
    return CacheBuffers(
        num_buffers=len(live),
        num_bytes=sum(array.nbytes for array in live),
        num_not_donated=len(kept),
        arrays=tuple(ShardedArray(p.shape, _boxes(p.sharding, p.shape), programs.num_copies) for p in pools),
    )


@functools.lru_cache(maxsize=64)
def _boxes(sharding: Any, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Where each shard lies."""
    return tuple(
        tuple((axis.start or 0, size if axis.stop is None else axis.stop) for axis, size in zip(i, shape, strict=True))
        for i in sharding.devices_indices_map(shape).values()
    )


def parts(array: Any, size: int) -> list[Any]:
    """`array` in pieces of at most `size`."""
    return [array[at : at + size] for at in range(0, len(array), size)]


def padded(array: Any, width: int, value: int = 0) -> Any:
    """`array` with its last axis padded to `width`."""
    room = np.full((*array.shape[:-1], width), value, array.dtype)
    room[..., : array.shape[-1]] = array
    return room
