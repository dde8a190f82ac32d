"""JAX's attention over pages that our writes filled: it agrees with softmax attention that knows no pages."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from backends import pallas_writer
from backends.jax_programs import Programs
from backends.jax_step import own_writer
from backends.pallas_mode import interpreted
from backends.protocol import DeviceSpec, ModelSpec
from paged_attention.decoder_spec import KV_LIMIT
from paged_attention.model_io import query_starts
from tests.attention.filled import (
    CHUNK,
    CHUNK_ROWS,
    ENTRIES,
    HEAD_DIM,
    KV_HEADS,
    LENGTHS,
    PAGE_SIZE,
    SLOTS,
    Filled,
    filled,
)
from tests.attention.reference import attend
from tests.backends.harness import cache_spec

pytestmark = pytest.mark.slow

QUERY_HEADS = 6
SCALE = HEAD_DIM**-0.5
LIVE = len(LENGTHS)


def normal(random, shape):
    """Draws that bfloat16 holds: the kernel rounds K and V to it."""
    return random.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)


def drawn_query(seed: int, rows: int):
    return np.random.default_rng(seed).normal(size=(rows, QUERY_HEADS, HEAD_DIM)).astype(np.float32)


def ragged(pages: Filled, chunk_query, slot_query, scale: float):
    """JAX's reference over a step's rows [chunk][slots], padding and idle slots left out."""
    view, attn_meta = pages.view, pages.attn_meta
    # (pages, page, heads, K|V, head_dim), and then heads and kinds as one axis: K and V in turn.
    pools = np.stack([np.asarray(view.key_pages), np.asarray(view.value_pages)], axis=3).transpose(1, 2, 0, 3, 4)
    combined = jnp.asarray(pools.reshape(*pools.shape[:2], 2 * KV_HEADS, HEAD_DIM))
    table = jnp.concatenate([attn_meta.prefill_page_table[None], attn_meta.decodes_page_table])
    lengths = jnp.concatenate([attn_meta.prefill_length[None], attn_meta.decodes_position + 1])
    queries = jnp.concatenate([chunk_query[:CHUNK_ROWS], slot_query[:LIVE]])
    starts, number = query_starts(attn_meta), jnp.array([1 + SLOTS], jnp.int32)
    return ref_ragged_paged_attention(queries, combined, lengths, table, starts, number, sm_scale=scale)


@pytest.mark.parametrize("writer", [own_writer, pallas_writer.write])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_paged_attention_kernel_finds_each_slots_tokens_on_our_pages(writer, seed: int) -> None:
    with interpreted():
        pages = filled(writer, seed, normal)
        query = drawn_query(seed, SLOTS)
        lengths, table = pages.attn_meta.decodes_position + 1, pages.attn_meta.decodes_page_table
        found = paged_attention(
            jnp.asarray(query) * SCALE,
            pages.view.key_pages,
            pages.view.value_pages,
            lengths,
            table,
            pages_per_compute_block=ENTRIES // 2,
        )
    for slot in range(LIVE):
        expected = attend(query[slot : slot + 1], pages.keys[slot], pages.values[slot], SCALE)
        np.testing.assert_allclose(np.asarray(found)[slot], expected[0], atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ragged_reference_finds_chunk_and_slots_on_our_pages(seed: int) -> None:
    pages = filled(own_writer, seed, normal)
    chunk_query, slot_query = drawn_query(seed, CHUNK), drawn_query(seed + 1, SLOTS)
    found = np.asarray(ragged(pages, chunk_query, slot_query, SCALE))
    expected = attend(chunk_query[:CHUNK_ROWS], pages.keys[-1], pages.values[-1], SCALE)
    np.testing.assert_allclose(found[:CHUNK_ROWS], expected, atol=1e-5)
    for slot in range(LIVE):
        expected = attend(slot_query[slot : slot + 1], pages.keys[slot], pages.values[slot], SCALE)
        np.testing.assert_allclose(found[CHUNK_ROWS + slot], expected[0], atol=1e-5)


def whole_numbers(random, shape):
    return random.integers(-KV_LIMIT, KV_LIMIT + 1, shape)


@functools.cache
def decoder():
    """The small decoder over such pages."""
    sizes = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "page_size": PAGE_SIZE, "dtype": "float32", "layers": 1}
    cache = cache_spec(max_sequence_length=ENTRIES * PAGE_SIZE, batch_size=SLOTS, prefill_chunk=CHUNK, **sizes)
    return Programs(cache, ModelSpec("tiny", vocab_size=16, query_heads=QUERY_HEADS), DeviceSpec()).model


@pytest.mark.parametrize("seed", [0, 1])
def test_the_small_decoder_attends_as_softmax_does_within_what_whole_numbers_round_off(seed: int) -> None:
    model, pages = decoder(), filled(own_writer, seed, whole_numbers)
    random = np.random.default_rng(seed)
    # Small queries, so that several positions count.
    chunk_query, slot_query = (random.integers(-9, 10, (rows, QUERY_HEADS, HEAD_DIM)) for rows in (CHUNK, SLOTS))
    attn_meta = pages.attn_meta
    of_chunk = model._attend(
        pages.view,
        jnp.asarray(chunk_query, jnp.int32)[None],
        attn_meta.prefill_page_table[None],
        attn_meta.prefill_position[None],
    )
    of_slots = model._attend(
        pages.view,
        jnp.asarray(slot_query, jnp.int32)[:, None],
        attn_meta.decodes_page_table,
        attn_meta.decodes_position[:, None],
    )
    found = np.concatenate([np.asarray(of_chunk)[0, :CHUNK_ROWS], np.asarray(of_slots)[:LIVE, 0]]).reshape(
        -1, QUERY_HEADS, HEAD_DIM
    )
    scale = 2.0 ** -(model.spec.score_shift + 4)
    expected = 16 * np.asarray(ragged(pages, *(q.astype(np.float32) for q in (chunk_query, slot_query)), scale))
    # Scores are rounded down to 16ths of an exponent, so that weights are off by factors of up to exp(1 / 16) either
    # way, which moves at most tanh(1 / 16) of all weight; each is then rounded to 255ths of the largest.
    moved = np.tanh(1 / 16) + 0.5 * max(LENGTHS) / 255
    assert np.abs(found - expected).max() <= 16 * 2 * KV_LIMIT * moved
