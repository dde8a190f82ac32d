"""Deep checks: an honest core passes every relation, none of them is vacuous, and each notices its bug."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from backends.protocol import Pending
from invariants.catalogue import select
from paged_attention.plan import ModelRows, StepOutcome, StepPlan
from sim.backend_wrapper import BackendWrapper
from sim.cli import main
from sim.cores import registry as core_registry
from sim.deep import RELATIONS, deep_check, world
from sim.exit_codes import ExitCode
from sim.mutants import MUTANTS, paired
from sim.mutants import registry as mutant_registry
from sim.mutants.core_wrapper import CoreWrapper
from sim.mutants.mutant import Mutant
from sim.replay import load_recorded, replay
from sim.run import run
from sim.scenario import Scenario, ScenarioError, load_scenario
from tests.sim.run_parts import planned_only, scenarios

GAUNTLET = Path("scenarios/gauntlet")
DEEP = select(None, "deep")
ONE_PROCESS = DEEP - {"D1"}


def gauntlet(name: str, plant: str | None = None) -> Scenario:
    return load_scenario(GAUNTLET / f"{name}.yaml").model_copy(update={"plant": plant})


def planted(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> str:
    monkeypatch.setitem(mutant_registry.MUTANTS, mutant.id, mutant)
    return mutant.id


def test_every_deep_invariant_has_one_relation() -> None:
    assert sorted(name for relation in RELATIONS for name in relation.ids) == sorted(DEEP)


def test_an_honest_core_passes_every_relation_and_each_of_them_had_something_to_compare() -> None:
    result = deep_check(gauntlet("deep-oracle"))
    assert result.violations == ()
    assert set(result.counters) == DEEP
    assert [name for name, count in result.counters.items() if not count["nontrivial"]] == []


QUICK = [mutant for mutant in paired.MUTANTS if mutant.driver != "deep-jax"]


def test_each_deep_invariant_has_a_bug_of_its_own() -> None:
    assert {mutant.caught_by[0] for mutant in QUICK} == DEEP


@pytest.mark.slow
@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: f"{mutant.caught_by[0]}-{mutant.id}")
def test_a_planted_bug_is_noticed_by_its_relation_with_all_others_off(mutant: Mutant) -> None:
    name = mutant.caught_by[0]
    result = deep_check(gauntlet(mutant.driver, mutant.id), only=frozenset({name}))
    assert result.crash is None
    assert {violation.id for violation in result.violations} == {name}
    first = result.violations[0]
    assert (first.expected, first.found) != ("", "")
    assert first.expected != first.found
    assert f"--set invariants.only=[{name}]" in first.message
    assert result.counters[name]["violated"] >= 1


@pytest.mark.slow
def test_on_the_jax_backend_too_an_honest_core_passes_and_a_bug_in_the_reader_is_noticed() -> None:
    result = deep_check(gauntlet("deep-jax"))
    assert result.violations == ()
    assert [name for name, count in result.counters.items() if not count["nontrivial"]] == ["O9"]  # A closed loop.
    found = deep_check(gauntlet("deep-jax", "KR02"), only=frozenset({"K4"}))
    assert {violation.id for violation in found.violations} == {"K4"}


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios())
def test_no_relation_raises_a_false_alarm(scenario: Scenario) -> None:
    result = deep_check(scenario, only=ONE_PROCESS)
    assert (result.violations, result.crash) == ((), None)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios())
def test_no_relation_raises_a_false_alarm_with_a_cache(scenario: Scenario) -> None:
    backend = scenario.backend.model_copy(update={"kind": "numpy"})
    result = deep_check(scenario.model_copy(update={"backend": backend}), only=ONE_PROCESS)
    assert (result.violations, result.crash) == ((), None)


@pytest.mark.parametrize(
    ("changes", "trivial"),
    [
        ({"backend__kind": "none"}, {"K4", "K5", "K6"}),
        ({"backend__kind": "numpy", "model": {"kind": "echo"}}, {"K4", "K5"}),
        ({"backend__kind": "none", "workload__arrivals": {"kind": "concurrent", "concurrency": 3}}, {"O9"}),
    ],
    ids=["no cache", "nobody reads", "closed loop"],
)
def test_what_cannot_fail_counts_as_trivial(changes: dict[str, Any], trivial: set[str]) -> None:
    result = deep_check(planned_only(workload__num_requests=5, **changes), only=frozenset(trivial))
    assert result.violations == ()
    assert {name for name, count in result.counters.items() if count["nontrivial"]} == set()


class Renumbering(BackendWrapper):
    """Tokens depend on the number of a row's first page."""

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        return _Changed(self.backend.execute(plan, rows), plan.table[:, 0] > 3)


class _Changed:
    def __init__(self, pending: Pending, rows: Any) -> None:
        self._pending, self._rows = pending, rows

    def result(self) -> StepOutcome:
        outcome = self._pending.result()
        return replace(outcome, token=outcome.token + (self._rows & (outcome.token > 0)))


@pytest.mark.parametrize("bug", [False, True], ids=["honest", "broken"])
def test_pages_of_another_core_are_renumbered_on_their_way_to_the_device(
    bug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {**core_registry.BUILT_IN, "foreign": core_registry.BUILT_IN["paged_attention"]}
    monkeypatch.setattr(core_registry, "core_names", lambda: names)
    scenario = gauntlet("deep-oracle")
    if bug:
        name = planted(monkeypatch, Mutant("kx-id", "Reads page numbers.", ("O6",), "deep", backend=Renumbering))
        scenario = scenario.model_copy(update={"plant": name})
    foreign = scenario.model_copy(update={"core": scenario.core.model_copy(update={"kind": "foreign"})})
    result = deep_check(foreign, only=frozenset({"O6"}))
    assert bool(result.violations) is bug
    assert result.counters["O6"]["nontrivial"] > 0


class BreaksUnderPressure(CoreWrapper):
    """Knows nothing of preemption."""

    def plan(self) -> StepPlan | None:
        plan = super().plan()
        if plan is not None and any(effect.kind == "preempted" for effect in plan.effects):
            raise KeyError("preempted")
        return plan


def test_a_core_that_breaks_in_the_second_run_alone_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    name = planted(monkeypatch, Mutant("kx-raise", "Raises.", ("O7",), "deep", core=BreaksUnderPressure))
    scenario = planned_only(plant=name, workload__num_requests=12, workload__arrivals__request_rate=1e6)
    result = deep_check(scenario, only=frozenset({"O7"}))
    assert result.crash is None
    assert result.violations[0].id == "O7"
    assert "raised KeyError: 'preempted'" in result.violations[0].found


class NeverPlans(CoreWrapper):
    """Raises at once."""

    def plan(self) -> StepPlan | None:
        raise RuntimeError("no plan today")


def test_where_the_base_run_breaks_nothing_is_compared_and_the_result_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    name = planted(monkeypatch, Mutant("kx-first", "Raises at once.", ("O5",), "deep", core=NeverPlans))
    result = deep_check(planned_only(plant=name, workload__num_requests=3), only=frozenset({"O5", "D4"}))
    assert result.violations == ()
    assert "no plan today" in str(result.crash)


def test_so_many_requests_are_played_and_the_result_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "MAX_REQUESTS", 6)
    assert deep_check(planned_only(workload__num_requests=9), only=frozenset({"D5"})).requests == 6


def test_long_requests_are_played_up_to_a_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(world, "MAX_TOKENS", 1)
    result = deep_check(planned_only(workload__num_requests=30), only=frozenset({"D5"}))
    assert result.requests == world.MIN_REQUESTS


def test_with_deep_on_a_run_carries_the_deep_findings_and_replays_them(tmp_path: Path) -> None:
    scenario = planned_only(
        workload__num_requests=20,
        workload__arrivals__request_rate=1e6,
        plant="KR12",
        invariants={"deep": True, "only": ("O9", "P1")},
    )
    report = run(scenario, out=tmp_path)
    assert report.exit_code == ExitCode.BROKE
    assert set(report.summary["invariants"]) == {"O9", "P1"}
    assert {violation["id"] for violation in report.summary["violations"]} == {"O9"}
    assert report.summary["deep"]["requests"] == 20
    assert replay(load_recorded(tmp_path)).differences == ()


def test_the_flag_turns_deep_checks_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(GAUNTLET / "deep-host.yaml"), "--deep", "--set", "invariants.only=[D5]"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json", "--no-plots", "--out", str(tmp_path / "run")])
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert summary["invariants"]["D5"]["nontrivial"] > 0


@pytest.mark.parametrize("setting", ["invariants.only=[K4]", "expect.violated=[K4]"])
def test_a_deep_invariant_without_deep_checks_is_a_contradiction(setting: str) -> None:
    with pytest.raises(ScenarioError, match=r"K4 takes more runs than one; set invariants\.deep: true"):
        load_scenario(GAUNTLET / "host-starved.yaml", [setting])


def test_the_planted_bugs_of_relations_are_in_the_catalogue_of_bugs() -> None:
    assert {mutant.id for mutant in paired.MUTANTS} <= set(MUTANTS)
