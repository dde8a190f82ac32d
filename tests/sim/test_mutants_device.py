"""The planted bugs of cache writes, model input and output: they fit today's code, and the judge notices them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.mutants import MUTANTS, Mutant
from sim.mutants.layouts import MUTANTS as LAYOUTS
from sim.mutants.model_io import MUTANTS as MODEL_IO
from sim.mutants.own_device import MUTANTS as OWN
from sim.mutants.writes import MUTANTS as WRITES
from sim.run import Report, run
from sim.scenario import load_scenario

GAUNTLET = Path("scenarios/gauntlet")
OURS: tuple[Mutant, ...] = WRITES + LAYOUTS + MODEL_IO + OWN
SHORT = ("workload.num_requests=4", "expect.preemptions=0", "cache.layers=1", "model.lanes=1")


def drive(*overrides: str) -> Report:
    """The driver of odd sizes and few pages, cut short."""
    return run(load_scenario(GAUNTLET / "device-starved.yaml", (*SHORT, *overrides)))


def test_ids_are_unique_registered_and_name_a_driver_that_is_there() -> None:
    ids = [mutant.id for mutant in OURS]
    assert len(set(ids)) == len(ids)
    assert all(MUTANTS[mutant.id] is mutant for mutant in OURS)
    drivers = {mutant.driver for mutant in OURS if mutant.driver}
    assert not {name for name in drivers if not (GAUNTLET / f"{name}.yaml").is_file()}


def noticed(name: str) -> bool:
    """Whether a planted bug is noticed, and first of all by whom it should be."""
    report = drive(f"plant={name}")
    return bool(report.violations) and report.violations[0].id in MUTANTS[name].caught_by


def test_the_judge_notices_a_wrong_slot_of_the_device_batch() -> None:
    assert noticed("KK16")


@pytest.mark.slow
def test_after_a_planted_bug_the_same_process_compiles_the_unmodified_code_again() -> None:
    before = drive()
    assert noticed("MK03")
    after = drive()
    assert not before.violations
    assert not after.violations
    assert after.summary["cache_hash"] == before.summary["cache_hash"]
    assert after.trace_hash == before.trace_hash
