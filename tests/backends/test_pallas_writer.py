"""The Pallas page writer, interpreted copy by copy: bit for bit what an obvious loop writes, and nothing else."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.pallas_mode import interpreted
from backends.pallas_writer import write
from paged_attention import pytree
from paged_attention.cache import PagedAttentionCacheView, data_movement_options
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.model_io import PagedAttentionMetadata
from sim.host_devices import run_with_devices
from sim.mutants.contracts import CONTRACTS
from sim.run import run
from sim.scenario import dump_scenario, load_scenario

SCENARIO = Path("scenarios/gauntlet/pallas-writer.yaml")
HEADS, PAGES, HEAD_DIM = 2, 9, 8
CASES = [("bfloat16", 4, "heads_first"), ("float32", 16, "heads_first"), ("bfloat16", 4, "pages_first")]
SLOTS, CHUNK, ENTRIES = 5, 10, 4
WORD = {"bfloat16": np.uint16, "float32": np.uint32}
FINITE = {"bfloat16": 0xBFFF, "float32": 0xBFFFFFFF}


@functools.cache
def compiled_write(dtype: str, page_size: int, layout: str):
    """The writer over views of one shape, as a jitted function of arrays."""
    pytree.register()
    sizes = {"num_hidden_layers": 1, "batch_size": SLOTS, "num_kv_heads": HEADS, "kv_head_dim_size": HEAD_DIM}
    metadata = PagedAttentionCacheMetaData(
        num_pages_per_layer=PAGES,
        num_pages_per_sequence=ENTRIES,
        max_sequences=ENTRIES * page_size,
        page_size=page_size,
        hbm_utilization=1.0,
        **sizes,
    )

    def body(pools, key, value, attn_meta):
        with interpreted():
            view = write(PagedAttentionCacheView(metadata, 0, *pools, layout=layout), key, value, attn_meta)
        return view.key_pages, view.value_pages

    return jax.jit(body, compiler_options=data_movement_options("cpu", dtype))


def drawn_words(random, dtype: str, *shape: int):
    bits = random.integers(0, 1 << 32, shape).astype(WORD[dtype]) & WORD[dtype](FINITE[dtype])
    return bits.view(np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype))


def assert_written(case, seed: int, tokens: int, attn_meta, places) -> None:
    """The pools change at `places` (row, page, offset) alone, and there to the row's words."""
    dtype, page_size, layout = case
    to_layout = np.array if layout == "heads_first" else functools.partial(np.transpose, axes=(1, 2, 0, 3))
    random = np.random.default_rng(seed)
    pools = [drawn_words(random, dtype, HEADS, PAGES, page_size, HEAD_DIM) for _ in "kv"]
    rows = [drawn_words(random, dtype, tokens, HEADS, HEAD_DIM) for _ in "kv"]
    given = tuple(jnp.asarray(to_layout(pool)) for pool in pools)
    found = compiled_write(*case)(given, *map(jnp.asarray, rows), attn_meta)
    for pool, new, written in zip(pools, rows, found, strict=True):
        expected = pool.copy()
        for row, page, offset in places:
            expected[:, page, offset] = new[row]
        np.testing.assert_array_equal(np.asarray(written).view(WORD[dtype]), to_layout(expected).view(WORD[dtype]))


def prefill(start: int, count: int, table) -> PagedAttentionMetadata:
    """A padded chunk of `count` real rows from position `start`."""
    return PagedAttentionMetadata.init_empty().replace(
        prefill_length=jnp.int32(start + count),
        prefill_position=jnp.asarray(start + np.arange(CHUNK), jnp.int32),
        prefill_page_table=jnp.asarray(table, jnp.int32),
    )


def decodes(position, table) -> PagedAttentionMetadata:
    """A token for each slot."""
    return PagedAttentionMetadata.init_empty().replace(
        decodes_position=jnp.asarray(position, jnp.int32), decodes_page_table=jnp.asarray(table, jnp.int32)
    )


def place(row: int, position: int, table, page_size: int):
    """Where a row belongs: (row, page, offset), or None if that is no place of the pool."""
    entry, offset = divmod(position, page_size)
    if position < 0 or entry >= len(table) or not 0 <= table[entry] < PAGES:
        return None
    return row, int(table[entry]), offset


def tables(draw, shape):
    """Distinct pages, the odd one of them outside the pool."""
    pages = np.resize(draw(st.permutations(range(PAGES))), shape)
    odd = st.sampled_from([0] * 6 + [-1, -PAGES, PAGES, PAGES + 7, 2**30, -(2**31)])
    wrong = np.array(draw(st.lists(odd, min_size=pages.size, max_size=pages.size))).reshape(shape)
    return np.where(wrong != 0, wrong, pages)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_chunk_lands_where_its_table_says_whatever_it_starts_and_ends_within(case, data) -> None:
    page_size = case[1]
    start = data.draw(st.integers(0, ENTRIES * page_size - 1), "start")
    count = data.draw(st.integers(0, CHUNK), "count")
    table = tables(data.draw, ENTRIES)
    places = [place(row, start + row, table, page_size) for row in range(count)]
    attn_meta = prefill(start, count, table)
    assert_written(case, start, CHUNK, attn_meta, [there for there in places if there])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_each_live_slot_writes_its_own_place_and_nobody_else_writes(case, data) -> None:
    page_size = case[1]
    beyond = ENTRIES * page_size
    positions = st.one_of(st.integers(0, beyond - 1), st.sampled_from([-1, beyond, 10 * beyond]))
    position = data.draw(st.lists(positions, min_size=SLOTS, max_size=SLOTS), "position")
    table = np.full((SLOTS, ENTRIES), 1)
    for slot, page in enumerate(tables(data.draw, SLOTS)):
        # Slots write to pages of their own; what else their tables name they do not touch.
        table[slot] = 2
        table[slot, position[slot] // page_size % ENTRIES] = page
    places = [place(slot, position[slot], table[slot], page_size) for slot in range(SLOTS)]
    attn_meta = decodes(position, table)
    assert_written(case, position[0] + 1, SLOTS, attn_meta, [there for there in places if there])


def test_a_page_outside_the_pool_writes_nothing_and_raises_nothing() -> None:
    assert CONTRACTS["pallas_guard"]() == []


def test_quantised_pages_are_refused_with_what_to_change() -> None:
    found = run(load_scenario(SCENARIO, ("cache.quantize=true",))).summary["crash"]
    assert "drop `cache.quantize` or `backend.writer`" in found


@pytest.mark.slow
def test_a_whole_run_with_the_pallas_writer_holds_and_writes_what_ours_writes() -> None:
    pallas, ours = run(load_scenario(SCENARIO)), run(load_scenario(SCENARIO, ("backend.writer=null",)))
    assert not pallas.violations
    counters = pallas.summary["invariants"]
    assert counters["K1"]["nontrivial"]
    assert counters["K2"]["nontrivial"]
    assert pallas.summary["cache_hash"] == ours.summary["cache_hash"]
    assert pallas.trace_hash == ours.trace_hash


@pytest.mark.slow
def test_on_a_mesh_each_device_writes_its_own_heads(tmp_path: Path) -> None:
    short = load_scenario(SCENARIO, ("workload.num_requests=2",))
    path = tmp_path / "mesh.yaml"
    dump_scenario(short.model_copy(update={"backend": short.backend.model_copy(update={"mesh": {"heads": 2}})}), path)
    output, _ = run_with_devices(
        2, ["run", str(path), "--json", "--quiet", "--no-plots", "--out", str(tmp_path / "run")]
    )
    found = json.loads(output)
    ours = run(load_scenario(SCENARIO, ("workload.num_requests=2", "backend.writer=null")))
    assert found["verdict"] == "held"
    assert (found["cache_hash"], found["trace_hash"]) == (ours.summary["cache_hash"], ours.trace_hash)
