"""Calibrations: the fit against known truths, the file, and what a scenario makes of it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from paged_attention.plan import StepPlan
from sim.calibration.calibrate import MIN_STEPS, calibration_of, held_out
from sim.calibration.features import FEATURES, features
from sim.calibration.file import Calibration, calibration_text, load_calibration
from sim.calibration.fit import fit_times
from sim.calibration.measure import CalibrationError, Samples, measure
from sim.cost_model import Measured, cost_model
from sim.run import run
from sim.scenario import ScenarioError, dump_scenario, load_scenario
from tests.decoder.harness import LayerForgotten, planted
from tests.sim.run_parts import planned_only
from tests.sim.scenario_parts import small


def plan_of(rows: list[tuple[bool, int, int]]) -> StepPlan:
    """A plan with rows (prefills, start, count)."""
    ids = np.arange(len(rows), dtype=np.int32)
    prefills, start, count = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    slot = np.where(prefills, -1, ids).astype(np.int32)
    tokens, table = np.ones(int(count.sum()), np.int32), np.zeros((len(rows), 0), np.int32)
    return StepPlan(0, ids, ids, slot, start, count, ids, tokens, np.zeros_like(ids), table, ())


decode_rows = st.tuples(st.just(False), st.integers(0, 300), st.just(1))
prefill_rows = st.tuples(st.just(True), st.integers(0, 300), st.integers(1, 40))
plans = st.tuples(st.lists(prefill_rows, max_size=2), st.lists(decode_rows, max_size=6)).filter(any)


@given(plans)
@settings(max_examples=60)
def test_features_are_what_a_count_token_by_token_gives(rows: tuple[Any, Any]) -> None:
    prefills, decodes = rows
    kind, values = features(plan_of([*prefills, *decodes]))
    pairs = sum(position + 1 for _, start, count in prefills for position in range(start, start + count))
    read = sum(start + count for _, start, count in [*prefills, *decodes])
    assert kind == ("mixed" if prefills and decodes else "prefill" if prefills else "decode")
    assert values == (sum(count for *_, count in prefills), len(decodes), read, pairs)


@given(
    seed=st.integers(0, 2**32 - 1),
    truth=st.lists(st.sampled_from([0.0, 3.0, 50.0, 2000.0]), min_size=4, max_size=4),
    base=st.floats(1e3, 1e6),
    outliers=st.floats(0, 0.3),
)
@settings(max_examples=15)
def test_a_fit_gives_back_the_times_of_a_linear_truth_whatever_a_third_of_the_samples_says(
    seed: int, truth: list[float], base: float, outliers: float
) -> None:
    random = np.random.default_rng(seed)
    x = np.concatenate([np.ones((120, 1)), random.integers(0, 100, (120, 4)).astype(float)], axis=1)
    times = x @ np.array([base, *truth])
    seen = np.where(random.random(120) < outliers, times * random.uniform(2, 50, 120), times)
    found = fit_times(x, seen)
    assert (found >= 0).all()
    assert np.abs(x @ found / times - 1).max() < 0.01


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_no_coefficient_is_below_0_and_a_feature_that_explains_nothing_gets_none(seed: int) -> None:
    random = np.random.default_rng(seed)
    growing = random.integers(1, 100, 80).astype(float)
    x = np.stack([np.ones(80), growing, np.full(80, 16.0)], axis=1)
    # Times that fall with a feature: the best non-negative coefficient is 0.
    found = fit_times(x, 5000 - 40 * growing)
    assert found[1] == 0
    assert found[2] == 0
    assert 1000 < found[0] < 5000


KINDS = ("decode", "mixed", "prefill")


def samples(truth: dict[str, tuple[int, ...]], steps: int = 240, spread: float = 0.0) -> Samples:
    """Steps that take base + features x coefficients ns, each time off by up to `spread`."""
    random = np.random.default_rng(1)
    kinds = [KINDS[n % len(truth)] for n in range(steps)]
    values = random.integers(1, 200, (steps, len(FEATURES)))
    exact = np.array(
        [truth[kind][0] + row @ np.array(truth[kind][1:]) for kind, row in zip(kinds, values, strict=True)]
    )
    times = np.rint(exact * random.uniform(1 - spread, 1 + spread, (2, steps))).astype(np.int64)
    return Samples(kinds, values, times, {"name": "made up"})


TRUTH = {"decode": (40_000, 0, 700, 3, 0), "mixed": (90_000, 250, 700, 0, 2), "prefill": (60_000, 250, 0, 3, 0)}


@cache
def made(spread: float = 0.0) -> Calibration:
    return calibration_of(samples(TRUTH, spread=spread), small(), "2026-11-23")


def test_steps_held_out_follow_a_model_fitted_to_others_and_the_noise_is_that_of_the_two_runs() -> None:
    exact, noisy = made(), made(spread=0.1)
    assert exact.noise.median == 0
    assert exact.held_out.p90 < 0.002
    assert exact.held_out.steps == 60
    assert 0.03 < noisy.noise.median < 0.12
    # Half of a uniform spread of 10 % is 5 %.
    assert 0.03 < noisy.held_out.median < 0.07
    assert abs(noisy.held_out.total) < 0.03


def test_every_fourth_step_of_each_kind_is_held_out() -> None:
    kinds: Any = ["decode"] * 8 + ["mixed"] * 3 + ["decode"] * 4
    assert held_out(kinds).nonzero()[0].tolist() == [3, 7, 14]


def test_what_is_held_out_changes_no_coefficient() -> None:
    one = samples(TRUTH, spread=0.1)
    other = samples(TRUTH, spread=0.1)
    other.times_ns[:, held_out(other.kinds)] *= 7
    first, second = (calibration_of(s, small(), "2026-11-23") for s in (one, other))
    assert first.kinds == second.kinds
    assert second.held_out.median > 0.5


def test_a_file_loads_as_what_was_written_and_two_equal_ones_have_the_same_text(tmp_path: Path) -> None:
    calibration = made(spread=0.05)
    path = tmp_path / "c.yaml"
    path.write_text(calibration_text(calibration))
    assert load_calibration(path) == calibration
    again = calibration_of(samples(TRUTH, spread=0.05), small(), "2026-11-23")
    assert calibration_text(again) == path.read_text()


@given(plans)
@settings(max_examples=40)
def test_a_measured_step_takes_what_the_coefficients_say_in_whole_ns(rows: tuple[Any, Any]) -> None:
    calibration = made()
    kind, values = features(plan_of([*rows[0], *rows[1]]))
    fit = getattr(calibration.kinds, kind)
    per = [fit.per_prefill_token_ps, fit.per_decode_ps, fit.per_context_token_ps, fit.per_prefill_pair_ps]
    exact = (fit.base_ps + sum(a * b for a, b in zip(per, values, strict=True))) / 1000
    found = Measured(calibration).duration_ns(plan_of([*rows[0], *rows[1]]))
    assert isinstance(found, int)
    assert abs(found - exact) <= 0.5


def test_a_step_outside_the_measured_range_is_counted_and_one_of_another_kind_takes_the_slowest_model() -> None:
    calibration = made()
    model = Measured(calibration)
    inside, beyond = plan_of([(False, 100, 1)] * 1), plan_of([(False, 10_000, 1)])
    decode = calibration.kinds.decode
    assert decode is not None
    low = decode.prefill_tokens.min
    assert low > 0  # the made-up decodes have prefill tokens, real ones have none
    model.duration_ns(beyond)
    assert model.num_extrapolated == 1
    alone = Measured(calibration.model_copy(update={"kinds": calibration.kinds.model_copy(update={"decode": None})}))
    both = [Measured(only(calibration, kind)).duration_ns(inside) for kind in ("mixed", "prefill")]
    assert alone.duration_ns(inside) == max(both)
    assert alone.num_extrapolated == 1


def only(calibration: Calibration, kind: str) -> Calibration:
    kinds = {name: getattr(calibration.kinds, name) if name == kind else None for name in KINDS}
    return calibration.model_copy(update={"kinds": calibration.kinds.model_copy(update=kinds)})


def scenario_with(folder: Path, calibration: Calibration, **keys: Any) -> Path:
    (folder / "c.yaml").write_text(calibration_text(calibration))
    scenario = planned_only(cost={"kind": "measured", "file": str(folder / "c.yaml")}, **keys)
    dump_scenario(scenario, folder / "s.yaml")
    return folder / "s.yaml"


def test_a_scenario_names_the_file_from_its_own_folder_and_replays_bit_for_bit(tmp_path: Path) -> None:
    path = scenario_with(tmp_path, made(), workload__num_requests=6)
    assert YAML().load(path.read_text())["cost"]["file"] == "c.yaml"
    first, second = (run(load_scenario(path)) for _ in range(2))
    assert first.trace_hash == second.trace_hash
    summary = first.summary
    assert summary["cost"]["kind"] == "measured"
    # Made-up features go from 1 to 199 in every kind; no real step has all of them.
    assert summary["cost"]["extrapolated_steps"] == summary["steps"]


def test_the_console_warns_of_extrapolated_steps(tmp_path: Path, kvproof: Any) -> None:
    path = scenario_with(tmp_path, made(), workload__num_requests=2)
    status, out, _ = kvproof("run", path, "--no-plots", "--out", tmp_path / "run")
    assert status == 0
    assert "lie outside what the calibration measured" in out


def wrong(tmp_path: Path, change: Any) -> list[str]:
    data = YAML(typ="safe").load(calibration_text(made()))
    change(data)
    path = tmp_path / "c.yaml"
    YAML(typ="safe", pure=True).dump(data, path)
    with pytest.raises(ScenarioError) as caught:
        load_calibration(path)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.pop("device"), "device: the key is missing"),
        (lambda d: d["kinds"]["decode"].update(base_ps=-4), "kinds.decode.base_ps: expected at least 0, found -4"),
        (lambda d: d["kinds"]["decode"].update(bas_ps=4), "kinds.decode.bas_ps: unknown key (did you mean 'base_ps'?)"),
        (lambda d: d.update(schema="kvproof-calibration/v9"), "schema: unknown value 'kvproof-calibration/v9'"),
        (lambda d: d["kinds"]["mixed"]["decodes"].update(min=900), "kinds.mixed.decodes: min 900 is more than max"),
        (lambda d: d.update(kinds={}), "kinds: no kind of step has a model"),
        (lambda d: d.update(date="yesterday"), "date: expected text that matches"),
    ],
)
def test_a_wrong_file_is_told_by_line_column_and_key(tmp_path: Path, change: Any, problem: str) -> None:
    (line,) = wrong(tmp_path, change)
    place, rest = line.split(": ", 1)
    assert place.startswith(f"{tmp_path / 'c.yaml'}:")
    assert [part.isdecimal() for part in place.rsplit(":", 2)[1:]] == [True, True]
    assert rest.startswith(problem)


def test_a_scenario_whose_calibration_is_missing_or_none_says_so_before_it_runs(tmp_path: Path, kvproof: Any) -> None:
    path = scenario_with(tmp_path, made(), workload__num_requests=6)
    (tmp_path / "c.yaml").write_text("kinds: 3\n")
    status, _, err = kvproof("run", path, "--out", tmp_path / "run")
    assert status == 2
    assert f"{tmp_path / 'c.yaml'}:1:1: kinds: expected a mapping of keys, found 3" in err
    (tmp_path / "c.yaml").unlink()
    with pytest.raises(ScenarioError, match=r"s\.yaml:\d+:\d+: cost\.file: no such file"):
        load_scenario(path)


def test_what_cannot_be_calibrated_says_why(tmp_path: Path, kvproof: Any) -> None:
    with pytest.raises(CalibrationError, match="executes nothing"):
        measure(planned_only(), 10)
    few = samples(TRUTH, steps=MIN_STEPS - 1)
    with pytest.raises(CalibrationError, match=f"has only {MIN_STEPS - 1} steps"):
        calibration_of(few, small(), "2026-11-23")
    path = tmp_path / "s.yaml"
    dump_scenario(planned_only(), path)
    status, _, err = kvproof("calibrate", path, "--out", path)
    assert status == 2
    assert "exists already" in err
    with pytest.raises(CalibrationError, match="plants the bug 'leak-on-finish'"):
        measure(small(backend__kind="numpy", plant="leak-on-finish"), 100)


def test_steps_that_are_wrong_are_not_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, LayerForgotten)
    with pytest.raises(CalibrationError, match="does not hold: K"):
        measure(small(backend__kind="numpy", cache__layers=2), 100)


def test_the_steps_of_the_numpy_oracle_are_timed_twice_in_the_same_order() -> None:
    found = measure(small(backend__kind="numpy", workload__num_requests=6), 25)
    assert len(found.kinds) == 25
    assert found.times_ns.shape == (2, 25)
    assert (found.times_ns > 0).all()
    assert found.device["name"] == "numpy"


@pytest.mark.slow
def test_a_real_calibration_of_the_decoder_has_its_structure_and_sane_bounds(tmp_path: Path, kvproof: Any) -> None:
    out = tmp_path / "tiny.yaml"
    tiny = Path(__file__).parents[2] / "scenarios" / "calibrate-tiny.yaml"
    status, printed, _ = kvproof("calibrate", tiny, "--out", out, "--steps", "200", "--json")
    found = json.loads(printed)
    assert status == 0
    assert found["device"]["platform"] == "cpu"
    calibration = load_calibration(out)
    assert calibration.held_out.steps > 40
    for fit in calibration.kinds.measured().values():
        typical = fit.base_ps + sum(
            per * (r.min + r.max) // 2 for per, r in zip(fit.coefficients_ps, fit.ranges, strict=True)
        )
        # Between a microsecond and ten seconds.
        assert 10**6 < typical < 10**13
    path = tmp_path / "s.yaml"
    used = ["--set", f"cost={{kind: measured, file: {out}}}", "--set", "backend.kind=jax"]
    dump_scenario(load_scenario(tiny), path)
    status, printed, _ = kvproof("run", path, *used, "--json", "--no-plots", "--out", tmp_path / "run")
    assert status == 0
    assert json.loads(printed)["duration_simulated_seconds"] > 0
    model = cost_model(load_scenario(path, [used[1]]).cost)
    assert isinstance(model, Measured)
