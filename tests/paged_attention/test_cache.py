"""What the cache views write, and what they leave alone."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from paged_attention import pytree
from paged_attention.cache import PagedAttentionCache, PagedAttentionCacheView, data_movement_options
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.model_io import PagedAttentionMetadata
from paged_attention.quantize import Int8PerTokenHead

SLOTS, PAGES, PAGE, HEADS, DIM, LENGTH, CHUNK = 3, 12, 4, 2, 8, 18, 6
TABLE = 5


def metadata(**changes):
    sizes = {
        "batch_size": SLOTS,
        "num_hidden_layers": 2,
        "num_pages_per_layer": PAGES,
        "num_pages_per_sequence": TABLE,
        "max_sequences": LENGTH,
        "page_size": PAGE,
        "num_kv_heads": HEADS,
        "kv_head_dim_size": DIM,
        "hbm_utilization": 1.0,
    }
    return PagedAttentionCacheMetaData(**(sizes | changes))


def mesh():
    pytree.register()
    return Mesh(np.array(jax.devices("cpu")[:1]), ("tp",))


def dirty_view(where, dtype, random):
    """A view whose every word is something already, so that a stray write shows."""
    view = PagedAttentionCacheView.init(where, dtype, metadata(), 0)
    words = [random.standard_normal(view.key_pages.shape).astype(dtype) for _ in range(2)]
    if where is not None:
        words = [jax.device_put(array, view.key_pages.sharding) for array in words]
    return view.replace(key_pages=words[0], value_pages=words[1])


def tokens(count, dtype, random):
    return random.standard_normal((2, count, HEADS, DIM)).astype(dtype)


def prefill(start, length, table):
    return PagedAttentionMetadata.init_empty().replace(
        prefill_length=np.array(length, np.int32),
        prefill_position=np.arange(start, start + CHUNK, dtype=np.int32),
        prefill_page_table=np.array(table, np.int32),
    )


def decodes(positions, tables):
    return PagedAttentionMetadata.init_empty().replace(
        decodes_position=np.array(positions, np.int32), decodes_page_table=np.array(tables, np.int32)
    )


@functools.cache
def compiled(method, donate=False):
    pytree.register()
    return jax.jit(
        getattr(PagedAttentionCacheView, method),
        donate_argnums=0 if donate else (),
        compiler_options=data_movement_options("cpu", ml_dtypes.bfloat16),
    )


def write(view, method, key, value, meta):
    if isinstance(view.key_pages, np.ndarray):
        return getattr(view, method)(key, value, meta)
    return compiled(method)(view, key, value, meta)


def bits(pages):
    return np.asarray(pages).view(np.uint16)


def expected_pages(pages, places):
    """A copy of `pages` with {(page, offset): vector of every head} put in."""
    copy = np.array(pages)
    for (page, offset), vectors in places.items():
        copy[:, page, offset] = vectors
    return copy


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    on_device=st.booleans(),
    start=st.integers(0, LENGTH - 1),
    length=st.integers(0, LENGTH),
)
def test_seed_01_a_chunk_lands_at_its_own_start_and_touches_nothing_else(seed, on_device, start, length):
    random = np.random.default_rng(seed)
    view = dirty_view(mesh() if on_device else None, ml_dtypes.bfloat16, random)
    key, value = tokens(CHUNK, ml_dtypes.bfloat16, random)
    table = random.permutation(np.arange(1, PAGES))[:TABLE]

    written = write(view, "write_prefill_to_cache", key, value, prefill(start, length, table))

    for before, after, vectors in (
        (view.key_pages, written.key_pages, key),
        (view.value_pages, written.value_pages, value),
    ):
        places = {
            (table[position // PAGE], position % PAGE): vectors[row]
            for row, position in enumerate(range(start, start + CHUNK))
            if position < length
        }
        assert np.array_equal(bits(after), bits(expected_pages(before, places)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    on_device=st.booleans(),
    positions=st.lists(st.integers(-1, LENGTH - 1), min_size=SLOTS, max_size=SLOTS),
)
def test_seed_03_live_slots_write_one_place_each_and_dead_slots_none(seed, on_device, positions):
    random = np.random.default_rng(seed)
    view = dirty_view(mesh() if on_device else None, ml_dtypes.bfloat16, random)
    key, value = tokens(SLOTS, ml_dtypes.bfloat16, random)
    # Slots share no page: a table row each out of one permutation.
    tables = np.zeros((SLOTS, TABLE), np.int32)
    tables[:, :3] = random.permutation(np.arange(1, PAGES))[: SLOTS * 3].reshape(SLOTS, 3)
    positions = [min(position, 3 * PAGE - 1) for position in positions]

    written = write(view, "write_decodes_to_cache", key, value, decodes(positions, tables))

    for before, after, vectors in (
        (view.key_pages, written.key_pages, key),
        (view.value_pages, written.value_pages, value),
    ):
        places = {
            (tables[slot, position // PAGE], position % PAGE): vectors[slot]
            for slot, position in enumerate(positions)
            if position >= 0
        }
        assert np.array_equal(bits(after), bits(expected_pages(before, places)))


@pytest.mark.parametrize("page", [-1, PAGES, PAGES + 5])
@pytest.mark.parametrize("on_device", [False, True])
def test_seed_25_a_page_id_outside_the_pool_is_an_error_before_the_write(page, on_device):
    random = np.random.default_rng(0)
    view = PagedAttentionCacheView.init(mesh() if on_device else None, np.float32, metadata(), 0)
    key, value = tokens(CHUNK, np.float32, random)
    with pytest.raises(ValueError, match=r"page ids must lie in 0\.\.11.*found \[" + str(page)):
        view.write_prefill_to_cache(key, value, prefill(2, 5, [1, page, 3, 0, 0]))
    with pytest.raises(ValueError, match=r"page ids must lie in 0\.\.11"):
        view.write_decodes_to_cache(key[:1], value[:1], decodes([5], [[1, page, 3, 0, 0]]))
    assert not np.asarray(view.key_pages).any()


@pytest.mark.parametrize("page", [-1, PAGES])
def test_seed_25_under_jit_a_row_without_a_page_writes_nothing_at_all(page):
    random = np.random.default_rng(0)
    view = dirty_view(mesh(), ml_dtypes.bfloat16, random)
    key, value = tokens(CHUNK, ml_dtypes.bfloat16, random)
    written = write(view, "write_prefill_to_cache", key, value, prefill(4, 8, [1, page, 3, 0, 0]))
    assert np.array_equal(bits(written.key_pages), bits(view.key_pages))
    tables = [[1, page, 3, 0, 0]] * SLOTS
    written = write(view, "write_decodes_to_cache", key[:SLOTS], value[:SLOTS], decodes([5, -1, -1], tables))
    assert np.array_equal(bits(written.value_pages), bits(view.value_pages))


def test_seed_06_a_table_too_short_for_a_token_is_refused_with_both_numbers():
    view = PagedAttentionCacheView.init(None, np.float32, metadata(), 0)
    key, value = tokens(CHUNK, np.float32, np.random.default_rng(0))
    with pytest.raises(ValueError, match="2 entries has no place for a token on logical page 2"):
        view.write_prefill_to_cache(key, value, prefill(6, 12, [1, 2]))
    with pytest.raises(ValueError, match="5 entries has no place for a token on logical page 5"):
        view.write_decodes_to_cache(key[:1], value[:1], decodes([TABLE * PAGE], [[1, 2, 3, 4, 5]]))


def test_seed_06_under_jit_a_token_beyond_the_table_is_written_nowhere():
    random = np.random.default_rng(0)
    view = dirty_view(mesh(), ml_dtypes.bfloat16, random)
    key, value = tokens(CHUNK, ml_dtypes.bfloat16, random)
    table, end = [1, 2, 3, 4, 5], TABLE * PAGE
    written = write(view, "write_prefill_to_cache", key, value, prefill(end, end + CHUNK, table))
    assert np.array_equal(bits(written.key_pages), bits(view.key_pages))
    step = decodes([end, end + 1, -1], [table] * SLOTS)
    written = write(view, "write_decodes_to_cache", key[:SLOTS], value[:SLOTS], step)
    assert np.array_equal(bits(written.key_pages), bits(view.key_pages))


def test_seed_28_the_old_view_stays_as_it_was_and_a_donated_one_is_written_in_place():
    random = np.random.default_rng(1)
    key, value = tokens(SLOTS, ml_dtypes.bfloat16, random)
    meta = decodes([0, 1, 2], [[slot + 1] + [0] * (TABLE - 1) for slot in range(SLOTS)])
    for where in (None, mesh()):
        view = dirty_view(where, ml_dtypes.bfloat16, random)
        before = bits(view.key_pages).copy()
        written = write(view, "write_decodes_to_cache", key, value, meta)
        assert np.array_equal(bits(view.key_pages), before)
        assert not np.array_equal(bits(written.key_pages), before)
        chunk = tokens(CHUNK, ml_dtypes.bfloat16, random)
        written = write(view, "write_prefill_to_cache", *chunk, prefill(1, 5, range(1, 1 + TABLE)))
        assert np.array_equal(bits(view.key_pages), before)
        assert not np.array_equal(bits(written.key_pages), before)
    step = compiled("write_decodes_to_cache", donate=True)
    view = written
    for _ in range(3):
        address = view.key_pages.unsafe_buffer_pointer()
        view = step(view, key, value, meta)
        assert view.key_pages.unsafe_buffer_pointer() == address
    assert view.metadata == metadata()


@pytest.mark.parametrize("method", ["write_prefill_to_cache", "write_decodes_to_cache"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float32"])
def test_a_donated_write_needs_no_room_of_the_size_of_the_pool(method, dtype):
    big = metadata(num_pages_per_layer=2048)
    view = PagedAttentionCacheView.init(mesh(), np.dtype(dtype), big, 0)
    meta = prefill(0, 6, [1] * TABLE) if "prefill" in method else decodes([0, 1, 2], [[1] * TABLE] * SLOTS)
    count = CHUNK if "prefill" in method else SLOTS
    key = jnp.zeros((count, HEADS, DIM), np.dtype(dtype))
    program = jax.jit(
        getattr(PagedAttentionCacheView, method),
        donate_argnums=0,
        compiler_options=data_movement_options("cpu", np.dtype(dtype)),
    )
    memory = program.lower(view, key, key, meta).compile().memory_analysis()
    pool_bytes = view.key_pages.nbytes
    assert memory.alias_size_in_bytes == 2 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 10


def test_metadata_with_neither_part_writes_nothing():
    view = PagedAttentionCacheView.init(None, np.float32, metadata(), 0)
    nothing = PagedAttentionMetadata.init_empty()
    key, value = tokens(CHUNK, np.float32, np.random.default_rng(0))
    assert view.write_prefill_to_cache(key, value, nothing) is view
    assert view.write_decodes_to_cache(key, value, nothing) is view


@functools.cache
def quantised_views():
    """A plain and a device view of zeros, made once: each one that is made compiles anew."""
    return [
        PagedAttentionCacheView.init(at, np.float32, metadata(), 0, None, Int8PerTokenHead()) for at in (None, mesh())
    ]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_quantised_view_holds_each_vector_to_half_a_step_of_its_own_scale(seed):
    random = np.random.default_rng(seed)
    key, value = tokens(CHUNK, np.float32, random) * 10
    meta = prefill(1, 7, [3, 5, 0, 0, 0])
    plain, device = (write(view, "write_prefill_to_cache", key, value, meta) for view in quantised_views())
    assert np.array_equal(plain.key_pages.values, np.asarray(device.key_pages.values))
    assert np.array_equal(plain.value_pages.scale, np.asarray(device.value_pages.scale))
    back = Int8PerTokenHead().dequantize(plain.key_pages)
    for row, position in enumerate(range(1, 7)):
        page, offset = [3, 5][position // PAGE], position % PAGE
        step = np.abs(key[row]).max(axis=-1, keepdims=True) / 127
        assert (np.abs(back[:, page, offset] - key[row]) <= step * 0.5001).all()
    assert np.count_nonzero(plain.key_pages.scale) == 6 * HEADS


def test_a_quantised_page_keeps_its_neighbours_bit_for_bit():
    quantizer = Int8PerTokenHead()
    view = PagedAttentionCacheView.init(None, np.float32, metadata(), 0, None, quantizer)
    key, value = tokens(CHUNK, np.float32, np.random.default_rng(0))
    first = view.write_prefill_to_cache(key, value, prefill(0, 2, [3, 0, 0, 0, 0]))
    second = first.write_decodes_to_cache(key[2:3] * 1000, value[2:3], decodes([2], [[3, 0, 0, 0, 0]]))
    assert np.array_equal(second.key_pages.values[:, 3, :2], first.key_pages.values[:, 3, :2])
    assert np.array_equal(second.key_pages.scale[:, 3, :2], first.key_pages.scale[:, 3, :2])


class EverythingOnPages:
    def partition_spec(self, axes, shape):
        assert axes == ("heads", "pages", "page", "head_dim")
        assert shape == (HEADS, PAGES, PAGE, DIM)
        return PartitionSpec(None, "tp")


def test_a_partition_manager_decides_how_pages_are_sharded_and_heads_are_by_default():
    where = mesh()
    own = PagedAttentionCacheView.init(where, np.float32, metadata(), 0, EverythingOnPages())
    assert own.key_pages.sharding.spec == PartitionSpec(None, "tp")
    default = PagedAttentionCacheView.init(where, np.float32, metadata(), 0)
    assert default.key_pages.sharding.mesh == where


def test_a_cache_has_a_view_for_each_layer_and_survives_json():
    cache = PagedAttentionCache.init_cache(None, ml_dtypes.bfloat16, metadata(), None, Int8PerTokenHead())
    assert [view.layer_index for view in cache.views] == [0, 1]
    back = PagedAttentionCache.from_json(cache.to_json())
    assert back.views[1].metadata == metadata()
    assert back.views[1].quantizer == Int8PerTokenHead()
    assert back.views[1].key_pages.values.dtype == np.int8
    assert back.views[0].value_pages.scale.shape == (HEADS, PAGES, PAGE)


def test_what_a_paged_cache_does_not_do_is_said():
    cache = PagedAttentionCache.init_cache(None, np.float32, metadata(), None)
    assert cache.init_empty() is None
    with pytest.raises(NotImplementedError, match="write_prefill_to_cache"):
        cache.views[0].concatenate_to_cache()
