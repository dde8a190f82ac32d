"""Looks into the pages on the device: compares places with fingerprints, fetches raw words, spoils pages."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt32

from backends.jax_step import PagedModel, Pools
from backends.words import poison_scale, poison_word, scale_bits
from paged_attention.fingerprint import WORD_MASK, words

PLACES_PER_CALL = (96, 160, 320, 576, 640, 1024, 1536, 8192)
"""Places compared in one call, padded to the smallest of these that holds them (each compiles once)."""
PADDING = -(2**31)
"""A place of this page, offset and identity is padding: it is compared as the first place is."""
PAGES_PER_CALL = 64
"""Pages fetched or spoilt in one call."""


def differing_bits(model: PagedModel, pools: Pools, packed: Int32[Array, "3 places"]) -> UInt32[Array, " heads"]:
    """The bits in which any of these places (page, offset, kv_id) differs from what it should hold; 0: none is wrong.

    The first is no padding. A place outside the cache makes all bits differ. Heads stay apart: they may be sharded.
    """
    page, offset, identity = jnp.where(packed[0] == PADDING, packed[:, :1], packed)
    inside = (page >= 0) & (page < model.cache.num_pages) & (offset >= 0) & (offset < model.cache.page_size)
    outside = jnp.where(inside.all(), jnp.uint32(0), jnp.uint32(0xFFFFFFFF))
    identity = lax.bitcast_convert_type(identity, jnp.uint32)
    # All pools together before anything is reduced: a CPU reduces word by word, at four times the price of the rest.
    wrong, wrong_scales = jnp.zeros((), WORD_MASK[model.dtype][0]), jnp.uint32(0)
    for layer, kind, held, scales in _words_of_pools(model, pools, page, offset):
        salt = model.salts[layer, kind]
        wrong |= held ^ words(identity[:, None, None], salt, model.dtype, jnp)
        if model.cache.quantize:
            wrong_scales |= scales ^ scale_bits(identity[:, None], salt[:, 0], jnp)
    bits = lax.reduce(wrong, np.zeros((), wrong.dtype), lax.bitwise_or, (0, 2)).astype(jnp.uint32) | outside
    return bits | lax.reduce(wrong_scales, np.uint32(0), lax.bitwise_or, (0,)) if model.cache.quantize else bits


def place_words(
    model: PagedModel, pools: Pools, page: Int32[Array, " n"], offset: Int32[Array, " n"]
) -> tuple[Any, Any]:
    """Raw words (places, layers, 2, heads, head_dim) and, where pages are quantised, scale bits (.., heads)."""
    return _words_at(model, pools, page, offset)


def spoil_pages(model: PagedModel, pools: Pools, page: Int32[Array, " n"], how: Literal["nan", "big"]) -> Pools:
    """Pools with whole pages overwritten; a page id past the end is dropped."""
    raw = np.array(poison_word(model.dtype, how), WORD_MASK[model.dtype][0])
    index = model.layout.index(page[:, None], jnp.arange(model.cache.page_size))
    spoilt: list[Any] = []
    for pool in pools:
        is_scale = pool.ndim < 4
        value = jnp.asarray(poison_scale(how)) if is_scale else lax.bitcast_convert_type(jnp.asarray(raw), pool.dtype)
        spoilt.append(pool.at[index].set(value, mode="drop"))
    return tuple(spoilt)


def _words_at(model: PagedModel, pools: Pools, page: Any, offset: Any) -> tuple[Any, Any]:
    read = list(_words_of_pools(model, pools, page, offset))
    shape = (page.shape[0], model.cache.layers, 2, model.cache.kv_heads)
    held = jnp.stack([words for _, _, words, _ in read], axis=1).reshape(*shape, -1)
    if not model.cache.quantize:
        return held, None
    return held, jnp.stack([scales for _, _, _, scales in read], axis=1).reshape(shape)


def _words_of_pools(model: PagedModel, pools: Pools, page: Any, offset: Any) -> Iterator[tuple[int, int, Any, Any]]:
    """(layer, 0 for K or 1 for V, raw words (places, heads, head_dim), scale bits (places, heads) or None)."""
    word = jnp.dtype(WORD_MASK[model.dtype][0])
    index = model.layout.index(page, offset)
    for layer, view in enumerate(model.views(pools)):
        for kind, pages in enumerate((view.key_pages, view.value_pages)):
            values, scales = (pages.values, pages.scale) if model.cache.quantize else (pages, None)
            if scales is not None:
                scales = model.layout.to_tokens(lax.bitcast_convert_type(scales[index], jnp.uint32))
            yield layer, kind, model.layout.to_tokens(lax.bitcast_convert_type(values[index], word)), scales
