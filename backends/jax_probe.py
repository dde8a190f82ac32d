"""Looks into the pages on the device: compares places with fingerprints, fetches raw words, spoils pages."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from backends.jax_step import Pools, ScriptedModel
from backends.words import ONE_BITS, poison_scale, poison_word
from paged_attention.fingerprint import WORD_MASK, words

PLACES_PER_CALL = (1024, 32768)
"""Places compared in one call, padded to the smallest of these that holds them (each compiles once)."""
PAGES_PER_CALL = 64
"""Pages fetched or spoilt in one call."""
DETAILS_PER_CALL = 8
"""Places whose words are fetched in one call, once something is known to be wrong."""
_TILE = 128


def wrong_places(model: ScriptedModel, pools: Pools, packed: Int32[Array, "3 places"], count: Any) -> tuple[Any, Any]:
    """How many of the first `count` places (page, offset, kv_id) hold wrong words, and a flag for each place."""
    tile = min(_TILE, packed.shape[1])
    word = jnp.dtype(WORD_MASK[model.dtype][0])

    def compare(nth: Any, flags: Any) -> Any:
        page, offset, identity = lax.dynamic_slice_in_dim(packed, nth * tile, tile, axis=1)
        identity = lax.bitcast_convert_type(identity, jnp.uint32)
        index = model.layout.index(page, offset)
        wrong = jnp.zeros((model.cache.kv_heads, tile), bool)
        for layer, kind, values, scale in _arrays(model, pools):
            held = lax.bitcast_convert_type(lax.optimization_barrier(values[index]), word)
            expected = words(identity[:, None, None], model.salts[layer, kind], model.dtype, jnp)
            wrong |= (model.layout.to_tokens(held) != expected).any(axis=2).T
            if scale is not None:
                expected_scale = jnp.where(identity == 0, 0, ONE_BITS).astype(jnp.uint32)
                bits = lax.bitcast_convert_type(scale[index], jnp.uint32)
                wrong |= expected_scale != model.layout.to_tokens(bits).T
        return lax.dynamic_update_slice_in_dim(flags, wrong, nth * tile, axis=1)

    # Heads stay apart until the end: they may be sharded.
    flags = jnp.zeros((model.cache.kv_heads, packed.shape[1]), bool)
    flags = lax.fori_loop(0, (count + tile - 1) // tile, compare, flags).any(axis=0)
    flags &= jnp.arange(packed.shape[1]) < count
    return flags.sum(), flags


def place_words(
    model: ScriptedModel, pools: Pools, page: Int32[Array, " n"], offset: Int32[Array, " n"]
) -> tuple[Any, Any]:
    """Raw words (places, layers, 2, heads, head_dim) and, where pages are quantised, scale bits (.., heads)."""
    word = jnp.dtype(WORD_MASK[model.dtype][0])
    index = model.layout.index(page, offset)
    held: list[Any] = []
    scales: list[Any] = []
    for _, _, values, scale in _arrays(model, pools):
        held.append(model.layout.to_tokens(lax.bitcast_convert_type(values[index], word)))
        if scale is not None:
            scales.append(model.layout.to_tokens(lax.bitcast_convert_type(scale[index], jnp.uint32)))
    layers, heads = model.cache.layers, model.cache.kv_heads
    stacked = jnp.stack(held, axis=1).reshape(page.shape[0], layers, 2, heads, -1)
    return stacked, jnp.stack(scales, axis=1).reshape(page.shape[0], layers, 2, heads) if scales else None


def spoil_pages(model: ScriptedModel, pools: Pools, page: Int32[Array, " n"], how: Literal["nan", "big"]) -> Pools:
    """Pools with whole pages overwritten; a page id past the end is dropped."""
    raw = np.array(poison_word(model.dtype, how), WORD_MASK[model.dtype][0])
    index = model.layout.index(page[:, None], jnp.arange(model.cache.page_size))
    spoilt: list[Any] = []
    for pool in pools:
        is_scale = pool.ndim < 4
        value = jnp.asarray(poison_scale(how)) if is_scale else lax.bitcast_convert_type(jnp.asarray(raw), pool.dtype)
        spoilt.append(pool.at[index].set(value, mode="drop"))
    return tuple(spoilt)


def _arrays(model: ScriptedModel, pools: Pools) -> list[tuple[int, int, Any, Any]]:
    """(layer, 0 for K and 1 for V, words, scales or None) for every array of words, layer by layer."""
    found: list[tuple[int, int, Any, Any]] = []
    for layer, view in enumerate(model.views(pools)):
        for kind, pages in enumerate((view.key_pages, view.value_pages)):
            quantised = model.cache.quantize
            found.append((layer, kind, pages.values if quantised else pages, pages.scale if quantised else None))
    return found
