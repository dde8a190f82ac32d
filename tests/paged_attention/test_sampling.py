import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_attention import SamplingParams
from paged_attention.sampling import sample, uniform

VOCAB = 40


def params(top_p, temperature, seed) -> SamplingParams:
    rows = len(seed)
    return SamplingParams(
        np.broadcast_to(np.float32(top_p), rows),
        np.ones(rows, np.int32),
        np.broadcast_to(np.float32(temperature), rows),
        np.asarray(seed, np.uint32),
    )


def distribution(logits: np.ndarray, top_p: float, temperature: float) -> np.ndarray:
    """What a token may be, in float64, token by token: the oracle."""
    if temperature == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    weight = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    probability = weight / weight.sum()
    kept, total = np.zeros_like(probability), 0.0
    for token in sorted(range(len(logits)), key=lambda t: (-probability[t], t)):
        if total >= max(top_p, 1e-9):
            break
        kept[token] = probability[token]
        total += probability[token]
    return kept / kept.sum()


def histogram(logits: np.ndarray, top_p: float, temperature: float, draws: int = 8_000) -> np.ndarray:
    rows = np.broadcast_to(logits, (draws, len(logits)))
    drawn = sample(rows, params(top_p, temperature, np.arange(draws)), np.full(draws, 3, np.int32))
    return np.bincount(drawn, minlength=len(logits)) / draws


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.0), (0.7, 1.0), (0.9, 0.5), (1.0, 3.0), (0.0, 1.0)])
def test_draws_follow_the_distribution(top_p: float, temperature: float):
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 2
    wanted = distribution(logits, top_p, temperature)
    found = histogram(logits, top_p, temperature)
    assert not found[wanted == 0].any()
    # Five standard deviations of a frequency; draws are fixed by their seeds, so this never flickers.
    assert (np.abs(found - wanted) <= 5 * np.sqrt(wanted / 8_000) + 1e-9).all()


def test_seed_09_temperature_zero_is_greedy_whatever_top_p_and_seed_are():
    logits = np.random.default_rng(2).normal(size=(64, VOCAB)).astype(np.float32)
    drawn = sample(logits, params(0.3, 0.0, np.arange(64)), np.arange(64, dtype=np.int32))
    np.testing.assert_array_equal(drawn, logits.argmax(axis=1))


def test_seed_09_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    assert (histogram(logits, 0.6, 1.0) > 0).tolist() == [True, True, False]
    assert (histogram(logits, 0.4, 1.0) > 0).tolist() == [True, False, False]


def test_seed_09_sampling_is_over_the_whole_vocabulary():
    found = histogram(np.zeros(400, np.float32), 1.0, 1.0, draws=8_000)
    assert (found > 0).all()


def test_an_impossible_token_is_never_drawn():
    logits = np.array([0.0, -np.inf, 0.0, -np.inf], np.float32)
    assert (histogram(logits, 1.0, 1.0) > 0).tolist() == [True, False, True, False]


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(0, 100), st.integers(0, 7), st.data())
def test_seed_10_a_token_depends_on_its_own_row_only(seed: int, position: int, row: int, data: st.DataObject):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    logits = rng.normal(size=(8, VOCAB)).astype(np.float32)
    seeds = rng.integers(0, 2**32, 8, np.uint32)
    positions = rng.integers(0, 100, 8, np.int32)
    seeds[row], positions[row] = seed, position
    together = sample(logits, params(0.9, 1.5, seeds), positions)
    alone = sample(logits[row : row + 1], params(0.9, 1.5, seeds[row : row + 1]), positions[row : row + 1])
    assert together[row] == alone[0]


def test_seed_31_rows_of_one_step_draw_apart_unless_seed_and_position_agree():
    seeds = np.repeat(np.arange(50, dtype=np.uint32), 20)
    positions = np.tile(np.arange(20, dtype=np.int32), 50)
    drawn = uniform(seeds, positions)
    assert len(np.unique(drawn)) > 995
    np.testing.assert_array_equal(drawn, uniform(seeds.copy(), positions.copy()))
    assert drawn.min() >= 0
    assert drawn.max() < 1


def test_jax_and_numpy_draw_the_same_tokens():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(64, VOCAB)).astype(np.float32) * 3
    top_p, temperature = rng.uniform(0.1, 1, 64).astype(np.float32), rng.uniform(0, 2, 64).astype(np.float32)
    temperature[::4] = 0
    seeds, positions = rng.integers(0, 2**32, 64, np.uint32), rng.integers(0, 4096, 64, np.int32)
    rows = SamplingParams(top_p, np.ones(64, np.int32), temperature, seeds)

    def draw(logits, top_p, max_tokens, temperature, seed, positions):
        return sample(logits, SamplingParams(top_p, max_tokens, temperature, seed), positions)

    on_device = jax.jit(draw)(logits, top_p, rows.max_tokens, temperature, seeds, positions)
    np.testing.assert_array_equal(on_device, sample(logits, rows, positions))
