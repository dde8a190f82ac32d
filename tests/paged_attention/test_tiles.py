"""What a TPU does with scales, run on the CPU: pieces in whole lines of lanes, and whole writes through them."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_attention import tiles, writes
from paged_attention.layout import LAYOUTS

HEADS, ROWS, SLOTS, TABLE = 2, 40, 5, 12
# Fewer pages than lanes, whole lines of them, and a last line that overlaps; a page that fills lines itself.
SIZES = [(16, 37), (16, 256), (24, 300), (128, 6)]
EACH_SIZE = pytest.mark.parametrize(("page_size", "num_pages"), SIZES)
EACH_LAYOUT = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))


def as_tpu(*args, tpu=None, default, **others):
    return (tpu or default)(*args)


@pytest.fixture
def on_tpu(monkeypatch):
    """Code that depends on the platform takes the TPU's way."""
    monkeypatch.setattr(jax.lax, "platform_dependent", as_tpu)


def bits(random, shape):
    """Floats of any bits, NaNs and zeros of both signs among them."""
    return random.choice(np.array([0, 1 << 31, 0x7FA00001, 0x3F800000, 0x40490FDB], np.uint32), shape).view(np.float32)


@EACH_LAYOUT
@EACH_SIZE
def test_a_page_or_a_place_of_scales_is_replaced_bit_for_bit_and_nothing_beside_it(
    layout, page_size, num_pages, on_tpu
):
    @jax.jit
    def program(pool, page, offset, rows):
        paged = layout.write_page(pool, page, rows)
        return paged, layout.write_token(paged, page, offset, rows[0]), layout.read_page(paged, page)

    random = np.random.default_rng(0)
    before = bits(random, layout.shape(HEADS, num_pages, page_size, 1)[:3])
    for page in (0, 1, num_pages // 2, num_pages - 2, num_pages - 1):
        rows, offset = bits(random, (page_size, HEADS)), int(random.integers(page_size))
        paged, placed, read = (np.asarray(array).view(np.uint32) for array in program(before, page, offset, rows))
        expected = before.view(np.uint32).copy()
        for at in range(page_size):
            expected[layout.index(page, at)] = rows[at].view(np.uint32)
        assert np.array_equal(paged, expected)
        expected[layout.index(page, offset)] = rows[0].view(np.uint32)
        assert np.array_equal(placed, expected)
        assert np.array_equal(read, rows.view(np.uint32))


@pytest.mark.parametrize("page_size", [16, 48, 64])
@EACH_LAYOUT
def test_no_piece_of_scales_is_narrower_than_the_lanes(layout, page_size, on_tpu):
    pool = jax.ShapeDtypeStruct(layout.shape(HEADS, 300, page_size, 1)[:3], np.float32)
    rows = jax.ShapeDtypeStruct((page_size, HEADS), np.float32)
    programs = [
        jax.make_jaxpr(layout.read_page)(pool, 3),
        jax.make_jaxpr(layout.write_page)(pool, 3, rows),
        jax.make_jaxpr(lambda pool, rows: layout.write_token(pool, 3, 5, rows[0]))(pool, rows),
    ]
    axis = layout.axes.index("pages")
    for program in programs:
        for step in program.eqns:
            if (
                step.primitive.name in {"dynamic_slice", "dynamic_update_slice"}
                and step.invars[0].aval.shape == pool.shape
            ):
                piece = step.outvars[0] if step.primitive.name == "dynamic_slice" else step.invars[1]
                assert piece.aval.shape[axis] == tiles.LANES
                break
        else:
            pytest.fail(f"no access to the pool in {program}")


def written_by_tpu(part, layout, page_size, pools, tokens, where):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", as_tpu)
        return part.jax(layout, pools, tokens, *where, page_size)


CASES = {
    (layout.name, part): jax.jit(
        lambda pools, tokens, *where, layout=layout, part=part: written_by_tpu(part, layout, 16, pools, tokens, where)
    )
    for layout in LAYOUTS.values()
    for part in (writes.PREFILL, writes.DECODES)
}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, TABLE * 16 - 1),
    length=st.integers(0, TABLE * 16),
    live=st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS),
)
def test_a_tpus_way_of_writing_quantised_pages_leaves_the_bits_that_the_plain_loops_leave(seed, start, length, live):
    random = np.random.default_rng(seed)
    num_pages, page_size, dim = 200, 16, 4
    ids = random.permutation(np.arange(1, num_pages)).astype(np.int32)
    table, tables = ids[:TABLE], ids[TABLE : TABLE + SLOTS, None]
    rows = np.arange(start, start + ROWS, dtype=np.int32)
    position = np.where(live, random.integers(0, page_size, SLOTS), -1).astype(np.int32)
    # Rows past the table have no place in it: the plain loop would raise.
    length = np.int32(min(length, TABLE * page_size))
    for layout in LAYOUTS.values():
        shape = layout.shape(HEADS, num_pages, page_size, dim)
        pools = [
            random.integers(-128, 128, shape).astype(np.int8),
            random.random(shape[:3]).astype(np.float32),
            random.random(shape[:3]).astype(ml_dtypes.bfloat16),
        ]
        for part, count, where in (
            (writes.DECODES, SLOTS, (position, tables)),
            (writes.PREFILL, ROWS, (rows, length, table)),
        ):
            tokens = [
                random.integers(-128, 128, (count, HEADS, dim)).astype(np.int8),
                random.random((count, HEADS)).astype(np.float32),
                random.random((count, HEADS)).astype(ml_dtypes.bfloat16),
            ]
            expected = part.numpy(layout, pools, tokens, *where, page_size)
            found = CASES[layout.name, part](pools, tokens, *where)
            for one, other in zip(found, expected, strict=True):
                assert np.array_equal(np.asarray(one), other), (layout.name, part)
            pools = expected
