"""The planted bugs of the scheduler and of the rules: they fit today's code, and the judge notices them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.mutants import MUTANTS, Mutant
from sim.mutants.edit import applied
from sim.mutants.schedule import MUTANTS as SCHEDULE
from sim.run import run
from sim.scenario import load_scenario

GAUNTLET = Path("scenarios/gauntlet")
OURS: tuple[Mutant, ...] = SCHEDULE
QUICK = ("MS01", "MS03", "MS05", "MS10", "MS12", "MS16", "MS20", "MS26", "MS31")


@pytest.mark.parametrize("mutant", OURS, ids=lambda mutant: mutant.id)
def test_every_edit_fits_the_code_as_it_is(mutant: Mutant) -> None:
    with applied(mutant.edits):
        pass


def test_ids_are_unique_and_registered() -> None:
    ids = [mutant.id for mutant in OURS]
    assert len(set(ids)) == len(ids)
    assert all(MUTANTS[mutant.id] is mutant for mutant in OURS)


@pytest.mark.parametrize("name", QUICK)
def test_a_crowded_batch_shows_it_to_the_judge(name: str) -> None:
    report = run(load_scenario(GAUNTLET / "host-crowded.yaml", [f"plant={name}"]))
    assert report.violations
    assert report.violations[0].id in MUTANTS[name].caught_by


@pytest.mark.parametrize("driver", ["host-crowded", "host-refused"])
def test_the_unmodified_code_raises_no_alarm(driver: str) -> None:
    assert not run(load_scenario(GAUNTLET / f"{driver}.yaml")).violations
