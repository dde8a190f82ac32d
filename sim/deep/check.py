"""`deep_check(scenario) -> DeepResult`: what only a second run can judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from invariants.catalogue import select
from invariants.findings import Findings
from invariants.violation import Violation
from sim.deep import poisoned, rebuilt, repeats, tokens
from sim.deep.bench import MAX_BASE_PLANS, Bench
from sim.deep.play import Checkpoint, play
from sim.deep.tape import Tape
from sim.deep.world import World, world_of
from sim.mutants import Mutant, find_mutant, planted
from sim.scenario import Scenario

MAX_VIOLATIONS: Final = 100


@dataclass(frozen=True, slots=True)
class Relation:
    """A statement about two runs: what the second changes, and what must be equal all the same."""

    ids: tuple[str, ...]
    changes: str
    equal: str
    judge: Callable[[Bench], None]


RELATIONS: Final = (
    Relation(
        ("K4", "K6"),
        "NaN, then a large finite value, in every free page, every page's tail and the dummy",
        "all tokens; the bits of every place that a step writes",
        poisoned.poisoned_free_pages,
    ),
    Relation(
        ("K5",),
        "NaN, then a large finite value, in the dummy page before each step",
        "all tokens",
        poisoned.poisoned_dummy_page,
    ),
    Relation(("S14",), "two forks plan; one plan is taken back", "both plans; rows planned again", rebuilt.purity),
    Relation(
        ("O4",),
        "chunk, page, batch and pool size, and the buckets that follow from them",
        "all tokens",
        tokens.other_sizes,
    ),
    Relation(
        ("O5",),
        "half of the requests left out, then with other lengths",
        "tokens of the others",
        tokens.other_neighbours,
    ),
    Relation(
        ("O6",),
        "pages handed out in another order, then slots",
        "all tokens; with other pages every plan but for their numbers",
        tokens.other_numbers,
    ),
    Relation(
        ("O7",),
        "a pool that just holds the largest request: other preemptions",
        "all tokens",
        tokens.other_preemptions,
    ),
    Relation(
        ("O8",), "a third of the requests cancelled within their lives", "tokens of the others", tokens.other_cancels
    ),
    Relation(
        ("O9",),
        "all arrivals and timed faults later by one number of nanoseconds",
        "every step's hash; every time but for the shift",
        repeats.later,
    ),
    Relation(("D1",), "two processes with different hash seeds", "every step's hash", repeats.two_processes),
    Relation(
        ("D3",),
        "planning alone, and the slow oracle",
        "every step's hash; the bits of the cache at the end",
        repeats.other_backends,
    ),
    Relation(("D4",), "auditor, event log and plan log on", "every step's hash", repeats.watched),
    Relation(
        ("D5",),
        "a fresh core told what the first was told, without simulator and backend",
        "every plan; the state each 16th plan",
        rebuilt.replayed,
    ),
)
"""All relations, in the order in which they are judged."""


@dataclass(frozen=True, slots=True)
class DeepResult:
    """What deep checks showed."""

    violations: tuple[Violation, ...]
    counters: dict[str, dict[str, int]]
    """Of each deep invariant that was on: checked, nontrivial, violated."""
    requests: int
    """How many of the scenario's requests were played."""
    runs: int
    crash: str | None = None
    """What ended the base run, so that there was nothing to compare with."""

    def to_json(self) -> dict[str, Any]:
        """How much was played, as a dict of JSON values."""
        return {"requests": self.requests, "runs": self.runs, "crash": self.crash}


def deep_check(
    scenario: Scenario,
    only: frozenset[str] | None = None,
    progress: Callable[[str], None] | None = None,
    checkpoint: Checkpoint = lambda: None,
) -> DeepResult:
    """Play the first requests of a scenario again and again, a bit different each time, and compare.

    `only`: these invariants (None: those of the scenario, or all deep ones; others are passed over). `progress` is told
    what comes next; `checkpoint` is called before every plan, and what it raises comes out. The scenario's planted bug
    is in force in every run. Raises what `run` raises where a part is not there, or a trace is wrong.
    """
    mutant = find_mutant(scenario.plant) if scenario.plant else None
    with planted(mutant):
        return judge_deep(scenario, mutant, only, progress, checkpoint)


def judge_deep(
    scenario: Scenario,
    mutant: Mutant | None,
    only: frozenset[str] | None = None,
    progress: Callable[[str], None] | None = None,
    checkpoint: Checkpoint = lambda: None,
) -> DeepResult:
    """`deep_check` where the mutant's edits are in force already."""
    if only is None and scenario.invariants.only is not None:
        only = frozenset(scenario.invariants.only)
    findings = Findings(select(only, "deep"), MAX_VIOLATIONS)
    world, base = base_of(scenario, mutant, findings.on, checkpoint)
    bench = Bench(world, base, findings, checkpoint)
    if base.crash is None:
        for relation in RELATIONS:
            if not findings.any_on(relation.ids):
                continue
            if progress is not None:
                progress(f"{', '.join(relation.ids)}: {relation.changes}")
            relation.judge(bench)
    return DeepResult(tuple(findings.violations), findings.counters(), len(world.arrivals), bench.runs, base.crash)


def base_of(
    scenario: Scenario,
    mutant: Mutant | None,
    on: frozenset[str] = frozenset(),
    checkpoint: Checkpoint = lambda: None,
) -> tuple[World, Tape]:
    """The run that the others are compared with; it looks at what `on` needs."""
    world = replace(world_of(scenario, mutant), keep_places="K6" in on, keep_states="D5" in on)
    return world, play(world, MAX_BASE_PLANS, checkpoint)
