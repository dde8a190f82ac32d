"""Every layout holds the same words at the same places, whatever the order of its axes."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_attention import writes
from paged_attention.cache import data_movement_options
from paged_attention.layout import LAYOUTS

HEADS, PAGES, PAGE, DIM, ROWS, TABLE = 3, 7, 4, 5, 6, 4
PLAIN_AXES = ("pages", "page", "heads", "head_dim")
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def plain(layout, pool):
    """A pool by its axis names alone: (pages, page, heads[, head_dim]) as a NumPy array."""
    axes = layout.axes[: pool.ndim]
    return np.transpose(np.asarray(pool), [axes.index(axis) for axis in PLAIN_AXES[: pool.ndim]])


def numbered(layout, ndim=4):
    """A pool whose every word says where it lies, and the same in plain order."""
    words = np.arange(HEADS * PAGES * PAGE * DIM).reshape(PAGES, PAGE, HEADS, DIM)[(..., 0)[: 5 - ndim]]
    axes = PLAIN_AXES[:ndim]
    return np.ascontiguousarray(np.transpose(words, [axes.index(axis) for axis in layout.axes[:ndim]])), words


@EACH_LAYOUT
def test_a_layout_says_itself_in_which_order_its_axes_lie(layout):
    sizes = {"heads": HEADS, "pages": PAGES, "page": PAGE, "head_dim": DIM}
    assert layout.shape(HEADS, PAGES, PAGE, DIM) == tuple(sizes[axis] for axis in layout.axes)
    pool, _ = numbered(layout)
    assert layout.num_pages(pool) == layout.num_pages(pool[..., 0]) == PAGES
    assert hash(layout) == hash(LAYOUTS[layout.name])


@EACH_LAYOUT
@pytest.mark.parametrize("ndim", [4, 3], ids=["vectors", "scales"])
def test_what_is_indexed_is_what_lies_at_the_place(layout, ndim):
    pool, words = numbered(layout, ndim)
    page, offset = np.array([6, 0, 3, 3]), np.array([0, 3, 1, 2])
    assert np.array_equal(layout.to_tokens(pool[layout.index(page, offset)]), words[page, offset])
    vectors = words[page, offset] + 1000
    assert np.array_equal(layout.to_tokens(layout.from_tokens(vectors)), vectors)
    pool[layout.index(page, offset)] = layout.from_tokens(vectors)
    words[page, offset] += 1000
    assert np.array_equal(plain(layout, pool), words)


@EACH_LAYOUT
@pytest.mark.parametrize("ndim", [4, 3], ids=["vectors", "scales"])
def test_whole_pages_are_read_and_written_and_single_tokens_written(layout, ndim):
    pool, words = numbered(layout, ndim)
    for page in range(PAGES):
        assert np.array_equal(layout.read_page(pool, page), words[page])
    written = plain(layout, layout.write_page(jax.numpy.asarray(pool), 5, words[2]))
    assert np.array_equal(written[5], words[2])
    assert np.array_equal(np.delete(written, 5, axis=0), np.delete(words, 5, axis=0))
    written = plain(layout, layout.write_token(jax.numpy.asarray(pool), 5, 1, words[2, 3]))
    words[5, 1] = words[2, 3]
    assert np.array_equal(written, words)


@EACH_LAYOUT
def test_single_words_are_read_head_by_head(layout):
    pool, words = numbered(layout)
    random = np.random.default_rng(0)
    page, offset, lane = (random.integers(0, size, (HEADS, 2, 9)) for size in (PAGES, PAGE, DIM))
    found = layout.read_words(jax.numpy.asarray(pool), page[0], offset, lane)
    heads = np.arange(HEADS)[:, None, None]
    assert np.array_equal(found, words[page[0], offset, heads, lane])


def jitted(part, page_size_at):
    options = data_movement_options("cpu", ml_dtypes.bfloat16)
    return jax.jit(part.jax, static_argnums=(0, page_size_at), compiler_options=options)


JITTED = jitted(writes.PREFILL, 6), jitted(writes.DECODES, 5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, TABLE * PAGE - 1),
    length=st.integers(0, TABLE * PAGE),
    live=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_the_same_plan_leaves_the_same_words_at_every_place_of_both_layouts(seed, start, length, live):
    random = np.random.default_rng(seed)
    dtype = np.dtype(ml_dtypes.bfloat16)
    before = random.integers(1, 60000, (PAGES, PAGE, HEADS, DIM)).astype(np.uint16)
    chunk = random.integers(1, 60000, (ROWS, HEADS, DIM)).astype(np.uint16)
    pages = random.permutation(np.arange(1, PAGES)).astype(np.int32)
    table, tables = pages[:TABLE], np.stack([pages[TABLE:], pages[TABLE:][::-1], pages[[0, 0]]])
    positions = np.where(live, random.integers(0, PAGE, 3), -1).astype(np.int32)
    rows = np.arange(start, start + ROWS, dtype=np.int32)

    expected = before.copy()
    for row, position in enumerate(rows.tolist()):
        if position < length:
            expected[table[position // PAGE], position % PAGE] = chunk[row]
    for slot, position in enumerate(positions.tolist()):
        if position >= 0:
            expected[tables[slot, 0], position] = chunk[slot]

    for layout, on_device in itertools.product(LAYOUTS.values(), (False, True)):
        axes = [PLAIN_AXES.index(axis) for axis in layout.axes]
        pools = [np.ascontiguousarray(before.transpose(axes)).view(dtype)] * 2
        prefill, decodes = JITTED if on_device else (writes.PREFILL.numpy, writes.DECODES.numpy)
        tokens = [chunk.view(dtype)] * 2
        pools = prefill(layout, pools, tokens, rows, np.int32(length), table, PAGE)
        pools = decodes(layout, pools, [part[:3] for part in tokens], positions, tables, PAGE)
        for pool in pools:
            assert np.array_equal(plain(layout, pool).view(np.uint16), expected), (layout.name, on_device)
