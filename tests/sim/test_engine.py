"""The engine: what happens when, and that nothing is lost on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

import sim.engine
import sim.run
from backends.numpy_oracle import NumpyBackend
from paged_attention.engine import PagedAttentionEngine
from sim.clock import Moment, Order
from sim.exit_codes import ExitCode
from sim.run import run
from sim.script import request_seeds
from tests.sim.run_parts import logged, planned_only, scenarios

STEP_NS = 1000


def lines_of(log: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in log if kind in line]


@given(st.permutations([(order, copy) for order in Order for copy in range(2)]))
def test_events_of_one_instant_keep_the_documented_order(events: list[tuple[Order, int]]) -> None:
    env = simpy.Environment()
    seen: list[tuple[Order, int]] = []
    for order, copy in events:
        Moment(env, order, lambda _, what=(order, copy): seen.append(what)).after(5)
    env.run()
    assert seen == sorted(events, key=lambda event: event[0])
    assert env.now == 5
    assert isinstance(env.now, int)


def test_time_cannot_run_backwards() -> None:
    with pytest.raises(ValueError, match="backwards"):
        Moment(simpy.Environment(), Order.WAKE, lambda _: None).after(-1)


def test_an_arrival_at_the_end_of_a_step_is_seen_by_the_next_plan() -> None:
    scenario = planned_only(
        workload__arrivals={"kind": "constant", "request_rate": 1e6},
        workload__output_tokens={"kind": "fixed", "value": 3},
        workload__prompt_tokens={"kind": "fixed", "value": 2},
        workload__num_requests=3,
        cost__step_ns=STEP_NS,
    )
    requests = run(scenario).recorder.requests
    assert requests.arrival_ns[:3].tolist() == requests.admitted_ns[:3].tolist()
    assert np.all(requests.arrival_ns[:3] % STEP_NS == 0)


def test_an_idle_engine_wakes_for_every_arrival() -> None:
    scenario = planned_only(
        workload__arrivals={"kind": "constant", "request_rate": 10.0},
        workload__output_tokens={"kind": "fixed", "value": 2},
        workload__prompt_tokens={"kind": "fixed", "value": 4},
        workload__num_requests=20,
    )
    report = run(scenario)
    requests = report.recorder.requests
    assert report.summary["requests"]["finished"] == 20
    assert np.all((requests.first_token_ns - requests.arrival_ns)[:20] == STEP_NS)
    assert np.all((requests.finish_ns - requests.first_token_ns)[:20] == STEP_NS)


def test_all_arrivals_of_an_instant_are_there_when_a_sleeping_engine_wakes() -> None:
    scenario = planned_only(
        core__batch_size=2,
        workload__arrivals={"kind": "concurrent", "concurrency": 4},
        workload__num_requests=4,
        workload__prompt_tokens={"kind": "fixed", "value": 4},
    )
    _, log = logged(scenario)
    assert [next(iter(line.keys() - {"time_ns", "effects"})) for line in log[1:6]] == ["submit"] * 4 + ["plan"]


def test_there_is_one_event_per_step_and_per_arrival_but_none_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: Counter[Order] = Counter()

    class Counted(Moment):
        def after(self, delay_ns: int) -> None:
            kinds[self.order] += 1
            super().after(delay_ns)

    monkeypatch.setattr(sim.engine, "Moment", Counted)
    report = run(planned_only())
    assert kinds[Order.STEP_END] == report.summary["steps"]
    assert kinds[Order.ARRIVAL] == 50
    assert kinds[Order.WAKE] <= 51
    assert report.summary["tokens"]["scheduled"] > 2 * kinds[Order.STEP_END]


def test_a_closed_loop_keeps_exactly_its_number_of_requests_in_the_system() -> None:
    scenario = planned_only(workload__arrivals={"kind": "concurrent", "concurrency": 3}, workload__num_requests=20)
    _, log = logged(scenario)
    live, submitted, seen = 0, 0, set()
    for line in log:
        if "submit" in line:
            live, submitted = live + 1, submitted + 1
        if "plan" in line and submitted < 20:
            seen.add(live)
        live -= sum(effect[0] == "ended" for effect in line.get("effects", ()))
    assert submitted == 20
    assert seen == {3}


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_step_starts_when_the_device_is_free_and_lag_steps_are_planned_ahead(lag: int) -> None:
    report, log = logged(planned_only(core__lag=lag, workload__arrivals={"kind": "concurrent", "concurrency": 4}))
    series = report.recorder.series
    assert list(series["start_ns"])[1:] == list(series["end_ns"])[:-1]
    in_flight, deepest = 0, 0
    for line in log:
        in_flight += ("plan" in line) - ("outcome" in line)
        deepest = max(deepest, in_flight)
    assert deepest == lag + 1


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_cancel_at_a_step_comes_before_that_step_is_planned(lag: int) -> None:
    base = planned_only(core__lag=lag, workload__arrivals={"kind": "concurrent", "concurrency": 4})
    _, before = logged(base)
    victim = lines_of(before, "plan")[6]["plan"]["request"][-1]
    faults = [{"kind": "cancel", "request": victim, "at_step": 6}]
    report, log = logged(base.model_validate({**base.model_dump(by_alias=True), "faults": faults}))
    steps_before = [line for line in log[: log.index(lines_of(log, "cancel")[0])] if "plan" in line]
    assert len(steps_before) == 6
    assert victim not in lines_of(log, "plan")[6]["plan"]["request"]
    assert report.summary["requests"]["cancelled"] == 1


def test_a_cancel_at_a_time_happens_at_that_time() -> None:
    faults = [{"kind": "cancel", "request": 7, "at_seconds": 4e-6}]
    arrivals = {"kind": "concurrent", "concurrency": 20}
    _, log = logged(planned_only(workload__arrivals=arrivals, faults=faults))
    assert [(line["cancel"], line["time_ns"]) for line in lines_of(log, "cancel")] == [(7, 4000)]


def test_a_cancel_of_an_unknown_request_changes_nothing() -> None:
    scenario = planned_only(faults=[{"kind": "cancel", "request": 40, "at_step": 0}])
    assert run(scenario).trace_hash == run(planned_only()).trace_hash


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_failed_step_is_planned_anew_after_its_duration_and_no_token_is_lost(lag: int) -> None:
    keys: dict[str, Any] = {"core__lag": lag, "workload__arrivals": {"kind": "concurrent", "concurrency": 4}}
    clean, _ = logged(planned_only(**keys))
    report, log = logged(planned_only(**keys, faults=[{"kind": "fail", "at_step": 5}]))
    (failed,) = lines_of(log, "abandon")
    following = next(line for line in log[log.index(failed) :] if "plan" in line)
    assert following["time_ns"] >= failed["time_ns"] + STEP_NS
    assert report.summary["failed_steps"] == 1
    assert report.summary["tokens"]["output"] == clean.summary["tokens"]["output"]
    assert report.summary["requests"]["finished"] == 50


def test_a_refused_request_is_recorded_with_its_reason() -> None:
    scenario = planned_only(
        cache__num_pages=5,
        workload__prompt_tokens={"kind": "uniform", "min": 10, "max": 30},
        expect={"rejected": {"min": 1}},
    )
    report = run(scenario)
    rejected = report.summary["requests"]["rejected"]
    assert rejected > 0
    assert rejected + report.summary["requests"]["finished"] == 50
    assert sum(report.summary["rejected_reasons"].values()) == rejected
    assert all("pages" in reason for reason in report.summary["rejected_reasons"])


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_an_eos_ends_an_output_after_its_drawn_length(lag: int) -> None:
    by_eos = run(planned_only(core__lag=lag, workload__end_by="eos")).recorder.requests
    by_count = run(planned_only(core__lag=lag)).recorder.requests
    assert by_eos.output_tokens[:50].tolist() == by_count.output_tokens[:50].tolist()
    assert set(by_eos.reason.values()) == {"eos"}
    assert set(by_count.reason.values()) == {"max_tokens"}


def test_ctrl_c_ends_the_run_with_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim.engine, "PROGRESS_EVERY_STEPS", 10)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    report = run(planned_only(), progress=interrupt)
    assert report.exit_code == ExitCode.INTERRUPTED
    assert report.summary["verdict"] == "interrupted"
    assert report.summary["steps"] == 10
    assert report.summary["requests"]["submitted"] > 0


def test_a_core_that_raises_is_a_finding_with_its_step_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PagedAttentionEngine, outcome: object) -> None:
        raise KeyError("no such slot")

    monkeypatch.setattr(PagedAttentionEngine, "apply", broken)
    report = run(planned_only())
    assert report.exit_code == ExitCode.BROKE
    assert report.summary["crash"].startswith("step 0: ")
    assert "KeyError: 'no such slot'" in report.summary["crash"]


@pytest.mark.parametrize(("audit", "method"), [(True, "verify"), (True, "evidence"), (False, "evidence")])
def test_a_cache_that_cannot_be_read_is_a_crash_of_the_backend(
    audit: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise TypeError("shapes do not fit")

    monkeypatch.setattr(NumpyBackend, method, broken)
    report = run(planned_only(backend__kind="numpy", workload__num_requests=2), audit=audit)
    assert (report.exit_code, report.summary["cache_hash"]) == (ExitCode.BROKE, None)
    assert "broken() raised TypeError: shapes do not fit" in report.summary["crash"]


@settings(max_examples=25, deadline=None)
@given(scenarios())
def test_every_request_ends_and_every_scheduled_token_is_accounted_for(scenario: Any) -> None:
    report = run(scenario)
    summary, requests, tokens = report.summary, report.summary["requests"], report.summary["tokens"]
    assert summary["crash"] is None
    assert report.violations == ()
    assert requests["live"] == 0
    assert requests["finished"] + requests["cancelled"] + requests["rejected"] == requests["submitted"]
    if not requests["cancelled"] and scenario.workload.end_by == "max_tokens":
        due = tokens["prompt"] + tokens["output"] - requests["finished"] + tokens["recomputed"] + tokens["discarded"]
        assert tokens["scheduled"] == due
    assert report.recorder.pages_owned == report.recorder.pages_fenced == report.recorder.live_tokens == 0
    assert report.recorder.running == report.recorder.waiting == report.recorder.slots_used == 0


@settings(max_examples=10, deadline=None)
@given(scenarios())
def test_the_trace_is_the_same_again_with_and_without_observers(scenario: Any) -> None:
    first = run(scenario)
    unobserved = run(scenario, audit=False)
    logged_too, _ = logged(scenario)
    assert first.trace_hash == unobserved.trace_hash == logged_too.trace_hash
    assert first.recorder.hash.step_digests == unobserved.recorder.hash.step_digests


def test_the_trace_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    program = (
        "from sim.run import run; from tests.sim.scenario_parts import small; "
        "print(run(small(backend__kind='none', core__lag=1, seed=3)).trace_hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "12345")
    }
    assert hashes == {run(planned_only(core__lag=1, seed=3)).trace_hash + "\n"}


def test_another_seed_or_policy_gives_another_trace() -> None:
    hashes = {
        run(planned_only(**keys)).trace_hash
        for keys in ({}, {"seed": 6}, {"core__lag": 1}, {"cache__page_size": 8}, {"core__prefill_chunk": 4})
    }
    assert len(hashes) == 5


def test_seed_31_request_seeds_depend_on_scenario_seed_and_id_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(2000)
    seeds = request_seeds(7, ids)
    assert len(set(seeds.tolist())) == 2000
    assert request_seeds(7, ids[500:510]).tolist() == seeds[500:510].tolist()
    assert not np.any(request_seeds(8, ids) == seeds)
    assert not np.any(request_seeds(7 + 2**32, ids) == seeds)
    made: list[int] = []
    submit = PagedAttentionEngine.submit

    def noted(engine: PagedAttentionEngine, request: Any) -> Any:
        made.append(request.seed)
        return submit(engine, request)

    monkeypatch.setattr(PagedAttentionEngine, "submit", noted)
    run(planned_only(seed=7))
    assert made == seeds[:50].tolist()
