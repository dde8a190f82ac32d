"""State machines and byte tapes: silent on an honest core, loud on a broken one; explored worlds are exhausted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import find, given, settings

from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.pages import HBMPageManager
from sim.cli import main
from sim.cores.paged_attention import build
from sim.mutants import find_mutant, planted
from sim.scenario import Scenario
from sim.search.explore import explore
from sim.search.probe import probe
from sim.search.small_world import Action, Scope, freeze, move, new_world, thaw
from sim.search.state_key import state_key
from sim.search.stateful import BrokenError, kvproof_stateful, page_manager_stateful
from sim.search.tape import scenario_of_tape, scenarios
from tests.sim.page_parts import reader_environment


def manager(num_pages: int) -> HBMPageManager:
    sizes = PagedAttentionCacheMetaData(
        batch_size=2,
        num_hidden_layers=1,
        num_pages_per_layer=num_pages,
        num_pages_per_sequence=4,
        max_sequences=8,
        page_size=2,
        num_kv_heads=1,
        kv_head_dim_size=4,
        hbm_utilization=1.0,
    )
    return HBMPageManager(sizes)


TestOwnCore = kvproof_stateful(build, max_examples=15, steps=25)
TestOwnPageManager = page_manager_stateful(manager, max_examples=40, steps=30)


@pytest.mark.slow
def test_the_state_machine_finds_a_planted_bug() -> None:
    with planted(find_mutant("MP04")), pytest.raises(BrokenError, match="P2 at step"):
        kvproof_stateful(build, max_examples=30, steps=8)("runTest").runTest()


def test_the_page_manager_machine_finds_a_planted_bug() -> None:
    with planted(find_mutant("MP02")), pytest.raises(BrokenError, match="were free, got"):
        page_manager_stateful(manager, max_examples=60)("runTest").runTest()


@settings(max_examples=25)
@given(scenarios())
def test_every_tape_is_a_scenario_that_holds(scenario: Scenario) -> None:
    finding = probe(scenario)
    assert finding.id == "", finding.message


def test_the_empty_tape_is_the_simplest_scenario() -> None:
    simplest = scenario_of_tape(b"")
    assert simplest.workload.arrivals.kind == "script"
    assert len(simplest.workload.arrivals.requests) == 1


@pytest.mark.slow
def test_hypothesis_shrinks_a_tape_to_a_small_scenario() -> None:
    def breaks(scenario: Scenario) -> bool:
        return probe(scenario.model_copy(update={"plant": "MP04"})).id != ""

    smallest = find(scenarios(), breaks, settings=settings(max_examples=40, deadline=None))
    assert len(smallest.workload.arrivals.requests) <= 2  # type: ignore[union-attr]


SMALL = Scope(requests=1, pages=3, slots=1)


def test_a_small_world_is_exhausted_without_a_violation() -> None:
    seen = explore(SMALL, build)
    assert seen.exhausted
    assert seen.violations == []
    assert 10 < seen.states <= seen.transitions


def test_symmetry_leaves_out_states_but_no_violation() -> None:
    for mutant, same in ((None, True), ("MP27", False)):
        with planted(find_mutant(mutant) if mutant else None):
            scope = Scope(requests=1, pages=3, slots=1, lag=1)
            folded = explore(scope, build)
            raw = explore(Scope(requests=1, pages=3, slots=1, lag=1, symmetry=False), build)
        assert folded.exhausted == raw.exhausted == same
        assert {found.id for found in folded.violations} == {found.id for found in raw.violations}
        if same:
            assert folded.states <= raw.states


def test_the_first_counterexample_is_a_shortest_one() -> None:
    with planted(find_mutant("MP04")):
        found = explore(Scope(requests=2, pages=2, slots=1), build).violations[0]
    assert [action.what for action in found.actions] == ["submit", "plan", "apply"]


def test_a_copy_of_a_world_goes_its_own_way() -> None:
    world = new_world(SMALL, build)
    before = state_key(world, symmetry=True)
    copy = thaw(freeze(world))
    assert state_key(copy, symmetry=True) == before
    for action in (Action("submit", (2, 2)), Action("plan")):
        move(copy, action, all_eos=False)
    assert state_key(copy, symmetry=True) != before
    assert state_key(world, symmetry=True) == before


def test_explore_prints_what_it_saw(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explore", "--requests", "1", "--pages", "2", "--slots", "1", "--json"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (end.value.code, found["exhausted"], found["violations"]) == (0, True, [])
    assert found.keys() >= {"states", "transitions", "depth"}


def test_the_plugin_fuzzes_a_named_core(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from sim.cores.paged_attention import build\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kvproof", "-p", "no:cacheprovider"]
    command += ["--kvproof-core", "mine:build", "--kvproof-examples", "3", "--rootdir", str(tmp_path), str(tmp_path)]
    env = reader_environment(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
