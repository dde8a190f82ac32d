"""One step of the scripted model on the device: K/V of every layer into its pages, then a token for each row."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt32

from backends.jax_reader import PageReader
from backends.loading import load_function
from backends.protocol import CacheSpec, ModelSpec
from backends.words import scale_bits, stored_dtype
from paged_attention.arrays import is_present
from paged_attention.cache import PagedAttentionCacheView
from paged_attention.fingerprint import kv_id, salts, token, words
from paged_attention.layout import LAYOUTS, Layout
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.model_io import PagedAttentionMetadata
from paged_attention.plan import EOS_TOKEN, UNKNOWN_TOKEN
from paged_attention.sampling import SamplingParams

Writer = Callable[[PagedAttentionCacheView, Any, Any, PagedAttentionMetadata], PagedAttentionCacheView]
"""A user's own write: (view, key, value, attn_meta) -> view.

It is called under `jax.jit`, for each layer once for the prefill rows and once for the decode rows of a step, with
`attn_meta` holding that part alone (`is_prefill_mode` or `is_decode_mode` tells which); key and value are (rows, heads,
head_dim) in the dtype of the cache. It must write row i at the place that attn_meta gives it, and drop padding rows.
"""


Pools = tuple[Any, ...]
"""Every array of the cache, layer by layer, K before V (and a quantised one's values before its scales)."""


class Sampled(NamedTuple):
    """What the rows [prefill][decodes] of a step yield, -1 and False where they yield nothing."""

    token: Int32[Array, " rows"]
    complete: Bool[Array, " rows"]
    logits: UInt32[Array, " rows"] | None = None
    """Digests of the logits, where the model has any."""

    def stacked(self) -> Int32[Array, "2_or_3 rows"]:
        """All of it in one array, to be fetched at once."""
        rows = [self.token, self.complete.astype(jnp.int32)]
        digests = [] if self.logits is None else [lax.bitcast_convert_type(self.logits, jnp.int32)]
        return jnp.stack(rows + digests)


class Fed(NamedTuple):
    """What a decoder is fed; scripted models have no use for it."""

    token: Int32[Array, " tokens"]
    """[prefill chunk][decodes]."""
    params: SamplingParams
    """Of the sampled rows [prefill][decodes]."""


class RowFacts(NamedTuple):
    """What the scripted model knows of each row [prefill][decodes]; see `paged_attention.plan.ModelRows`."""

    kv_base: UInt32[Array, " rows"]
    token_seed: UInt32[Array, " rows"]
    eos_position: Int32[Array, " rows"]
    samples: Bool[Array, " rows"]


def load_writer(name: str) -> Writer:
    """The function that "module:function" names. ValueError: it cannot be imported, or is no function."""
    try:
        return cast("Writer", load_function(name))
    except ValueError as error:
        raise ValueError(f"writer {error}") from error


def own_writer(view: PagedAttentionCacheView, key: Any, value: Any, attn_meta: Any) -> PagedAttentionCacheView:
    """The views' own write methods, as a `Writer`."""
    view = view.write_decodes_to_cache(key, value, attn_meta) if attn_meta.is_decode_mode() else view
    return view.write_prefill_to_cache(key, value, attn_meta) if attn_meta.is_prefill_mode() else view


@dataclass(frozen=True)
class PagedModel:
    """What every model is over a cache of `cache`'s shape: its views, and how they are written."""

    cache: CacheSpec
    model: ModelSpec
    metadata: PagedAttentionCacheMetaData
    cache_tree: Any
    """The tree definition of the cache's arrays: what makes views of pools."""
    tile_pages: int
    """Pages that the reader reads at once."""
    writer: Writer
    dtype: str = field(init=False)
    salts: UInt32[np.ndarray, "layers 2 heads head_dim"] = field(init=False)

    def __post_init__(self) -> None:
        cache = self.cache
        set_field = object.__setattr__
        set_field(self, "dtype", stored_dtype(cache))
        set_field(self, "salts", salts(cache.layers, cache.kv_heads, cache.head_dim))

    @property
    def layout(self) -> Layout:
        """The layout of the pages."""
        return LAYOUTS[self.cache.layout]

    def views(self, pools: Pools) -> list[PagedAttentionCacheView]:
        """The cache views over these arrays."""
        return self.cache_tree.unflatten(pools).views

    def step(self, pools: Pools, attn_meta: PagedAttentionMetadata, facts: RowFacts, fed: Fed) -> tuple[Pools, Sampled]:
        """Write the K/V of every row of `attn_meta`, then read and sample; `facts` has a row for each of its rows.

        Decodes are written before the chunk: after a loop of page writes, the TPU compiler would give the decodes'
        scatter pools of another memory layout, which it copies them to and back.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ScriptedModel(PagedModel):
    """The echo and reader models: K/V and tokens are hashes."""

    reader: PageReader = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        cache = self.cache
        geometry = (cache.layers, cache.kv_heads, cache.page_size, cache.head_dim)
        reader = PageReader(self.layout, self.dtype, geometry, self.model.lanes, self.tile_pages)
        object.__setattr__(self, "reader", reader)

    def step(self, pools: Pools, attn_meta: PagedAttentionMetadata, facts: RowFacts, fed: Fed) -> tuple[Pools, Sampled]:
        """See PagedModel."""
        views = self.views(pools)
        prefill, decodes = parts_of(attn_meta)
        first_decode = 0 if prefill is None else 1
        base = facts.kv_base
        if decodes is not None:
            identity = kv_id(base[first_decode:], decodes.decodes_position, jnp)
            views = self._write(views, identity, decodes)
        if prefill is not None:
            identity = kv_id(base[0], prefill.prefill_position, jnp)
            views = self._write(views, identity, prefill)
        return tuple(jax.tree.leaves(views)), self._sample(views, prefill, decodes, facts)

    def _write(self, views: list[PagedAttentionCacheView], identity: Any, attn_meta: Any) -> list[Any]:
        raw = words(identity[:, None, None, None, None], self.salts, self.dtype, jnp)
        if self.cache.quantize:
            scale = lax.bitcast_convert_type(
                scale_bits(identity[:, None, None, None], self.salts[..., 0], jnp), jnp.float32
            )
            values = lax.bitcast_convert_type(raw, jnp.int8).astype(jnp.float32) * scale[..., None]
        else:
            values = lax.bitcast_convert_type(raw, jnp.dtype(self.cache.dtype))
        vectors = values.astype(jnp.dtype(self.cache.dtype))
        return [
            self.writer(view, vectors[:, layer, 0], vectors[:, layer, 1], attn_meta) for layer, view in enumerate(views)
        ]

    def _sample(self, views: list[Any], prefill: Any, decodes: Any, facts: RowFacts) -> Sampled:
        width = self.metadata.num_pages_per_sequence
        length: list[Any] = []
        table: list[Any] = []
        if prefill is not None:
            length.append(prefill.prefill_length[None])
            table.append(prefill.prefill_page_table[None, :width])
        if decodes is not None:
            length.append(decodes.decodes_position + 1)
            table.append(decodes.decodes_page_table)
        position = jnp.concatenate(length)
        yields = facts.samples & (position > 0)
        complete = yields & (position == facts.eos_position)
        scripted = token(facts.token_seed, position, self.model.vocab_size, jnp)
        scripted = jnp.where(complete, EOS_TOKEN, scripted)
        if self.model.kind == "reader":
            pools = [self.raw_pools(view) for view in views]
            reads = jnp.where(yields, position, 0)
            scripted += self.reader.wrong_words(pools, jnp.concatenate(table), reads, facts.kv_base)
        return Sampled(jnp.where(yields, scripted, UNKNOWN_TOKEN), complete)

    def raw_pools(self, view: PagedAttentionCacheView) -> tuple[Any, Any]:
        """The arrays of a view that hold fingerprints: its pages, or the int8 values of quantised ones."""
        if self.cache.quantize:
            return view.key_pages.values, view.value_pages.values
        return view.key_pages, view.value_pages


def parts_of(attn_meta: PagedAttentionMetadata) -> tuple[Any, Any]:
    """The prefill and the decode part of a step's metadata, each alone; None where there is none."""
    absent = PagedAttentionMetadata.init_empty()
    prefill = decodes = None
    if is_present(attn_meta.prefill_position):
        prefill = attn_meta.replace(
            decodes_position=absent.decodes_position, decodes_page_table=absent.decodes_page_table
        )
    if is_present(attn_meta.decodes_position):
        decodes = attn_meta.replace(
            prefill_length=absent.prefill_length,
            prefill_position=absent.prefill_position,
            prefill_page_table=absent.prefill_page_table,
        )
    return prefill, decodes
