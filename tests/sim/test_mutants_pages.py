"""The planted bugs of pages, tables and the verifier are noticed; the legal variants are not."""

from __future__ import annotations

import functools

import pytest

from sim.mutants import MUTANTS, Mutant, benign, own, pages, tables, verifier
from sim.mutants.contracts import CONTRACTS
from sim.run import run
from sim.scenario import Scenario, load_scenario
from sim.selftest.drivers import GAUNTLET, drive, drivers_of, judged, scenario_of

OURS: tuple[Mutant, ...] = (
    *pages.MUTANTS,
    *tables.MUTANTS,
    *verifier.MUTANTS,
    *(mutant for mutant in own.MUTANTS if mutant.id.startswith("KP")),
    *benign.MUTANTS,
)
HANDFUL = ("MP02", "MP27", "MT02", "MT13", "MD09", "MD12", "KP01", "KP03", "KP09")


def test_a_bug_has_edits_unless_it_waits_for_a_feature() -> None:
    assert all(bool(mutant.edits) == mutant.applicable for mutant in OURS)


def test_ids_are_unique_and_registered() -> None:
    ids = [mutant.id for mutant in OURS]
    assert len(ids) == len(set(ids))
    assert all(MUTANTS[mutant.id] is mutant for mutant in OURS)


@pytest.mark.slow
@pytest.mark.parametrize("name", HANDFUL)
def test_a_bug_is_noticed_in_its_first_driver_by_the_statement_that_it_breaks(name: str) -> None:
    mutant = MUTANTS[name]
    seen = drive(mutant, drivers_of(mutant)[0])
    assert mutant.caught_by[0] in seen.fired


SHORT = {name: [f"workload.num_requests={count}"] for name, count in (("host-starved", 14), ("host-lag-one", 12))}


@functools.cache
def short(name: str) -> Scenario:
    """The first requests of a driver."""
    return load_scenario(GAUNTLET / f"{name}.yaml", SHORT[name])


@functools.cache
def usual_course(name: str) -> str:
    """The trace hash of the unchanged code."""
    return run(short(name)).trace_hash


@pytest.mark.slow
@pytest.mark.parametrize("mutant", benign.MUTANTS, ids=lambda mutant: mutant.id)
def test_a_legal_variant_raises_no_alarm_and_is_a_variant(mutant: Mutant) -> None:
    others = 0
    for name in SHORT:
        report = run(judged(short(name), mutant.id))
        assert report.violations == ()
        assert report.summary["crash"] is None
        others += report.trace_hash != usual_course(name)
    # One is seen on the device alone, the other only where waiting would be allowed.
    assert others or mutant.where == "device" or mutant.id == "benign-no-wait"


@pytest.mark.parametrize("name", ["streams", "faults", "replays", "shrinks"])
def test_the_unchanged_simulator_keeps_its_contracts(name: str) -> None:
    assert CONTRACTS[name]() == []


@pytest.mark.parametrize("name", ["MD05", "MD07", "MD15", "MD16"])
def test_a_bug_of_the_simulator_breaks_its_contract(name: str) -> None:
    assert drive(MUTANTS[name], MUTANTS[name].driver).complaint


def test_a_fenced_page_in_the_free_list_is_a_breach_before_anybody_is_given_it() -> None:
    report = run(judged(scenario_of("host-lag-two"), "MP27", frozenset({"P11"})))
    assert [violation.id for violation in report.violations] == ["P11"]
    assert "can be handed out" in report.violations[0].message
