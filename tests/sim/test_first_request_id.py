"""Requests whose ids do not begin at 0: the same run, and everything that names a request follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports import perfetto
from reports.plots import page_map, style, timeline
from reports.record import RunRecord
from sim.deep import deep_check
from sim.judge import judge
from sim.replay import load_recorded, replay
from sim.run import run
from sim.run_folder import request_lines
from sim.scenario import Scenario
from sim.scenario.models import CancelFault
from sim.workload import concrete_faults, generate
from tests.sim.page_parts import ROOT
from tests.sim.run_parts import planned_only, scenarios
from tests.sim.scenario_parts import ids_from, small

TRACE = {"kind": "trace", "format": "vidur", "path": str(ROOT / "scenarios" / "traces" / "vidur-small.csv")}
SCRIPT = {"kind": "script", "requests": [{"prompt_tokens": 3, "output_tokens": 2, "at_step": step} for step in (0, 1)]}
OF_ITS_OWN: dict[str, None] = {"workload__prompt_tokens": None, "workload__output_tokens": None}
ARRIVALS: dict[str, dict[str, Any]] = {
    "constant": {"workload__arrivals": {"kind": "constant", "request_rate": 3.0}},
    "poisson": {"workload__arrivals": {"kind": "poisson", "request_rate": 3.0}},
    "gamma": {"workload__arrivals": {"kind": "gamma", "request_rate": 3.0}},
    "stages": {"workload__arrivals": {"kind": "stages", "stages": [{"request_rate": 3.0, "duration_seconds": 9.0}]}},
    "concurrent": {"workload__arrivals": {"kind": "concurrent", "concurrency": 3}},
    "trace": {"workload__arrivals": TRACE, "workload__num_requests": 7, **OF_ITS_OWN},
    "script": {"workload__arrivals": SCRIPT, "workload__num_requests": None, **OF_ITS_OWN},
}
CROWDED = {"workload__arrivals": {"kind": "constant", "request_rate": 1e6}}


@pytest.mark.parametrize("kind", ARRIVALS)
def test_arrivals_of_every_kind_are_numbered_from_the_first_id_on_and_are_the_same_otherwise(kind: str) -> None:
    scenario = small(**ARRIVALS[kind])
    usual, later = list(generate(scenario)), list(generate(ids_from(9, scenario)))
    assert [arrival.request for arrival in later] == list(range(9, 9 + len(usual)))
    assert [arrival._replace(request=arrival.request - 9) for arrival in later] == usual
    assert len(usual) > 1


def without_ids(scenario: Scenario) -> tuple[Any, ...]:
    """What a run's record says, with requests numbered from 0."""
    recorder = run(scenario).recorder
    first = scenario.workload.first_request_id
    rows = [json.loads(line) for lines in request_lines(recorder) for line in lines.splitlines()]
    pages, segments = recorder.page_events(), recorder.segments()
    owner = pages["page_owner"]
    pages["page_owner"] = np.where(owner < 0, owner, owner - first)
    segments["seg_request"] -= first
    named = {**recorder.series, **pages, **segments}
    ids = [row.pop("id") - first for row in rows]
    for row in rows:
        row["reason"] = row["reason"] if row["state"] != "rejected" else "refused"
    return ids, rows, {name: values.tolist() for name, values in named.items()}, recorder.itl_gaps


@settings(max_examples=25, deadline=None)
@given(scenarios(), st.integers(1, 2000))
def test_a_run_takes_the_same_steps_whatever_its_first_id_is(scenario: Scenario, first: int) -> None:
    assert without_ids(ids_from(first, scenario)) == without_ids(scenario)


@settings(max_examples=10, deadline=None)
@given(scenarios(), st.integers(1, 2000))
def test_nothing_breaks_and_the_counts_are_those_of_requests_that_came(scenario: Scenario, first: int) -> None:
    usual, later = run(scenario), run(ids_from(first, scenario))
    assert [str(violation) for violation in later.violations] == []
    for name in ("requests", "rejected_reasons", "sometimes", "steps", "tokens"):
        assert later.summary[name] == usual.summary[name]
    assert later.recorder.num_requests == usual.recorder.num_requests


def test_the_largest_first_id_runs() -> None:
    report = run(ids_from(1_000_000, planned_only(workload__num_requests=3)))
    assert report.summary["verdict"] == "held"
    assert report.recorder.requests.num_requests == 3


def test_a_cancel_names_the_id_of_its_request() -> None:
    faults = [{"kind": "cancel", "request": 11, "at_step": 4}]
    report = run(planned_only(workload__first_request_id=9, workload__num_requests=5, faults=faults, **CROWDED))
    rows = [json.loads(line) for lines in request_lines(report.recorder) for line in lines.splitlines()]
    assert [row["id"] for row in rows if row["state"] == "cancelled"] == [11]
    assert [row["id"] for row in rows] == [9, 10, 11, 12, 13]


def test_a_storm_cancels_the_same_requests_under_their_ids() -> None:
    scenario = small(faults=[{"kind": "cancel_storm", "fraction": 0.5, "max_delay_seconds": 2.0}])
    usual, later = concrete_faults(scenario), concrete_faults(ids_from(9, scenario))
    assert [f.model_copy(update={"request": f.request - 9}) for f in later if isinstance(f, CancelFault)] == [*usual]


def test_a_request_is_sent_twice_under_its_id() -> None:
    faults = [{"kind": "resubmit", "request": 9, "at_step": step} for step in range(12)]
    scenario = planned_only(workload__first_request_id=9, workload__num_requests=2, faults=faults, **CROWDED)
    assert run(scenario).violations == ()
    # The statement that a core must refuse it is judged as often as it was unfinished, with its id or another.
    judged = run(ids_from(0, scenario)).summary["invariants"]["S13"]
    assert run(scenario).summary["invariants"]["S13"] == judged
    assert judged["nontrivial"] > 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    faults = [{"kind": "cancel", "request": 10, "at_step": 3}]
    scenario = planned_only(workload__first_request_id=9, workload__num_requests=4, faults=faults, **CROWDED)
    run(scenario, out=folder, plan_log=folder / "log.jsonl")
    return folder


def test_the_record_has_a_row_for_each_request_that_came_and_for_no_other(recorded: Path) -> None:
    record = RunRecord.load(recorded)
    assert record.requests.id.tolist() == [9, 10, 11, 12]
    assert record.requests.state == ("finished", "cancelled", "finished", "finished")
    assert set(record.series.seg_request.tolist()) == {9, 10, 11, 12}
    assert set(record.series.page_owner[record.series.page_owner >= 0].tolist()) <= {9, 10, 11, 12}


def test_reports_show_the_ids_of_the_record(recorded: Path) -> None:
    record = RunRecord.load(recorded)
    names = [e["args"]["name"] for e in perfetto.trace(record)["traceEvents"] if e["name"] == "thread_name"]
    assert names == ["steps", "request 9", "request 10 (cancelled)", "request 11", "request 12"]
    with style.applied():
        rows = timeline.figure(record).axes[0].get_yticklabels()
        owners = page_map.figure(record).axes[0].texts
    assert {label.get_text() for label in rows} == {"9", "10", "11", "12"}
    assert {text.get_text() for text in owners} <= {"9", "10", "11", "12"}


def test_a_run_folder_replays_and_its_plan_log_is_judged(recorded: Path) -> None:
    assert replay(load_recorded(recorded)).same
    judgement = judge(recorded / "log.jsonl")
    assert judgement.complete
    assert judgement.auditor.violations == []
    assert judgement.recorder.requests.num_requests == 4


def test_deep_checks_hold_and_compare_as_much_as_with_ids_from_0() -> None:
    faults = [{"kind": "cancel", "request": 3, "at_step": 2}]
    scenario = planned_only(workload__num_requests=10, faults=faults, **CROWDED)
    only = frozenset({"S14", "O4", "O5", "O6", "O7", "O9", "D4", "D5"})
    later = deep_check(ids_from(9, scenario), only)
    assert [str(violation) for violation in later.violations] == []
    assert later.crash is None
    assert later.requests == 10
    assert all(later.counters[name]["nontrivial"] > 0 for name in only)
