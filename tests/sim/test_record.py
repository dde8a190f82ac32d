"""The recorder against a plain recount of the plan log, and the figures against NumPy's."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_attention.plan import DeclaredPolicy, Effect, StepPlan
from reports.record import RunRecord
from sim.metrics import QUANTILES, distribution
from sim.record import Recorder
from sim.run import run
from sim.run_folder import read_step_hashes, series_arrays
from sim.trace_hash import DIGEST_BYTES, TraceHash, first_difference
from tests.sim.run_parts import logged, planned_only, scenarios


@dataclass
class Recount:
    """Counts everything again, request by request and page by page."""

    owner: dict[int, int] = field(default_factory=dict)
    fenced: set[int] = field(default_factory=set)
    written: Counter[int] = field(default_factory=Counter)
    where: dict[int, str] = field(default_factory=dict)
    slots: set[int] = field(default_factory=set)
    in_flight: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    submitted: dict[int, int] = field(default_factory=dict)
    rows: list[tuple[int, ...]] = field(default_factory=list)

    def line(self, line: dict[str, Any]) -> None:
        if "submit" in line:
            self.submitted[line["submit"]["id"]] = line["time_ns"]
        if "outcome" in line:
            plan = self.in_flight.pop(0)
            self.rows.append((plan["step"], *plan["counts"], line["time_ns"]))
            for request, token in zip(plan["request"], line["outcome"]["token"], strict=True):
                if token >= 0:
                    self.tokens.setdefault(request, []).append(line["time_ns"])
        if "abandon" in line:
            plan = self.in_flight.pop()
            for request, start in zip(plan["request"], plan["start"], strict=True):
                self.written[request] = start
        preempted = 0
        for effect in line.get("effects", ()):
            preempted += effect[0] == "preempted"
            self.effect(*effect)
        if "plan" in line:
            self.plan(line["plan"], preempted)

    def effect(
        self, kind: str, request: int, admission: int, slot: int = -1, first: int = 0, pages: Any = (), reason: str = ""
    ) -> None:
        if kind == "allocated":
            self.owner.update(dict.fromkeys(pages, request))
        elif kind == "freed":
            assert all(self.owner.pop(page) == request for page in pages)
            if any(request in plan["request"] for plan in self.in_flight):
                self.fenced.update(pages)
            self.slots.discard(slot)
            self.written[request] = 0
        elif kind == "unfenced":
            self.fenced.difference_update(pages)
        elif kind == "joined":
            self.slots.add(slot)
            self.where[request] = "running"
        else:
            states = {"submitted": "waiting", "preempted": "waiting", "admitted": "running"}
            self.where[request] = states.get(kind, "gone")

    def plan(self, plan: dict[str, Any], preempted: int) -> None:
        for request, start, count in zip(plan["request"], plan["start"], plan["count"], strict=True):
            self.written[request] = start + count
        places = Counter(self.where.values())
        prefill = sum(count for count, slot in zip(plan["count"], plan["slot"], strict=True) if slot < 0)
        counts = (
            prefill,
            sum(plan["count"]) - prefill,
            places["running"],
            places["waiting"],
            len(self.slots),
            len(self.owner),
            len(self.fenced),
            sum(self.written.values()),
            preempted,
        )
        self.in_flight.append({**plan, "counts": counts})


COUNTED = (
    "step",
    "prefill_tokens",
    "decode_tokens",
    "running",
    "waiting",
    "slots_used",
    "pages_owned",
    "pages_fenced",
    "live_tokens",
    "preemptions",
    "end_ns",
)


@settings(max_examples=25, deadline=None)
@given(scenarios())
def test_the_series_equal_a_plain_recount_of_the_plan_log(scenario: Any) -> None:
    report, log = logged(scenario)
    recount = Recount()
    for line in log[1:]:
        recount.line(line)
    series = report.recorder.series
    assert list(zip(*(series[name] for name in COUNTED), strict=True)) == recount.rows
    total = scenario.cache.num_pages - 1
    for owned, free, fenced in zip(series["pages_owned"], series["pages_free"], series["pages_fenced"], strict=True):
        assert owned + free + fenced == total


@settings(max_examples=25, deadline=None)
@given(scenarios())
def test_latencies_equal_those_of_the_tokens_in_the_plan_log(scenario: Any) -> None:
    report, log = logged(scenario)
    recount = Recount()
    for line in log[1:]:
        recount.line(line)
    gaps = Counter(b - a for times in recount.tokens.values() for a, b in pairwise(times))
    assert report.recorder.itl_gaps == gaps
    table = report.recorder.requests
    for request, times in recount.tokens.items():
        assert table.first_token_ns[request] == times[0]
        assert table.output_tokens[request] == len(times)
        assert report.recorder.times_of(request)["itl_sum_ns"] == times[-1] - times[0]
    first = report.summary["time_to_first_token_seconds"]
    waits = [times[0] - recount.submitted[request] for request, times in recount.tokens.items()]
    assert first["count"] == len(waits)
    if waits:
        assert first["mean"] == pytest.approx(np.mean(waits) / 1e9)
        assert first["p90"] == pytest.approx(np.quantile(waits, 0.9) / 1e9)


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 5)), min_size=1, max_size=40))
def test_figures_of_a_histogram_equal_those_of_its_values(pairs: list[tuple[int, int]]) -> None:
    values, counts = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    whole = np.repeat(values, counts)
    found = distribution(values, counts)
    assert found["count"] == len(whole)
    assert found["mean"] == pytest.approx(whole.mean() / 1e9)
    assert found["std"] == pytest.approx(whole.std() / 1e9, abs=1e-12)
    assert (found["min"], found["max"]) == (pytest.approx(whole.min() / 1e9), pytest.approx(whole.max() / 1e9))
    for name, q in QUANTILES.items():
        assert found[name] == pytest.approx(np.quantile(whole, q) / 1e9)


def test_no_values_have_no_figures_but_their_count() -> None:
    found = distribution(np.zeros(0, np.int64))
    assert found.pop("count") == 0
    assert set(found.values()) == {None}


def test_page_events_replay_to_the_owners_of_the_series() -> None:
    recorder = run(planned_only(core__lag=1, workload__end_by="eos")).recorder
    arrays = series_arrays(recorder)
    owner = np.full(33, -1)
    events = list(zip(arrays["page_time_ns"], arrays["page_id"], arrays["page_owner"], strict=True))
    assert [event[0] for event in events] == sorted(event[0] for event in events)
    for _, page, now in events:
        owner[page] = now
    assert np.all(owner == -1)
    assert {int(page) for _, page, _ in events} <= set(range(1, 33))


def test_segments_of_a_request_tile_its_time_in_the_system() -> None:
    arrivals = {"kind": "concurrent", "concurrency": 8}
    recorder = run(
        planned_only(cache__num_pages=12, cache__max_sequence_length=32, workload__arrivals=arrivals)
    ).recorder
    assert recorder.num_preemptions > 0
    arrays, table = series_arrays(recorder), recorder.requests
    for request in range(table.num_requests):
        if table.finish_ns[request] < 0:
            continue
        mine = arrays["seg_request"] == request
        starts, ends = arrays["seg_start_ns"][mine], arrays["seg_end_ns"][mine]
        assert starts[0] == table.arrival_ns[request]
        assert ends[-1] == table.finish_ns[request]
        assert starts[1:].tolist() == ends[:-1].tolist()


def test_a_run_folder_can_be_read_by_the_reports(tmp_path: Path) -> None:
    report = run(planned_only(), out=tmp_path)
    record = RunRecord.load(tmp_path)
    assert record.summary == json.loads(json.dumps(report.summary))
    assert len(record.requests) == 50
    assert len(record.series.step) == report.recorder.steps
    assert read_step_hashes(tmp_path) == bytes(report.recorder.hash.step_digests)
    assert len(report.recorder.hash.step_digests) == DIGEST_BYTES * report.recorder.steps


def policy() -> DeclaredPolicy:
    return DeclaredPolicy(batch_size=2, page_size=4, num_pages=9, max_sequence_length=16, prefill_chunk=4)


def plan_of(step: int, **changes: Any) -> StepPlan:
    arrays = {
        "request": [0],
        "admission": [1],
        "slot": [-1],
        "start": [0],
        "count": [2],
        "samples": [1],
        "tokens": [7, 8],
        "num_pages": [1],
    }
    rows = {name: np.array(changes.pop(name, values), np.int32) for name, values in arrays.items()}
    table = np.array(changes.pop("table", [[3]]), np.int32)
    effects = changes.pop("effects", (Effect("allocated", 0, 1, pages=(3,)),))
    return StepPlan(step=step, **rows, table=table, effects=effects)


@pytest.mark.parametrize(
    "change",
    [
        {"request": [1]},
        {"admission": [2]},
        {"slot": [0]},
        {"start": [1]},
        {"samples": [0]},
        {"tokens": [7, 9]},
        {"table": [[4]]},
        {"effects": ()},
        {"effects": (Effect("allocated", 0, 1, pages=(4,)),)},
        {"effects": (Effect("allocated", 0, 1, pages=(3,), reason="x"),)},
    ],
    ids=str,
)
def test_the_trace_hash_sees_every_part_of_a_plan(change: dict[str, Any]) -> None:
    one, other = TraceHash(), TraceHash()
    one.plan(plan_of(0))
    other.plan(plan_of(0, **change))
    assert one.hexdigest != other.hexdigest


def test_the_trace_hash_of_a_column_with_gaps_is_that_of_its_values() -> None:
    one, other = TraceHash(), TraceHash()
    plan = plan_of(0, request=[0, 1], table=[[3, 4], [5, 0]], num_pages=[2, 1])
    one.plan(plan)
    other.plan(replace(plan, request=np.repeat(plan.request, 2)[::2], table=np.asfortranarray(plan.table)))
    assert one.hexdigest == other.hexdigest


def test_the_first_differing_step_is_named() -> None:
    a = bytes(range(32))
    assert first_difference(a, a) is None
    assert first_difference(a, a[:16]) is None
    assert first_difference(a, a[:16] + b"!" + a[17:]) == 2


def test_only_the_newest_plan_can_be_abandoned() -> None:
    recorder = Recorder(policy())
    recorder.submitted(0, 0, 2, (Effect("submitted", 0, 0),))
    recorder.planned(0, plan_of(0, effects=(Effect("admitted", 0, 1), Effect("allocated", 0, 1, pages=(3,)))))
    recorder.planned(0, plan_of(1, effects=()))
    with pytest.raises(ValueError, match="newest"):
        recorder.abandoned(0, plan_of(0), ())
