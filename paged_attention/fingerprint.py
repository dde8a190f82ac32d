"""K/V fingerprints: the raw words that stand for one token's keys and values.

    request, admission --kv_base--> base --kv_id(position)--> id --words(layer, kind, head, lane)--> raw bits

Every function takes the array module `xp` (numpy or jax.numpy), so that a place on the device and the place that an
auditor expects are defined once. Ids and bases are uint32; no id is 0, which stands for a place never written.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import UInt32

GOLDEN = 0x9E3779B1
"""2**32 / golden ratio, odd: Knuth's multiplicative hashing constant."""

# No pattern of these is NaN or infinite: the top exponent bit is always clear. int8 words lie in -127..127.
WORD_MASK: dict[str, tuple[str, int]] = {
    "bfloat16": ("uint16", 0xBFFF),
    "float16": ("uint16", 0xBFFF),
    "float32": ("uint32", 0xBFFFFFFF),
    "float8_e4m3fn": ("uint8", 0xBF),
    "float8_e5m2": ("uint8", 0xBF),
    "int8": ("uint8", 0xFF),
}
"""Cache dtype to (word dtype, mask of the bits that a fingerprint may set)."""


def mix32(x: Any, xp: ModuleType = np) -> Any:
    """Scramble uint32 values one to one (the lowbias32 finaliser of C. Wellons' hash-prospector)."""
    x = x ^ (x >> xp.uint32(16))
    x = x * xp.uint32(0x7FEB352D)
    x = x ^ (x >> xp.uint32(15))
    x = x * xp.uint32(0x846CA68B)
    return x ^ (x >> xp.uint32(16))


def kv_base(request: Any, admission: Any, xp: ModuleType = np) -> Any:
    """The uint32 identity of each (request, admission), as arrays of any one shape."""
    r = xp.asarray(request).astype(xp.uint32)
    a = xp.asarray(admission).astype(xp.uint32)
    return mix32(mix32(r + xp.uint32(GOLDEN), xp) + a * xp.uint32(GOLDEN), xp)


def kv_id(base: Any, position: Any, xp: ModuleType = np) -> Any:
    """The uint32 identity of the token at each position of an admission; never 0."""
    p = xp.asarray(position).astype(xp.uint32)
    return mix32(base + p * xp.uint32(GOLDEN), xp) | xp.uint32(1)


def salts(layers: int, heads: int, head_dim: int) -> UInt32[np.ndarray, "layers 2 heads head_dim"]:
    """One constant per word of a token's K (index 0) and V (index 1)."""
    count = layers * 2 * heads * head_dim
    return mix32(np.arange(1, count + 1, dtype=np.uint32) * np.uint32(GOLDEN)).reshape(layers, 2, heads, head_dim)


def words(ids: Any, salt: Any, dtype: str, xp: ModuleType = np) -> Any:
    """Raw words of tokens `ids` under `salt` (broadcast together), in the word dtype of cache dtype `dtype`.

    For a cache of dtype int8 the word is the two's complement of a value in -127..127; lane 0 of every head (the last
    axis) is 127, the largest, so that the words times a power of two are quantised to themselves and that scale.
    """
    word, mask = WORD_MASK[dtype]
    width = np.dtype(word).itemsize * 8
    mixed = (ids ^ salt) * xp.uint32(GOLDEN)
    mixed = mixed ^ (mixed >> xp.uint32(15))
    raw = (mixed >> xp.uint32(32 - width)) & xp.uint32(mask)
    if dtype == "int8":
        raw = xp.where(raw == xp.uint32(0x80), xp.uint32(0x81), raw)
        lane = xp.arange(raw.shape[-1], dtype=xp.uint32)
        raw = xp.where(lane == xp.uint32(0), xp.uint32(127), raw)
    return xp.where(ids == xp.uint32(0), xp.uint32(0), raw).astype(word)


def token(seed: Any, position: Any, vocab_size: int, xp: ModuleType = np) -> Any:
    """The int32 token in 1 .. vocab_size - 1 that the scripted models yield at `position` of a request."""
    p = xp.asarray(position).astype(xp.uint32)
    h = (xp.asarray(seed).astype(xp.uint32) ^ mix32(p + xp.uint32(GOLDEN), xp)) * xp.uint32(GOLDEN)
    return (xp.uint32(1) + h % xp.uint32(vocab_size - 1)).astype(xp.int32)


def logits_digest(logits: Any, xp: ModuleType = np) -> Any:
    """A uint32 for each row of float32 logits that stands for all of their bits: a sum over tokens, in any order."""
    bits = xp.asarray(logits, xp.float32).view(xp.uint32)
    token_salt = mix32(xp.arange(1, bits.shape[-1] + 1, dtype=xp.uint32) * xp.uint32(GOLDEN), xp)
    return xp.sum(mix32(bits ^ token_salt, xp), axis=-1, dtype=xp.uint32)
