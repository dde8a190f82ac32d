"""The decoder is a real one, its arithmetic stays exact, and its sampler draws from the distribution that it says."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.jax_tiny import _isqrt
from invariants.reference_decoder import ReferenceDecoder, draw
from paged_attention import decoder_spec as definition
from paged_attention.plan import Request
from paged_attention.sampling import SamplingParams, sample
from tests.decoder.harness import SPEC

DECODER = ReferenceDecoder(SPEC)
tokens = st.lists(st.integers(1, 63), min_size=4, max_size=30).map(lambda ids: np.array(ids, np.int64))


def fed(ids, start=0, decoder=DECODER):
    """Logits behind the last token, and the cache."""
    spec = decoder.spec
    cache = np.zeros((spec.max_positions, spec.layers, 2, spec.kv_heads, spec.head_dim), np.int64)
    return decoder.forward(ids, start, cache), cache[start : start + len(ids)]


@settings(max_examples=30, deadline=None)
@given(tokens, st.data())
def test_every_earlier_token_changes_the_logits(ids, data):
    at = data.draw(st.integers(0, len(ids) - 2))
    other = ids.copy()
    other[at] = ids[at] % 63 + 1
    before, after = fed(ids), fed(other)
    assert not np.array_equal(before[0], after[0])
    # And none of an earlier position's K and V.
    assert np.array_equal(before[1][:at], after[1][:at])
    assert not np.array_equal(before[1][at + 1 :, 1], after[1][at + 1 :, 1])


@settings(max_examples=20, deadline=None)
@given(tokens, st.integers(1, 20))
def test_a_shift_turns_keys_and_leaves_the_first_layers_values(ids, shift):
    here, there = fed(ids)[1], fed(ids, shift)[1]
    assert np.array_equal(here[:, 0, 1], there[:, 0, 1])
    assert (here[:, 0, 0] != there[:, 0, 0]).any(axis=(1, 2)).mean() > 0.9


@settings(max_examples=20, deadline=None)
@given(tokens, st.integers(1, 29))
def test_a_prompt_in_pieces_gives_what_it_gives_whole(ids, cut):
    cut = min(cut, len(ids) - 1)
    cache = np.zeros((64, SPEC.layers, 2, SPEC.kv_heads, SPEC.head_dim), np.int64)
    DECODER.forward(ids[:cut], 0, cache)
    logits = DECODER.forward(ids[cut:], cut, cache)
    whole, written = fed(ids)
    assert np.array_equal(logits, whole)
    assert np.array_equal(cache[: len(ids)], written)


def test_query_heads_of_a_group_share_their_keys():
    """With the K and V of one kv_head gone, exactly the logits' share of its group is."""
    weights = DECODER._weights.layers[0]
    n = np.arange(-16, 16)[None] * 4
    cache = np.zeros((1, 2, SPEC.kv_heads, SPEC.head_dim), np.int64)
    mixed = DECODER._attention(weights, n, np.array([0]), cache)[0].reshape(SPEC.query_heads, -1)
    # One token attends to itself alone: each query head yields 16 times the value of its group.
    for head in range(SPEC.query_heads):
        assert np.array_equal(mixed[head], 16 * cache[0, 1, head // 2])


def test_other_weights_are_another_decoder():
    other = ReferenceDecoder(definition.DecoderSpec(2, 4, 2, 8, 64, 64, seed=1))
    ids = np.arange(1, 9)
    assert not np.array_equal(fed(ids)[0], fed(ids, decoder=other)[0])


def test_every_sum_fits_into_32_bits_and_every_logit_into_24():
    """The worst case of each step of the definition, at the largest sizes that are allowed."""
    gain, weight = 80, 7
    # The root is rounded down twice: a mean just below a square plus one is the worst.
    mean = np.arange(1, definition.RESIDUAL_LIMIT**2 + 1, 997, dtype=np.float64)
    mean = np.concatenate([np.arange(0, 100_000, dtype=np.float64), mean])
    largest_x = np.minimum(np.sqrt((mean + 1) * definition.HIDDEN), definition.RESIDUAL_LIMIT)
    normed = (64 * largest_x / np.maximum(np.floor(np.sqrt(mean)), 1)).max() * gain / 64
    projected = normed * weight * definition.HIDDEN
    attention = 16 * int(definition.WEIGHT.max()) * definition.KV_LIMIT * definition.MAX_POSITIONS
    up = projected / 32
    down = int(definition.SILU.max()) * up / 16 * weight * definition.GATED
    squares = definition.RESIDUAL_LIMIT**2 * definition.HIDDEN
    assert max(attention, 64 * definition.RESIDUAL_LIMIT, down, squares, int(definition.SILU.max()) * up) < 2**31
    assert max(projected, -definition.NO_EOS_LOGIT) < 2**24
    assert definition.RESIDUAL_LIMIT**2 < 2**24


def test_the_tables_are_the_functions_that_they_stand_for():
    cos, sin = DECODER._weights.cos / 128, DECODER._weights.sin / 128
    assert np.abs(cos**2 + sin**2 - 1).max() < 0.02
    x = np.arange(-128, 128) / 16
    assert np.abs(definition.SILU / 16 - x / (1 + np.exp(-x))).max() <= 0.5 / 16
    assert definition.WEIGHT[0] == 255
    assert definition.WEIGHT[-1] == 0


def test_the_devices_square_root_is_whole_and_exact():
    roots = np.arange(1, 4096)
    squares = np.unique(np.concatenate([[0], roots**2 - 1, roots**2, roots**2 + 1, [2**24 - 1]])).astype(np.int32)
    squares = squares[squares < 2**24]
    found = np.asarray(jax.jit(_isqrt)(squares))
    assert np.array_equal(found, np.floor(np.sqrt(squares.astype(np.float64))).astype(np.int32))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"head_dim": 7}, "must be even, found 7"),
        ({"query_heads": 3}, "3 query heads cannot share 2 kv_heads"),
        ({"vocab_size": 5000}, "at most 1024 tokens: found vocab_size 5000"),
        ({"max_positions": 5000}, "up to 4096 positions: found 5000"),
    ],
)
def test_a_decoder_that_would_not_be_exact_is_refused(changes, what):
    sizes = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 8, "vocab_size": 64, "max_positions": 64}
    with pytest.raises(ValueError, match=what):
        definition.DecoderSpec(**(sizes | changes))


# ---- sampling

logit_rows = st.lists(st.integers(-4000, 4000), min_size=2, max_size=80).map(
    lambda whole: (np.array(whole) * definition.LOGIT_SCALE).astype(np.float32)
)


def drawn(logits, temperature, top_p, seed, position, draw_rows=sample):
    params = SamplingParams(
        top_p=np.array([top_p], np.float32),
        temperature=np.array([temperature], np.float32),
        seed=np.array([seed], np.uint32),
    )
    return int(draw_rows(logits[None], params, np.array([position], np.int32))[0])


@settings(max_examples=100, deadline=None)
@given(
    logit_rows,
    st.one_of(st.just(0.0), st.floats(2**-30, 100, width=32)),
    st.floats(0, 1, width=32),
    st.integers(0, 2**32 - 1),
    st.integers(0, 4096),
)
def test_the_sampler_draws_the_very_token_that_the_oracle_draws(logits, temperature, top_p, seed, position):
    expected = draw(logits, temperature, top_p, seed, position)
    assert drawn(logits, temperature, top_p, seed, position) == expected


def test_jax_numpy_and_the_oracle_draw_alike_thousands_of_times():
    rng = np.random.default_rng(4)
    rows = 4000
    logits = (rng.integers(-3000, 3000, (rows, 64)) * definition.LOGIT_SCALE).astype(np.float32)
    params = SamplingParams(
        top_p=rng.choice([1.0, 0.9, 0.5], rows).astype(np.float32),
        max_tokens=np.ones(rows, np.int32),
        temperature=rng.choice([0.3, 0.7, 1.0, 2.0], rows).astype(np.float32),
        seed=rng.integers(0, 2**32, rows, np.uint32),
    )
    positions = rng.integers(0, 4096, rows, np.int32)

    def on_device(logits, positions, *fields):
        return sample(logits, SamplingParams(*fields), positions)

    fields = (params.top_p, params.max_tokens, params.temperature, params.seed)
    found = np.asarray(jax.jit(on_device)(logits, positions, *fields))
    np.testing.assert_array_equal(found, sample(logits, params, positions))
    expected = [
        draw(logits[row], float(params.temperature[row]), float(params.top_p[row]), int(params.seed[row]), position)
        for row, position in enumerate(positions.tolist()[:1000])
    ]
    assert found[:1000].tolist() == expected


def test_a_request_by_itself_is_the_same_twice_and_another_seed_is_not():
    prompt = np.arange(1, 12, dtype=np.int32)
    runs = [DECODER.run(Request(0, prompt, 20, temperature=1.0, seed=seed), 20) for seed in (1, 1, 2)]
    assert runs[0].tokens == runs[1].tokens != runs[2].tokens
    assert runs[0].digests == runs[1].digests
