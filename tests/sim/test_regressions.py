"""The corpus: every bug of our own that was ever found, as the smallest scenario that showed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sim.mutants.edit import Edit, applied
from sim.run import run
from sim.scenario import load_scenario
from sim.search.probe import probe

FOLDER = Path("scenarios/regressions")
CORPUS = sorted(FOLDER.glob("*.yaml"))
PROGRAM = """
import json, sys
from pathlib import Path
from sim.run import run
from sim.scenario import load_scenario
for path in map(Path, sys.argv[1:]):
    for _ in range(2):
        report = run(load_scenario(path))
        first = report.violations[0] if report.violations else None
        shown = (first.id, first.step) if first else None
        print(json.dumps([path.stem, int(report.exit_code), report.trace_hash, shown, report.summary["verdict"]]))
"""


def run_all(hash_seed: int) -> list[Any]:
    """What every file of the corpus shows, twice, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, CORPUS)],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_regression_shows_what_it_expects_four_times_in_two_processes() -> None:
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(run_all, (1, 2))
    assert one == two
    assert one[::2] == one[1::2]
    assert [(name, verdict) for name, code, _, _, verdict in one[::2] if code] == []
    assert [name for name, *_ in one[::2]] == [path.stem for path in CORPUS]


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_every_regression_says_what_it_is_for_and_what_must_happen(path: Path) -> None:
    expect = load_scenario(path).expect
    assert path.read_text().startswith("# ")
    assert expect.violations is not None or expect.violated or expect.first is not None


def test_the_judge_raised_where_its_ledger_took_an_overlong_prompt_at_its_word() -> None:
    scenario = load_scenario(FOLDER / "judge-outlives-an-overlong-prompt.yaml")
    believed = Edit("invariants.ledger:Ledger.submit", "max(1, min(", "max(-9, min(")
    with applied((believed,)), pytest.raises(ValueError, match="broadcast"):
        run(scenario)


@pytest.mark.parametrize(
    ("name", "edit", "shown"),
    [
        (
            "failed-step-counts-as-no-wait",
            Edit(
                "invariants.schedule:ScheduleJudge.abandoned",
                "self.decode_wait, self.prefill_wait = self._waits_before",
                "pass",
            ),
            "S12",
        ),
    ],
)
def test_a_bug_that_comes_back_is_shown_by_its_regression(name: str, edit: Edit, shown: str) -> None:
    scenario = load_scenario(FOLDER / f"{name}.yaml")
    with applied((edit,)):
        assert probe(scenario).id == shown
