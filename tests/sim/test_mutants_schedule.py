"""The planted bugs of the scheduler and of the rules: they fit today's code, and the judge notices them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.mutants import MUTANTS, Mutant
from sim.mutants.api_contracts import API_CONTRACTS
from sim.mutants.own_schedule import MUTANTS as OWN
from sim.mutants.registry import planted
from sim.mutants.schedule import MUTANTS as SCHEDULE
from sim.mutants.seed import MUTANTS as RULES
from sim.run import run
from sim.scenario import load_scenario

GAUNTLET = Path("scenarios/gauntlet")
OURS: tuple[Mutant, ...] = (*SCHEDULE, *RULES, *OWN)
BY_CONTRACT = tuple(mutant for mutant in OURS if mutant.driver.startswith("contract:"))
QUICK = ("MS01", "MS05", "MS12", "MS16", "SEED-02b", "SEED-14b", "SEED-28", "SEED-30", "KS13")


def test_ids_are_unique_and_registered() -> None:
    ids = [mutant.id for mutant in OURS]
    assert len(set(ids)) == len(ids)
    assert all(MUTANTS[mutant.id] is mutant for mutant in OURS)


def test_every_rule_of_the_interface_has_a_mutant() -> None:
    assert {mutant.id[:7] for mutant in RULES} == {f"SEED-{number:02}" for number in range(1, 33)}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_crowded_batch_shows_it_to_the_judge(name: str) -> None:
    report = run(load_scenario(GAUNTLET / "host-crowded.yaml", [f"plant={name}"]))
    assert report.violations
    assert {violation.id for violation in report.violations} & set(MUTANTS[name].caught_by)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["host-crowded", "host-handover", "host-refused"])
def test_the_unmodified_code_raises_no_alarm(driver: str) -> None:
    assert not run(load_scenario(GAUNTLET / f"{driver}.yaml")).violations


@pytest.mark.parametrize("name", sorted(API_CONTRACTS))
def test_the_unmodified_code_keeps_the_contract(name: str) -> None:
    assert API_CONTRACTS[name]() == []


@pytest.mark.parametrize("mutant", BY_CONTRACT, ids=lambda mutant: mutant.id)
def test_a_broken_rule_breaks_its_contract(mutant: Mutant) -> None:
    with planted(mutant):
        try:
            broken = API_CONTRACTS[mutant.driver.removeprefix("contract:")]()
        except Exception as error:
            broken = [str(error)]
    assert broken
