"""Pages as serving fills them: prompts in padded chunks, then a decode of every slot, through the writes of a step."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from backends.jax_step import Writer
from paged_attention import pytree
from paged_attention.cache import PagedAttentionCacheView
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.model_io import PagedAttentionMetadata

KV_HEADS, HEAD_DIM, PAGE_SIZE, ENTRIES, CHUNK = 2, 32, 4, 6, 10
LENGTHS = (13, 1, 24, 9)
"""Tokens of each slot's sequence; a fifth slot is idle, a sixth sequence is in prefill."""
CHUNK_AT, CHUNK_ROWS = 7, 5
"""Where the newest chunk of the sequence in prefill starts, and its real rows."""
SLOTS = len(LENGTHS) + 1


@dataclass(frozen=True)
class Filled:
    """Pages, and what was written to them: K and V (tokens, heads, head_dim) of each slot, then of the prefill."""

    view: PagedAttentionCacheView
    attn_meta: PagedAttentionMetadata
    """Of the last step: the newest chunk of the prefill, and a decode of each slot."""
    keys: list
    values: list


def filled(writer: Writer, seed: int, draw) -> Filled:
    """Pages of float32 over random tables; `draw` (random, shape) gives K and V."""
    pytree.register()
    random = np.random.default_rng(seed)
    lengths = [*LENGTHS, CHUNK_AT + CHUNK_ROWS]
    num_pages = 1 + (SLOTS + 1) * ENTRIES
    tables = 1 + random.permutation(num_pages - 1).astype(np.int32).reshape(-1, ENTRIES)
    tables[SLOTS - 1] = 0  # the idle slot's
    keys, values = ([draw(random, (length, KV_HEADS, HEAD_DIM)).astype(np.float32) for length in lengths] for _ in "kv")
    metadata = PagedAttentionCacheMetaData(
        num_hidden_layers=1,
        batch_size=SLOTS,
        num_pages_per_layer=num_pages,
        num_pages_per_sequence=ENTRIES,
        max_sequences=ENTRIES * PAGE_SIZE,
        page_size=PAGE_SIZE,
        num_kv_heads=KV_HEADS,
        kv_head_dim_size=HEAD_DIM,
        hbm_utilization=1.0,
    )
    # What nobody wrote is large: whoever reads it is far off.
    pages = jnp.full((KV_HEADS, num_pages, PAGE_SIZE, HEAD_DIM), 1e4, jnp.float32)
    view, write = PagedAttentionCacheView(metadata, 0, pages, pages), jax.jit(writer)
    rows = [*range(len(LENGTHS)), SLOTS]
    for row, key, value in zip(rows, keys, values, strict=True):
        prompt = len(key) - (row < SLOTS)
        starts = [*range(0, CHUNK_AT, CHUNK), CHUNK_AT] if row == SLOTS else range(0, prompt, CHUNK)
        for start in starts:
            end = CHUNK_AT if row == SLOTS and start < CHUNK_AT else min(prompt, start + CHUNK)
            view = write(view, padded(key[start:end]), padded(value[start:end]), chunk(start, end, tables[row]))
    newest = [np.stack([tokens[-1] for tokens in kind[:-1]] + [np.zeros_like(kind[0][0])]) for kind in (keys, values)]
    decodes = PagedAttentionMetadata.init_empty().replace(
        decodes_position=jnp.array([*(length - 1 for length in LENGTHS), -1], jnp.int32),
        decodes_page_table=jnp.asarray(tables[:SLOTS]),
    )
    view = write(view, *map(jnp.asarray, newest), decodes)
    last = chunk(CHUNK_AT, CHUNK_AT + CHUNK_ROWS, tables[SLOTS])
    attn_meta = last.replace(decodes_position=decodes.decodes_position, decodes_page_table=decodes.decodes_page_table)
    return Filled(view, attn_meta, keys, values)


def chunk(start: int, end: int, table) -> PagedAttentionMetadata:
    """A padded chunk."""
    return PagedAttentionMetadata.init_empty().replace(
        prefill_length=jnp.int32(end),
        prefill_position=jnp.arange(start, start + CHUNK, dtype=jnp.int32),
        prefill_page_table=jnp.asarray(table, jnp.int32),
    )


def padded(rows):
    """The rows of a chunk, with padding that must not be written."""
    return jnp.asarray(np.concatenate([rows, np.full((CHUNK - len(rows), *rows.shape[1:]), 3e4, np.float32)]))
