"""Workloads: arrivals, lengths, clipping, faults and prompts drawn from named streams."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.scenario import Scenario
from sim.scenario.models import CancelFault
from sim.streams import stream
from sim.workload import Arrival, concrete_faults, generate, prompt_tokens
from sim.workload.times import CHUNK
from tests.sim.scenario_parts import small

MANY = 20_000


def drawn(**keys: object) -> list[Arrival]:
    return list(generate(small(**keys)))


def with_arrivals(kind: dict[str, object], count: int | None = MANY) -> Scenario:
    return small(workload__arrivals=kind, workload__num_requests=count)


def gaps_seconds(scenario: Scenario) -> np.ndarray:
    times = np.array([arrival.time_ns for arrival in generate(scenario)])
    return np.diff(times) / 1e9


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "constant", "request_rate": 3.0},
        {"kind": "poisson", "request_rate": 3.0},
        {"kind": "gamma", "request_rate": 3.0, "burstiness": 0.3},
        {"kind": "stages", "stages": [{"request_rate": 3.0, "duration_seconds": 1e6}]},
    ],
    ids=lambda kind: kind["kind"],
)
def test_arrivals_come_in_order_as_integers_at_the_asked_rate(kind: dict[str, object]) -> None:
    arrivals = list(generate(with_arrivals(kind)))
    assert [arrival.request for arrival in arrivals] == list(range(MANY))
    assert all(type(arrival.time_ns) is int for arrival in arrivals)
    assert all(a.time_ns <= b.time_ns for a, b in pairwise(arrivals))
    # Four standard errors of the mean gap; the widest here is gamma's, with a variation of 1 / sqrt(0.3).
    assert arrivals[-1].time_ns / 1e9 == pytest.approx(MANY / 3, rel=4 / math.sqrt(0.3 * MANY))


def test_constant_arrivals_are_exact() -> None:
    times = [arrival.time_ns for arrival in generate(with_arrivals({"kind": "constant", "request_rate": 0.3}, 7))]
    assert times == [i * 10**10 // 3 for i in range(7)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_vary_as_burstiness_says(burstiness: float) -> None:
    gaps = gaps_seconds(with_arrivals({"kind": "gamma", "request_rate": 10.0, "burstiness": burstiness}))
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_gamma_of_shape_one_is_poisson() -> None:
    gamma = with_arrivals({"kind": "gamma", "request_rate": 10.0, "burstiness": 1.0}, 100)
    poisson = with_arrivals({"kind": "poisson", "request_rate": 10.0}, 100)
    assert list(generate(gamma)) == list(generate(poisson))


def test_stages_have_their_rates_pauses_and_an_end() -> None:
    stages = [(200.0, 10.0), (0.0, 5.0), (50.0, 20.0)]
    kind = {"kind": "stages", "stages": [{"request_rate": r, "duration_seconds": s} for r, s in stages]}
    workload = generate(with_arrivals(kind, None))
    assert workload.total is None
    seconds = np.array([arrival.time_ns for arrival in workload]) / 1e9
    counts = np.histogram(seconds, [0, 10, 15, 35])[0]
    assert counts.sum() == len(seconds)
    assert counts[1] == 0
    # Five standard deviations of Poisson counts of 2,000 and 1,000.
    assert abs(counts[0] - 2000) < 5 * math.sqrt(2000)
    assert abs(counts[2] - 1000) < 5 * math.sqrt(1000)


def test_a_closed_loop_has_a_concurrency_and_no_times() -> None:
    workload = generate(with_arrivals({"kind": "concurrent", "concurrency": 8}, 20))
    assert (workload.concurrency, workload.total) == (8, 20)
    assert [arrival.time_ns for arrival in workload] == [0] * 20


def test_lognormal_lengths_have_the_asked_mean_and_stay_within_bounds() -> None:
    spec = {"kind": "lognormal", "mean": 512.0, "sigma": 0.6}
    free = [a.prompt_tokens for a in generate(small(workload__prompt_tokens=spec, workload__num_requests=MANY))]
    assert np.mean(free) == pytest.approx(512, rel=0.02)
    assert np.std(np.log(free)) == pytest.approx(0.6, rel=0.03)
    bound = [
        a.prompt_tokens
        for a in drawn(
            cache__max_sequence_length=999,
            cache__num_pages=999,
            workload__prompt_tokens={**spec, "min": 400, "max": 600},
        )
    ]
    assert (min(bound), max(bound)) == (400, 600)


def test_uniform_lengths_reach_both_ends() -> None:
    lengths = {arrival.prompt_tokens for arrival in drawn(workload__num_requests=2000)}
    assert lengths == set(range(1, 21))


def test_zipf_lengths_fall_as_the_power_law_says() -> None:
    spec = {"kind": "zipf", "exponent": 1.5, "min": 3, "max": 40}
    lengths = [a.prompt_tokens for a in drawn(workload__prompt_tokens=spec, workload__num_requests=MANY)]
    counts = np.bincount(lengths, minlength=41)
    assert counts[:3].sum() == 0
    assert counts.sum() == counts[3:41].sum()
    assert counts[3] / counts[4] == pytest.approx(2**1.5, rel=0.1)


def test_empirical_prompt_and_output_come_from_the_same_row(tmp_path: Path) -> None:
    rows = [(10, 1), (20, 2), (30, 3), (0, 9)]
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n" + "".join(f"{p},{o}\n" for p, o in rows))
    spec = {"kind": "empirical", "format": "vidur", "path": str(path)}
    pairs = {
        (arrival.prompt_tokens, arrival.output_tokens)
        for arrival in drawn(workload__prompt_tokens=spec, workload__output_tokens=spec, workload__num_requests=200)
    }
    assert pairs == {(10, 1), (20, 2), (30, 3)}
    bound = drawn(workload__prompt_tokens={**spec, "min": 15, "max": 25}, workload__num_requests=200)
    assert {arrival.prompt_tokens for arrival in bound} == {15, 20, 25}


@given(st.integers(0, 2**63 - 1), st.integers(1, 300))
@settings(max_examples=20, deadline=None)
def test_fewer_requests_are_the_first_of_more(seed: int, count: int) -> None:
    few = drawn(seed=seed, workload__num_requests=count)
    assert few == list(islice(generate(small(seed=seed, workload__num_requests=400)), count))


def test_a_chunk_of_draws_joins_the_next_without_a_seam() -> None:
    times = [arrival.time_ns for arrival in drawn(workload__num_requests=CHUNK + 2)]
    assert all(a < b for a, b in pairwise(times[CHUNK - 2 :]))


def test_changing_one_concern_leaves_the_draws_of_the_others_alone() -> None:
    base = drawn()
    slower = drawn(workload__arrivals={"kind": "gamma", "request_rate": 1.0, "burstiness": 0.5})
    longer = drawn(workload__prompt_tokens={"kind": "uniform", "min": 20, "max": 40})
    assert [a[2:] for a in slower] == [a[2:] for a in base]
    assert [a.time_ns for a in slower] != [a.time_ns for a in base]
    assert [(a.time_ns, a.output_tokens) for a in longer] == [(a.time_ns, a.output_tokens) for a in base]


def test_streams_differ_by_name_and_by_seed() -> None:
    draws = {tuple(stream(seed, name).integers(0, 2**60, 3)) for seed in (0, 1, 2**62) for name in ("a", "b")}
    assert len(draws) == 6


def test_streams_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = "from sim.streams import stream; print(stream(7, 'arrivals').integers(0, 2**60))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{stream(7, 'arrivals').integers(0, 2**60)}\n".encode()}


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 70), st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_clipping_keeps_what_fits_and_cuts_the_rest_to_what_fits(
    prompt: int, output: int, longest: int, num_pages: int
) -> None:
    scenario = small(
        cache__max_sequence_length=longest,
        cache__num_pages=num_pages,
        workload__prompt_tokens={"kind": "fixed", "value": prompt},
        workload__output_tokens={"kind": "fixed", "value": output},
        workload__too_long="clip",
        workload__num_requests=1,
    )
    (arrival,) = generate(scenario)
    room = min(longest, 4 * (num_pages - 1))
    need = arrival.prompt_tokens + arrival.output_tokens - 1
    assert 1 <= arrival.prompt_tokens <= prompt
    assert 1 <= arrival.output_tokens <= output
    assert need <= room
    fits = prompt + output - 1 <= room
    assert fits == (arrival.note == "")
    assert fits or need == room
    assert fits or arrival.note == (
        f"clipped from {prompt} + {output} to {arrival.prompt_tokens} + {arrival.output_tokens} tokens"
    )


def test_rejected_lengths_pass_unchanged_for_the_core_to_refuse() -> None:
    long = {"kind": "fixed", "value": 65}
    arrivals = drawn(workload__prompt_tokens=long, expect={"rejected": 50})
    assert {arrival.prompt_tokens for arrival in arrivals} == {65}


def test_prompts_are_pure_never_eos_and_grow_at_the_end() -> None:
    tokens = prompt_tokens(2**62 + 5, 3, 1000, 50)
    assert tokens.dtype == np.int32
    assert set(tokens.tolist()) == set(range(1, 50))
    assert np.array_equal(prompt_tokens(2**62 + 5, 3, 400, 50), tokens[:400])
    others = [prompt_tokens(2**62 + 5, 4, 1000, 50), prompt_tokens(5, 3, 1000, 50), prompt_tokens(6, 3, 1000, 50)]
    assert all(np.mean(other == tokens) < 0.1 for other in others)


def test_a_storm_cancels_its_share_within_its_delay_after_arrival() -> None:
    storm = {"kind": "cancel_storm", "fraction": 0.3, "max_delay_seconds": 2.0}
    plain = {"kind": "fail", "at_step": 3}
    scenario = small(faults=[plain, storm], workload__num_requests=5000)
    first, *cancels = concrete_faults(scenario)
    assert first == scenario.faults[0]
    arrived = {arrival.request: arrival.time_ns for arrival in generate(scenario)}
    delays = [cancel.at_ns - arrived[cancel.request] for cancel in cancels if isinstance(cancel, CancelFault)]
    # Five standard deviations of a binomial count.
    assert abs(len(delays) - 1500) < 5 * math.sqrt(5000 * 0.3 * 0.7)
    assert 0 <= min(delays) < 10**8
    assert 19 * 10**8 < max(delays) <= 2 * 10**9


def test_a_larger_storm_cancels_the_same_requests_at_the_same_times_and_more() -> None:
    def cancels(fraction: float) -> set[tuple[int, int | None]]:
        storm = {"kind": "cancel_storm", "fraction": fraction, "max_delay_seconds": 2.0}
        return {(fault.request, fault.at_ns) for fault in concrete_faults(small(faults=[storm]))}

    assert cancels(0.2) < cancels(0.6)
    assert len(cancels(1.0)) == 50
