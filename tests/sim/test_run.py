"""Runs as a whole: verdicts, the folder on disk, planted bugs, replay."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sim.exit_codes import ExitCode
from sim.expect import check_expectations
from sim.mutants import MUTANTS, UnknownMutantError, find_mutant
from sim.replay import ReplayError, load_recorded, replay
from sim.run import run
from sim.run_folder import EVENTS, FAILURE, REPLAY, SCENARIO, SERIES, SUMMARY, VIOLATIONS
from sim.scenario.models import Expectations
from tests.sim.run_parts import planned_only

SUMMARY_OF_A_RUN: dict[str, Any] = {
    "requests": {"submitted": 10, "finished": 7, "cancelled": 2, "rejected": 1, "live": 0},
    "steps": 50,
    "num_preemptions": 3,
    "invariants": {"P1": {"checked": 5, "nontrivial": 5, "violated": 0}},
    "time_to_first_token_seconds": {"count": 7, "mean": 0.5, "p99": 1.5},
    "inter_token_latency_seconds": {"count": 0, "mean": None, "p99": None},
}


@pytest.mark.parametrize(
    ("expect", "held"),
    [
        ({}, True),
        ({"violations": 0}, True),
        ({"violations": {"min": 1}}, False),
        ({"violated": ["P1"]}, False),
        ({"finished": "all"}, True),
        ({"finished": 7}, True),
        ({"finished": 8}, False),
        ({"cancelled": {"min": 2, "max": 2}}, True),
        ({"cancelled": {"min": 3}}, False),
        ({"rejected": {"max": 0}}, False),
        ({"preemptions": {"min": 1}}, True),
        ({"steps": {"max": 49}}, False),
        ({"time_to_first_token_seconds": {"p99": 1.5}}, True),
        ({"time_to_first_token_seconds": {"p99": 1.4}}, False),
        ({"inter_token_latency_seconds": {"mean": 9.0}}, False),
    ],
    ids=str,
)
def test_an_expectation_holds_where_the_figure_lies_within_it(expect: dict[str, Any], held: bool) -> None:
    checks = check_expectations(Expectations.model_validate(expect), SUMMARY_OF_A_RUN)
    assert all(check.held for check in checks) is held


@pytest.mark.parametrize(
    ("violated", "expected", "held"),
    [
        ({"P1"}, ["P1"], True),
        ({"P1", "K1"}, ["P1"], False),
        ({"K1"}, ["P1"], False),
        ({"P1", "K1"}, ["K1", "P1"], True),
    ],
)
def test_exactly_the_named_invariants_must_break(violated: set[str], expected: list[str], held: bool) -> None:
    summary = copy.deepcopy(SUMMARY_OF_A_RUN)
    summary["invariants"] = {name: {"checked": 1, "nontrivial": 1, "violated": 1} for name in violated}
    checks = check_expectations(Expectations.model_validate({"violated": expected}), summary)
    assert all(check.held for check in checks) is held


def test_one_request_more_that_is_unfinished_is_not_all() -> None:
    summary = copy.deepcopy(SUMMARY_OF_A_RUN)
    summary["requests"]["submitted"] += 1
    assert not all(c.held for c in check_expectations(Expectations(finished="all"), summary))


@pytest.mark.parametrize(
    ("expect", "code"),
    [
        ({"finished": "all"}, ExitCode.HELD),
        ({"finished": 3}, ExitCode.BROKE),
        ({"time_to_first_token_seconds": {"max": 0.0}}, ExitCode.SLO),
        ({"time_to_first_token_seconds": {"max": 0.0}, "steps": 1}, ExitCode.BROKE),
    ],
    ids=str,
)
def test_a_missed_objective_has_an_exit_code_of_its_own(expect: dict[str, Any], code: ExitCode) -> None:
    assert run(planned_only(expect=expect)).exit_code == code


def test_a_run_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(planned_only())
    assert list(tmp_path.iterdir()) == []


def test_the_summary_names_what_was_run() -> None:
    summary = run(planned_only()).summary
    assert (summary["schema"], summary["clock"], summary["seed"]) == ("kvproof/summary-v1", "simulated", 5)
    assert {"numpy", "simpy"} <= summary["versions"].keys()
    assert summary["duration_cpu_seconds"] > 0
    assert json.loads(json.dumps(summary)) == summary


PLANTED = [pytest.param(MUTANTS[name], id=name) for name in ("leak-on-finish", "double-allocation", "wrong-offset")]


@pytest.mark.parametrize("mutant", PLANTED)
def test_a_planted_bug_is_first_noticed_by_the_invariant_that_it_names(mutant: Any, tmp_path: Path) -> None:
    scenario = planned_only(
        backend__kind="numpy",
        workload__arrivals={"kind": "concurrent", "concurrency": 3},
        workload__num_requests=12,
        plant=mutant.id,
        expect={"violations": {"min": 1}},
    )
    report = run(scenario, out=tmp_path)
    assert mutant.caught_by[0] in {violation.id for violation in report.violations}
    assert len({violation.step for violation in report.violations}) == 1
    assert report.exit_code == ExitCode.HELD
    failure = tmp_path / FAILURE
    assert {path.name for path in failure.iterdir()} == {SCENARIO, VIOLATIONS, EVENTS, REPLAY}
    assert str(failure) in (failure / REPLAY).read_text()
    found = json.loads((failure / VIOLATIONS).read_text())
    assert [violation["id"] for violation in found["violations"]] == [v.id for v in report.violations]
    header, *events = (failure / EVENTS).read_text().splitlines()
    assert header.split() == ["seconds", "step", "event", "request", "adm", "slot", "start+n", "free", "hash", "pages"]
    assert all(len(line.split()) >= 9 for line in events)
    again = replay(load_recorded(failure))
    assert again.differences == ()


def test_without_its_plant_the_same_scenario_holds() -> None:
    report = run(planned_only(backend__kind="numpy", core__batch_size=3, workload__num_requests=12))
    assert report.violations == ()


def test_an_unknown_mutant_is_suggested_the_nearest() -> None:
    with pytest.raises(UnknownMutantError, match="did you mean 'leak-on-finish'"):
        find_mutant("leak-at-finish")


def test_a_replay_names_the_first_step_that_differs(tmp_path: Path) -> None:
    run(planned_only(), out=tmp_path)
    recorded = load_recorded(tmp_path)
    assert replay(recorded).same
    text = (tmp_path / SCENARIO).read_text()
    (tmp_path / SCENARIO).write_text(text.replace("prefill_chunk: 8", "prefill_chunk: 4"))
    comparison = replay(load_recorded(tmp_path))
    assert not comparison.same
    assert comparison.differences[0].startswith("the runs part at completed step ")


@pytest.mark.parametrize("broken", [SUMMARY, SERIES])
def test_a_damaged_record_cannot_be_replayed(broken: str, tmp_path: Path) -> None:
    run(planned_only(workload__num_requests=2), out=tmp_path)
    (tmp_path / broken).write_text("{}")
    with pytest.raises(ReplayError, match="damaged"):
        load_recorded(tmp_path)


def test_a_folder_without_a_record_cannot_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="give a run folder"):
        load_recorded(tmp_path)


@pytest.mark.parametrize("mix", ["prefill_first", "decode_first"])
def test_a_step_that_never_ran_counts_as_no_wait(mix: str) -> None:
    report = run(
        planned_only(
            core__mix=mix,
            core__max_decode_wait=1,
            core__max_prefill_wait=1,
            core__prefill_chunk=2,
            workload__prompt_tokens={"kind": "fixed", "value": 9},
            workload__output_tokens={"kind": "fixed", "value": 9},
            workload__arrivals={"kind": "concurrent", "concurrency": 4},
            workload__num_requests=8,
            faults=[{"kind": "fail", "at_step": step} for step in range(1, 60, 3)],
        )
    )
    assert report.violations == ()
    assert report.summary["invariants"]["S12"]["nontrivial"] > 0
