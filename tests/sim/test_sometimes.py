"""Corner cases against a plain recount of the plan log, and what no run of a set ever tried."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from invariants.catalogue import ACTIVE, CATALOGUE
from sim.mutants import find_mutant, planted
from sim.run import run
from sim.scenario import Scenario, load_scenario
from sim.sometimes import SOMETIMES
from sim.vacuity import vacuous
from tests.sim.run_parts import logged, planned_only, scenarios

GAUNTLET = Path("scenarios/gauntlet")
ALWAYS = {name for name in ACTIVE if CATALOGUE[name].mode == "always"}
NEEDS_A_CACHE = {name for name in ALWAYS if CATALOGUE[name].family == "contents"} | {"T5", "O2"}


class Recount:
    """Most of the corner cases, counted anew from what the core said it did."""

    def __init__(self, scenario: Scenario) -> None:
        self.hits: Counter[str] = Counter()
        self.scenario, self.size = scenario, scenario.cache.page_size
        self.free = self.last_page = scenario.cache.num_pages - 1
        self.in_flight: list[dict[str, Any]] = []
        self.decodes: set[int] = set()
        self.victims: Counter[int] = Counter()
        self.submitted_ns = -1

    def line(self, line: dict[str, Any]) -> None:
        if "submit" in line:
            self.submit(line)
        if "outcome" in line:
            self.in_flight.pop(0)
        if "abandon" in line:
            self.hits["failed-with-prefill"] += self.in_flight.pop()["slot"][0] < 0
        effects = line.get("effects", ())
        self.hits["cancel-gone"] += "cancel" in line and not effects
        for effect in effects:
            self.effect(*effect)
        kinds = Counter(effect[0] for effect in effects)
        self.hits["two-end-at-once"] += kinds["ended"] > 1
        if "plan" in line:
            self.hits["exact-fit"] += kinds["allocated"] > 0 and self.free == 0
            self.hits["two-victims"] += kinds["preempted"] > 1
            self.plan(line["plan"])

    def submit(self, line: dict[str, Any]) -> None:
        hits, what = self.hits, line["submit"]
        hits["arrivals-at-one-instant"] += line["time_ns"] == self.submitted_ns
        self.submitted_ns = line["time_ns"]
        hits["request-refused"] += "refused" in line
        if "refused" not in line:
            prompt = len(what["prompt"]) if "prompt" in what else what["prompt_tokens"]
            hits["prompt-of-one-token"] += prompt == 1
            hits["prompt-fills-page"] += prompt % self.size == 0
            hits["prompt-short-of-page"] += prompt % self.size == self.size - 1
            hits["prompt-past-page"] += prompt % self.size == 1

    def effect(
        self, kind: str, request: int, admission: int, slot: int = -1, first: int = 0, pages: Any = (), reason: str = ""
    ) -> None:
        hits, running = self.hits, any(request in plan["request"] for plan in self.in_flight)
        if kind == "allocated":
            self.free -= len(pages)
            hits["last-page"] += self.last_page in pages
            hits["decode-crosses-page"] += first > 0 and request in self.decodes
        elif kind == "joined":
            self.decodes.add(request)
        elif kind == "ended":
            hits["end-by-" + reason.replace("_", "-")] += 1
            hits["eos-late"] += reason == "eos" and running
        elif kind == "preempted":
            self.victims[request] += 1
            hits["preempt-decoding"] += slot >= 0
            hits["preempted-twice"] += self.victims[request] == 2
        elif kind == "unfenced" or (kind == "freed" and not running):
            self.free += len(pages)
        if kind in {"ended", "cancelled", "preempted"}:
            self.decodes.discard(request)

    def plan(self, plan: dict[str, Any]) -> None:
        hits, slots = self.hits, plan["slot"]
        hits["mixed-step"] += min(slots) < 0 <= max(slots)
        hits["prefill-alone"] += max(slots) < 0
        hits["decodes-alone"] += min(slots) >= 0
        for row in (row for row, slot in enumerate(slots) if slot < 0):
            start, samples = plan["start"][row], bool(plan["samples"][row])
            full = plan["count"][row] == self.scenario.core.prefill_chunk
            hits["chunk-inside-page"] += start % self.size > 0
            hits["chunk-fills-exactly"] += samples and full
            hits["chunk-short"] += samples and not full and start > 0
        self.in_flight.append(plan)


@settings(max_examples=40, deadline=None)
@given(scenarios())
def test_corner_cases_are_those_of_a_plain_recount(scenario: Scenario) -> None:
    report, lines = logged(scenario)
    recount = Recount(scenario)
    for line in lines[1:]:
        recount.line(line)
    found = report.summary["sometimes"]
    assert set(found) == set(SOMETIMES)
    assert {name: found[name] for name in recount.hits} == dict(recount.hits)


def test_without_an_auditor_nothing_is_counted() -> None:
    assert run(planned_only(workload__num_requests=3), audit=False).summary["sometimes"] == {}


def gauntlet() -> list[dict[str, Any]]:
    return [run(load_scenario(path)).summary for path in sorted(GAUNTLET.glob("host-*.yaml"))]


def test_the_host_gauntlet_reaches_every_corner_and_every_statement_about_the_host() -> None:
    assert set(vacuous(gauntlet())) == NEEDS_A_CACHE


def test_md13_a_check_whose_guard_is_never_true_is_vacuous() -> None:
    starved = load_scenario(GAUNTLET / "host-starved.yaml")
    with planted(find_mutant("MD13")):
        summary = run(starved).summary
    assert {"P9"} == set(vacuous([summary])) - set(vacuous([run(starved).summary]))


def test_a_corner_that_one_run_of_several_reaches_is_reached() -> None:
    nothing = {"invariants": {}, "sometimes": {}}
    assert set(vacuous([nothing])) == ALWAYS | set(SOMETIMES)
    one = {"invariants": {"P1": {"checked": 2, "nontrivial": 1, "violated": 0}}, "sometimes": {"exact-fit": 1}}
    missing = set(vacuous([nothing, one, nothing]))
    assert not missing & {"P1", "exact-fit"}
    idle = {"invariants": {"O4": {"checked": 1, "nontrivial": 0, "violated": 0}}, "sometimes": {}}
    assert "O4" in vacuous([one, idle])


@pytest.mark.slow
def test_the_library_leaves_nothing_untried() -> None:
    from sim.selftest.honest import honest_names, run_honest

    assert vacuous([run_honest(name).summary for name in honest_names(host_only=False)]) == ()
