"""What every backend with a cache agrees on: the stored words, which of them the reader reads, and how they are spoilt.

Arrays of stored words are unsigned integers. Where pages are quantised the int8 values are the words, and the float32
scale of each token and head counts as one word more, its raw bits (`scale_bits`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np

from backends.protocol import CacheSpec, Words
from paged_attention.fingerprint import GOLDEN, WORD_MASK, mix32, words
from paged_attention.plan import Ints, StepPlan, WrongPlace

KINDS: tuple[Literal["K", "V"], ...] = ("K", "V")


def stored_dtype(cache: CacheSpec) -> str:
    """The key of WORD_MASK by which the pages hold their words. ValueError: the cache's dtypes make no sense."""
    if cache.dtype not in WORD_MASK:
        raise ValueError(f"unknown cache dtype {cache.dtype!r}: expected one of {', '.join(WORD_MASK)}")
    if not cache.quantize:
        return cache.dtype
    if np.dtype(cache.dtype).itemsize < 2:
        raise ValueError(
            f"a quantised cache takes bfloat16, float16 or float32 vectors, which hold -127..127 exactly: "
            f"found dtype {cache.dtype!r}"
        )
    return "int8"


def read_vector(position: Any, length: Any, nth: int, num_vectors: int, xp: ModuleType = np) -> Any:
    """Which vector the reader reads at a position as its nth, in a row of `length` tokens.

    Vectors are counted layer by layer, K before V, head by head. The choice moves on with the position and with each
    token that the row gains, so that every vector of every token has its turn.
    """
    return ((position + length + nth).astype(xp.uint32) % num_vectors).astype(xp.int32)


def read_lane(position: Any, nth: int, head_dim: int, dtype: str, xp: ModuleType = np) -> Any:
    """Which lane of that vector the reader reads: it rotates with the position.

    Lane 0 of an int8 fingerprint is the same for all tokens, so that it is left out.
    """
    fixed = 1 if dtype == "int8" and head_dim > 1 else 0
    return fixed + ((position + nth).astype(xp.uint32) % (head_dim - fixed)).astype(xp.int32)


def vector_salt(vector: Any, lane: Any, head_dim: int, xp: ModuleType = np) -> Any:
    """`fingerprint.salts` of one lane of a vector, computed: on a device that is cheaper than looking it up."""
    nth = (vector * head_dim + lane + 1).astype(xp.uint32)
    return mix32(nth * xp.uint32(GOLDEN), xp)


def lane_words(ids: Any, lane_salt: Any, lane: Any, dtype: str, xp: ModuleType = np) -> Any:
    """`fingerprint.words` of one lane each: `lane_salt` is the salt of `lane`; ids, salts and lanes broadcast."""
    if dtype != "int8":
        return words(ids, lane_salt, dtype, xp)
    # Lane 0 is the last axis' first: a lane other than 0 stands second.
    ids, salt, lane = xp.broadcast_arrays(ids, lane_salt, lane)
    pair = words(ids[..., None], xp.stack([salt, salt], axis=-1), dtype, xp)
    return xp.where(lane == 0, pair[..., 0], pair[..., 1])


def scale_bits(ids: Any, vector_salts: Any, xp: ModuleType = np) -> Any:
    """Raw float32 bits of the scales of tokens `ids` in quantised vectors (broadcast): powers of two, 2**-8 to 2**7.

    `vector_salts` are the `fingerprint.salts` of lane 0. As that lane is 127, words times a power of two are quantised
    to these very words and this scale, which differs from token to token and from head to head. Id 0 has scale 0.
    """
    mixed = (ids ^ vector_salts) * xp.uint32(GOLDEN)
    bits = (xp.uint32(127 - 8) + (mixed >> xp.uint32(28))) << xp.uint32(23)
    return xp.where(ids == xp.uint32(0), xp.uint32(0), bits)


def differing(found: Words, expected: Words, pages: Ints, offsets: Ints, limit: int) -> list[WrongPlace]:
    """The first places where words differ, by place, then layer, K before V, then head."""
    wrong: list[WrongPlace] = []
    first: list[list[int]] = np.argwhere((found != expected).any(axis=-1))[:limit].tolist()
    for place, layer, kind, head in first:
        held, wanted = (tuple(array[place, layer, kind, head].tolist()) for array in (found, expected))
        wrong.append(WrongPlace(layer, KINDS[kind], head, int(pages[place]), int(offsets[place]), held, wanted))
    return wrong


def poison_word(dtype: str, how: Literal["nan", "big"]) -> int:
    """The raw word of NaN, or of the largest finite value; for int8 -128 in both cases, which no fingerprint has."""
    if dtype == "int8":
        return 0x80
    kind = np.dtype(dtype)
    largest = cast("Any", ml_dtypes.finfo(kind)).max
    value = np.nan if how == "nan" else float(largest)
    return int(np.array(value, kind).view(WORD_MASK[dtype][0]))


def poison_scale(how: Literal["nan", "big"]) -> np.float32:
    """What a quantised page's scales become."""
    return np.float32(np.nan) if how == "nan" else np.finfo(np.float32).max


def check_plan(plan: StepPlan, cache: CacheSpec) -> None:
    """ValueError: a row names a page outside the pool, or reaches beyond the longest sequence; written is nothing."""
    # As an unsigned number a negative id is too large as well.
    if plan.table.view(np.uint32).max(initial=0) >= cache.num_pages:
        outside = (plan.table < 0) | (plan.table >= cache.num_pages)
        row = int(outside.any(axis=1).argmax())
        raise ValueError(
            f"step {plan.step}, request {plan.request[row]}: page ids must lie in 0..{cache.num_pages - 1}, "
            f"found {plan.table[row][outside[row]].tolist()[:8]}"
        )
    end = plan.start + plan.count
    if end.max(initial=0) > cache.max_sequence_length:
        row = int(end.argmax())
        raise ValueError(
            f"step {plan.step}, request {plan.request[row]}: positions {plan.start[row]} to "
            f"{end[row] - 1} are to be written, but max_sequence_length is {cache.max_sequence_length}"
        )


def check_places(pages: Ints, offsets: Ints, cache: CacheSpec) -> None:
    """ValueError: a place that is asked about lies outside the cache."""
    if len(pages) == 0:
        return
    if pages.view(np.uint32).max() >= cache.num_pages or offsets.view(np.uint32).max() >= cache.page_size:
        outside = (pages < 0) | (pages >= cache.num_pages) | (offsets < 0) | (offsets >= cache.page_size)
        first = int(outside.argmax())
        raise ValueError(
            f"places must lie on pages 0..{cache.num_pages - 1} at offsets 0..{cache.page_size - 1}: "
            f"found page {pages[first]}, offset {offsets[first]}"
        )
