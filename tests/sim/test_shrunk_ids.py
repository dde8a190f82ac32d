"""Shrinking where ids matter: what is left keeps the ids that show the bug, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.replay import load_recorded, replay
from sim.scenario import Scenario, load_scenario
from sim.search.bold import first_id_of, leave_out, operations_of, requests_of
from sim.search.campaign import MOST_REQUESTS, hunt
from sim.search.concrete import concrete
from sim.search.failure import as_regression, write_failure_file
from sim.search.probe import probe
from sim.search.shrink import Shrunk, shrink
from sim.search.swarm import Limits, draw
from tests.sim.run_parts import planned_only
from tests.sim.scenario_parts import ids_from


def broken(mutant: str, first: int, **limits: int) -> Scenario:
    """The first drawn scenario that shows a planted bug, with requests numbered from `first` on."""
    drawn = (ids_from(first, draw(3, number, limits=Limits(**limits))) for number in range(300))
    return next(s for d in drawn if probe(s := d.model_copy(update={"plant": mutant})).id)


def test_a_scenario_spelled_out_keeps_its_ids() -> None:
    faults = [{"kind": "cancel", "request": 11, "at_step": 4}]
    scenario = planned_only(workload__first_request_id=9, workload__num_requests=5, plant="MP04", faults=faults)
    spelled_out, finding = concrete(scenario)
    assert spelled_out.workload.first_request_id == 9
    assert probe(spelled_out).pin == finding.pin != ""


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20), st.data())
def test_what_names_a_request_follows_it_to_its_new_id_or_goes_with_it(
    number: int, first: int, new_first: int, data: st.DataObject
) -> None:
    before = ids_from(first, draw(6, number, limits=Limits(max_requests=6))).model_dump(by_alias=True)
    marked = [
        {**request, "eos_after": None, "output_tokens": 100 + at} for at, request in enumerate(requests_of(before))
    ]
    before["workload"]["arrivals"]["requests"] = marked
    after = {**before, "workload": {**before["workload"], "arrivals": {**before["workload"]["arrivals"]}}}
    operations = operations_of(before)
    gone = data.draw(st.lists(st.sampled_from(range(len(operations))), unique=True))
    kept = leave_out(after, gone, first_id=new_first)
    names_before = {first + at: request["output_tokens"] for at, request in enumerate(marked)}
    names_after = {new_first + at: request["output_tokens"] for at, request in enumerate(requests_of(after))}
    assert [marked[at] for at in kept] == requests_of(after)
    assert first_id_of(after) == new_first
    faults = [fault for at, fault in enumerate(before["faults"]) if operations.index(("fault", at)) not in gone]
    told = [(fault["kind"], names_before.get(fault.get("request", -1))) for fault in faults]
    wanted = [(kind, name) for kind, name in told if name is None or name in names_after.values()]
    assert [(fault["kind"], names_after.get(fault.get("request", -1))) for fault in after["faults"]] == wanted


def test_where_ids_do_not_matter_the_first_one_becomes_0() -> None:
    scenario = broken("MT10", 500, max_requests=6)
    shrunk = shrink(scenario)
    assert shrunk.scenario.workload.first_request_id == 0
    assert shrunk.num_requests <= MOST_REQUESTS
    assert shrunk.finding.pin == probe(scenario).pin


@pytest.fixture(scope="module")
def by_text() -> Shrunk:
    """A core that takes waiting requests in the order of their ids as text, shrunk."""
    return shrink(broken("MS16", 0))


def test_of_a_core_that_sorts_ids_as_text_two_requests_are_left_whose_texts_sort_otherwise(by_text: Shrunk) -> None:
    first = by_text.scenario.workload.first_request_id
    ids = list(range(first, first + by_text.num_requests))
    assert ids == [9, 10]
    assert sorted(ids, key=str) != ids
    assert by_text.num_operations == 2


@pytest.mark.parametrize("lower", [0, 8])
def test_no_smaller_first_id_shows_the_same(by_text: Shrunk, lower: int) -> None:
    assert probe(ids_from(lower, by_text.scenario)).pin != by_text.finding.pin


def test_the_file_of_a_bug_that_depends_on_ids_names_the_first_one_and_replays(by_text: Shrunk, tmp_path: Path) -> None:
    path = tmp_path / "failure.yaml"
    write_failure_file(path, by_text)
    assert load_scenario(path) == as_regression(by_text)
    assert "first_request_id: 9" in path.read_text()
    assert all(replay(load_recorded(path)).same for _ in range(2))


def test_a_source_file_takes_the_first_id_of_its_smallest_scenario(by_text: Shrunk, tmp_path: Path) -> None:
    source, path = tmp_path / "source.yaml", tmp_path / "failure.yaml"
    usual = ids_from(0, by_text.scenario)
    source.write_text(f"# mine\n{json.dumps(usual.model_dump(mode='json', by_alias=True, exclude_defaults=True))}\n")
    write_failure_file(path, by_text, source)
    assert load_scenario(path).workload.first_request_id == 9


def test_a_hunt_for_a_bug_that_depends_on_ids_ends_small_and_replays() -> None:
    found = hunt("MS16", 0, seconds=1e9, runs=400)
    assert (found.requests, found.replayed, found.is_small) == (2, True, True)
