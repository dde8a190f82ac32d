"""Cost models against sums done token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_attention.plan import StepPlan
from sim.cost_model import ACCELERATORS, DECODERS, Accelerator, Decoder, Roofline, cost_model
from tests.sim.scenario_parts import small

TINY = Decoder(layers=4, hidden=8, heads=4, kv_heads=2, head_dim=3, mlp=5, vocabulary=11, window=6)


def plan_of(*rows: tuple[int, int, int]) -> StepPlan:
    """A plan with rows (start, count, samples)."""
    start, count, samples = (
        (np.array(column, np.int32) for column in zip(*rows, strict=True)) if rows else [np.zeros(0, np.int32)] * 3
    )
    ids = np.arange(len(rows), dtype=np.int32)
    tokens = np.ones(int(count.sum()), np.int32)
    table = np.zeros((len(rows), 0), np.int32)
    return StepPlan(0, ids, ids, ids, start, count, samples, tokens, np.zeros_like(ids), table, ())


rows = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(0, 1)), min_size=1, max_size=5)


def duration(cost: dict[str, object], *plan_rows: tuple[int, int, int]) -> int:
    return cost_model(small(cost=cost).cost).duration_ns(plan_of(*plan_rows))


def test_fixed_and_linear_are_what_they_say() -> None:
    assert duration({"kind": "fixed", "step_ns": 70}, (0, 5, 0)) == 70
    assert duration({"kind": "linear", "base_ns": 100, "per_token_ns": 7}, (0, 5, 0), (9, 1, 1)) == 142


def test_no_step_takes_no_time() -> None:
    assert duration({"kind": "linear", "base_ns": 0, "per_token_ns": 0}, (0, 5, 0)) == 1


def flops_by_token(model: Decoder, plan: StepPlan) -> int:
    """Two FLOP per multiplication, counted layer by layer, token by token."""
    total = 0
    for layer in range(model.layers):
        for start, count in zip(plan.start.tolist(), plan.count.tolist(), strict=True):
            for position in range(start, start + count):
                seen = position + 1 if layer % 2 else min(position + 1, model.window)
                projections = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
                scores_and_sums = 2 * seen * model.heads * model.head_dim
                total += 2 * (projections + 3 * model.hidden * model.mlp + scores_and_sums)
    return total + 2 * int(plan.samples.sum()) * model.hidden * model.vocabulary


def words_by_row(model: Decoder, plan: StepPlan) -> int:
    """Weights once; for each layer and row the K/V that any of its tokens sees, and the K/V it writes."""
    words = model.layers * model.layer_weights + model.hidden * model.vocabulary
    for layer in range(model.layers):
        for start, count in zip(plan.start.tolist(), plan.count.tolist(), strict=True):
            seen = {
                at
                for position in range(start, start + count)
                for at in range(0 if layer % 2 else max(0, position + 1 - model.window), position + 1)
            }
            words += 2 * model.kv_heads * model.head_dim * (len(seen) + count)
    return words


@given(rows)
@settings(max_examples=80, deadline=None)
def test_roofline_counts_what_a_count_by_hand_gives(plan_rows: list[tuple[int, int, int]]) -> None:
    model, plan = Roofline(TINY, ACCELERATORS["h100"], 1, 0), plan_of(*plan_rows)
    assert model.flops(plan) == flops_by_token(TINY, plan)
    assert model.bytes_moved(plan) == 2 * words_by_row(TINY, plan)


@given(rows, st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_roofline_takes_the_larger_of_both_times_over_all_devices(
    plan_rows: list[tuple[int, int, int]], devices: int, overhead: int
) -> None:
    plan = plan_of(*plan_rows)
    model = Roofline(TINY, Accelerator(flops=1e6, bytes_per_second=3e5), devices, overhead)
    seconds = max(flops_by_token(TINY, plan) / 1e6, 2 * words_by_row(TINY, plan) / 3e5) / devices
    assert model.duration_ns(plan) == pytest.approx(overhead + seconds * 1e9, abs=1)


@pytest.mark.parametrize(
    ("name", "billions"),
    # Published totals: 8.03, 70.6 and 9.24 billion, less the input embedding where it is not the output head.
    [("llama-3-8b", 8.03 - 0.525), ("llama-3-70b", 70.55 - 1.05), ("gemma-2-9b", 9.24)],
)
def test_presets_have_as_many_weights_as_the_published_models(name: str, billions: float) -> None:
    model = DECODERS[name]
    assert (model.layers * model.layer_weights + model.head_weights) / 1e9 == pytest.approx(billions, rel=0.002)


def test_decoding_is_bound_by_memory_and_a_long_prefill_by_compute() -> None:
    roofline = {"kind": "roofline", "model": "llama-3-8b", "device": "tpu-v5e"}
    # 15.0 GB of weights at 819 GB/s; 15.0 GFLOP per token at 197 TFLOP/s, and some attention.
    assert duration(roofline, (10, 1, 1)) == pytest.approx(15.01e9 / 819e9 * 1e9, rel=0.01)
    assert duration(roofline, (0, 2048, 1)) == pytest.approx(2048 * 14e9 / 197e12 * 1e9, rel=0.05)


def test_every_preset_pair_can_be_asked_for() -> None:
    for model in DECODERS:
        for device in ACCELERATORS:
            assert duration({"kind": "roofline", "model": model, "device": device}, (0, 16, 0)) > 10**5
