"""The fuzzer: draws scenario after scenario, probes each, and shrinks what breaks.

Scenario k of seed s is the same everywhere, so jobs and shards only share the numbers out: job j of J in shard I of N
takes every (J * N)-th one. A bug is told by the id of its first violation, a crash by the class of what was raised, a
hang by the call that did not return; each is shrunk once.
"""

from __future__ import annotations

import atexit
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from sim.build import SetupError
from sim.hang import Patience
from sim.host_devices import compile_quickly
from sim.mutants import CANARY, find_mutant, planted
from sim.part_calls import HANG
from sim.scenario import Scenario
from sim.search.failure import write_failure_file
from sim.search.probe import Finding, probe
from sim.search.shrink import Shrunk, shrink
from sim.search.swarm import draw
from sim.sometimes import SOMETIMES
from sim.workers import workers

CANARY_WITHIN: Final = 50
"""Scenarios in which the canary must be found."""
SLICE_SECONDS: Final = 2.0
"""How long a job works before it tells how far it is."""
HANG_SECONDS: Final = 2.0
"""The usual bound on a call of the core: in worlds as small as those of the search it takes microseconds."""


@dataclass(frozen=True, slots=True)
class FuzzOptions:
    """What to search, and for how long."""

    seed: int = 0
    seconds: float = 60.0
    runs: int | None = None
    """Scenarios in all; None: as many as `seconds` allow."""
    jobs: int = 1
    shard: tuple[int, int] = (1, 1)
    """I of N, counted from 1."""
    backend: str = "none"
    plant: str | None = None
    core: str = "paged_attention"
    first: int = 0
    """Scenarios of this shard that were searched before."""
    stop: Literal["first", "never"] = "never"
    """Whether the first scenario that breaks ends the search."""
    hang_seconds: float = HANG_SECONDS
    """A call of the core that takes longer hangs; 0: none does."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What one job did in one turn."""

    job: int
    done: int
    """Scenarios searched."""
    plans: int
    cpu_seconds: float
    found: tuple[tuple[int, Finding], ...]
    sometimes: Counter[str]
    refused: int = 0
    """Scenarios whose sizes the core did not take."""
    refusal: str = ""
    """Why it did not, the last time."""


@dataclass(slots=True)
class FuzzResult:
    """What the search showed so far."""

    options: FuzzOptions
    canary_caught: bool = True
    interrupted: bool = False
    """A Ctrl-C ended it."""
    done: Counter[int] = field(default_factory=Counter[int])
    """Scenarios searched by each job."""
    steps: int = 0
    cpu_seconds: float = 0.0
    shrunk: dict[str, tuple[int, Shrunk]] = field(default_factory=dict[str, tuple[int, Shrunk]])
    """What broke (`Finding.pin`) to the scenario's number and what it was shrunk to."""
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Wall time from the start of the search until it was known; shrinking what was found before counts."""
    sometimes: Counter[str] = field(default_factory=Counter[str])
    files: dict[str, Path] = field(default_factory=dict[str, Path])
    refused: int = 0
    """Scenarios whose sizes the core did not take."""
    refusal: str = ""
    """Why it did not, the last time."""

    @property
    def hung(self) -> frozenset[str]:
        """The pins of calls that were seen not to return."""
        return frozenset(pin for pin, (_, shrunk) in self.shrunk.items() if shrunk.finding.id == HANG)

    @property
    def scenarios(self) -> int:
        """Scenarios searched."""
        return self.done.total()

    @property
    def searched(self) -> int:
        """How many scenarios of the shard, counted from its first, have been searched without a gap."""
        jobs = self.options.jobs
        return min((_before(self.options, job) + self.done[job]) * jobs + job for job in range(jobs))

    def to_json(self, spin_seconds: float) -> dict[str, Any]:
        """The result as a dict of JSON values."""
        rate = self.steps / self.cpu_seconds if self.cpu_seconds else 0.0
        return {
            "seed": self.options.seed,
            "shard": "/".join(map(str, self.options.shard)),
            "scenarios": self.scenarios,
            "searched": self.searched,
            "interrupted": self.interrupted,
            "refused": self.refused,
            "refusal": self.refusal,
            "steps": self.steps,
            "steps_per_cpu_second": round(rate, 1),
            "steps_per_spin": round(rate * spin_seconds, 1),
            "spin_seconds": round(spin_seconds, 4),
            "canary": {"id": CANARY, "caught": self.canary_caught},
            "violations": [
                {
                    "id": shrunk.finding.id,
                    "cause": shrunk.finding.cause,
                    "file": str(self.files[name]) if name in self.files else None,
                    "scenario": number,
                    "seconds": round(self.seconds[name], 3),
                    "requests": shrunk.num_requests,
                    "operations": shrunk.num_operations,
                    "step": shrunk.finding.step,
                    "trace_hash": shrunk.finding.trace_hash,
                    "message": shrunk.finding.message,
                }
                for name, (number, shrunk) in sorted(self.shrunk.items())
            ],
            "sometimes": {name: self.sometimes[name] for name in SOMETIMES},
        }


def canary_is_caught(seed: int) -> bool:
    """Whether the search notices the canary within its first scenarios: if not, its silence means nothing."""
    scenarios = (draw(seed, number) for number in range(CANARY_WITHIN))
    return any(probe(scenario.model_copy(update={"plant": CANARY})).id for scenario in scenarios)


def fuzz(options: FuzzOptions, out: Path, progress: Callable[[FuzzResult], None]) -> FuzzResult:
    """Search until time or scenarios run out; minimal scenarios go to `out` as they are found.

    A Ctrl-C ends the search with what it has shown so far; a second one raises KeyboardInterrupt.
    """
    if options.backend == "jax":
        compile_quickly()
    result = FuzzResult(options, canary_caught=canary_is_caught(options.seed))
    if not result.canary_caught:
        return result
    with planted(find_mutant(options.plant) if options.plant else None):
        try:
            _search(options, out, result, progress)
        except KeyboardInterrupt:
            result.interrupted = True
    return result


def _search(options: FuzzOptions, out: Path, result: FuzzResult, progress: Callable[[FuzzResult], None]) -> None:
    start = time.monotonic()
    for one in _slices(options, result, start + options.seconds):
        result.steps += one.plans
        result.cpu_seconds += one.cpu_seconds
        result.sometimes += one.sometimes
        result.refused += one.refused
        result.refusal = one.refusal or result.refusal
        for number, finding in one.found:
            if (pin := finding.pin) not in result.shrunk:
                result.seconds[pin] = time.monotonic() - start
                shrunk = shrink(_scenario(options, number), is_planted=True)
                result.shrunk[pin] = number, shrunk
                result.files[pin] = out / f"{pin}.yaml"
                write_failure_file(result.files[pin], shrunk)
        # Last: a turn whose findings a Ctrl-C keeps from being shrunk is searched again on --resume.
        result.done[one.job] += one.done
        progress(result)
        if result.shrunk and options.stop == "first":
            return


def _scenario(options: FuzzOptions, number: int) -> Scenario:
    drawn = draw(options.seed, number, backend=options.backend)
    core = drawn.core.model_copy(update={"kind": options.core})
    invariants = drawn.invariants.model_copy(update={"hang_seconds": options.hang_seconds})
    return drawn.model_copy(update={"plant": options.plant, "core": core, "invariants": invariants})


def _slices(options: FuzzOptions, result: FuzzResult, deadline: float) -> Iterator[Slice]:
    """Turns of all jobs, as they end; `result` is what they have shown so far."""
    nth, of = options.shard
    stride = of * options.jobs
    cursors = [nth - 1 + job * of + _before(options, job) * stride for job in range(options.jobs)]
    left = [_share(options, job) for job in range(options.jobs)]
    if options.jobs == 1:
        while time.monotonic() < deadline and left[0] != 0:
            seconds = min(SLICE_SECONDS, deadline - time.monotonic())
            one = work(options, 0, cursors[0], stride, left[0], seconds, hung=result.hung)
            cursors[0], left[0] = cursors[0] + one.done * stride, _less(left[0], one.done)
            yield one
        return
    with workers(options.jobs, _prepare, options.plant) as pool:
        running: dict[Future[Slice], int] = {}
        idle = set(range(options.jobs))
        while True:
            for job in sorted(idle):
                if time.monotonic() < deadline and left[job] != 0:
                    turn = (options, job, cursors[job], stride, left[job], SLICE_SECONDS, result.hung)
                    running[pool.submit(work, *turn)] = job
            idle.clear()
            if not running:
                return
            for future in wait(running, return_when="FIRST_COMPLETED").done:
                job, one = running.pop(future), future.result()
                cursors[job], left[job] = cursors[job] + one.done * stride, _less(left[job], one.done)
                idle.add(job)
                yield one


def _prepare(plant: str | None) -> None:
    """Runs in each worker before its first turn."""
    # What the parent ignores, its children must: Ctrl-C is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if plant is not None:
        until_exit = ExitStack()
        until_exit.enter_context(planted(find_mutant(plant)))
        atexit.register(until_exit.close)


def _before(options: FuzzOptions, job: int) -> int:
    """How many scenarios this job has searched before, where `first` were searched by jobs in turn."""
    return (options.first + options.jobs - 1 - job) // options.jobs


def _share(options: FuzzOptions, job: int) -> int | None:
    if options.runs is None:
        return None
    return (options.runs + options.jobs - 1 - job) // options.jobs


def _less(left: int | None, done: int) -> int | None:
    return None if left is None else left - done


def work(
    options: FuzzOptions,
    job: int,
    cursor: int,
    stride: int,
    limit: int | None,
    seconds: float,
    hung: frozenset[str] = frozenset(),
) -> Slice:
    """One job's turn: scenarios cursor, cursor + stride, ... until time or limit; the bug is planted already.

    `hung` are the pins of hangs that were seen before.
    """
    end, start = time.monotonic() + seconds, time.process_time()
    done = plans = 0
    found: dict[str, tuple[int, Finding]] = {}
    sometimes: Counter[str] = Counter()
    refused, refusal = 0, ""
    while (limit is None or done < limit) and (done == 0 or time.monotonic() < end):
        number = cursor + done * stride
        done += 1
        try:
            finding = _probe(_scenario(options, number), hung, sometimes)
        except SetupError as error:
            refused, refusal = refused + 1, str(error)
            continue
        plans += finding.plans
        if finding.id:
            found.setdefault(finding.pin, (number, finding))
            if finding.id == HANG:
                hung |= {finding.pin}
            if options.stop == "first":
                break
    return Slice(job, done, plans, time.process_time() - start, tuple(found.values()), sometimes, refused, refusal)


def _probe(scenario: Scenario, hung: frozenset[str], sometimes: Counter[str]) -> Finding:
    """What the scenario shows; where some `hung` before, more will, and it gets a shorter bound for the same calls."""
    patience = Patience(scenario.invariants.hang_seconds)
    if hung:
        patience.hung()
    finding = probe(scenario, sometimes=sometimes, is_planted=True, hang_seconds=patience.seconds)
    if hung and finding.id == HANG and finding.pin not in hung:
        return probe(scenario, is_planted=True)
    return finding
