"""Cores that do not return from a call: found like a crash, shrunk, replayed; whoever does return is left alone."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from sim.cores.checked import CheckedFactory
from sim.hang import HangError, HangWatch, Patience, can_watch
from sim.run import run
from sim.scenario import load_scenario
from sim.search.explore import explore
from sim.search.fuzz import FuzzOptions, fuzz, work
from sim.search.shrink import shrink
from sim.search.small_world import Scope
from sim.search.stateful import BrokenError, kvproof_stateful
from tests.sim.page_parts import ROOT, files_and_commands
from tests.sim.run_parts import planned_only, replayed_elsewhere

FILES, _ = files_and_commands(ROOT / "docs" / "bring-your-own-core.md")
BOUND = 0.2
SMALL = Scope(requests=2, pages=3, slots=1)

WAITS_FOR_PAGES = (
    'elif one.state == "waiting" and self.slots and need <= len(self.free):',
    'elif one.state == "waiting" and self.slots:\n'
    "                while need > len(self.free):\n                    pass",
)
WAITS_FOR_ROOM = (
    "        self.live[request.id] = one = ",
    "        while len(self.live) == 2:\n            pass\n        self.live[request.id] = one = ",
)
WAITS_FOR_THE_LAST = (
    "                if eos or one.done == one.last:",
    "                while eos and one.done < one.last:\n                    pass\n"
    "                if one.done == one.last:",
)
DEADLOCKS = (
    "        return {request: one.state for request, one in self.live.items()}",
    "        import threading\n        lock = threading.Lock()\n        lock.acquire()\n        lock.acquire()",
)
SWALLOWS = (
    "        columns, tokens = [], []",
    "        columns, tokens = [], []\n        for _ in range(3):\n            try:\n                while True:\n"
    "                    pass\n            except BaseException:\n                pass\n"
    "        while True:\n            pass",
)


@pytest.fixture
def variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Writes the page's core with one change as a module of the working folder, and names its factory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: list[str] = []

    def write(name: str, change: tuple[str, str]) -> str:
        assert FILES["my_core.py"].count(change[0]) == 1
        (tmp_path / f"{name}.py").write_text(FILES["my_core.py"].replace(*change), encoding="utf-8")
        names.append(name)
        return f"{name}:build"

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "change"), [("submit", WAITS_FOR_ROOM), ("apply", WAITS_FOR_THE_LAST), ("plan", WAITS_FOR_PAGES)]
)
def test_a_call_that_never_returns_is_found_shrunk_and_replayed_in_another_process(
    call: str, change: tuple[str, str], variant: Any, tmp_path: Path
) -> None:
    core = variant(f"hangs_in_{call}", change)
    options = FuzzOptions(seed=1, seconds=1e9, runs=100, core=core, stop="first", hang_seconds=BOUND)
    result = fuzz(options, tmp_path, lambda result: None)
    ((pin, (_, shrunk)),) = result.shrunk.items()
    assert (pin, shrunk.finding.id, shrunk.finding.cause) == (f"hang-{call}", "hang", call)
    assert f"ReservingCore.{call}() did not return within {BOUND} s (at hangs_in_{call}.py:" in shrunk.finding.message
    assert shrunk.num_requests <= 4
    assert shrunk.num_operations <= 12
    first = load_scenario(result.files[pin]).expect.first
    assert first is not None
    assert (first.id, first.cause, first.step) == ("hang", call, shrunk.finding.step)
    status, found = replayed_elsewhere(result.files[pin])
    assert (status, found["same"], found["trace_hash"]) == (0, True, shrunk.finding.trace_hash)


def test_a_search_goes_on_after_a_hang(variant: Any) -> None:
    core = variant("hangs_early", WAITS_FOR_ROOM)
    one = work(FuzzOptions(seed=1, core=core, hang_seconds=BOUND), 0, 0, 1, 9, 1e9)
    assert [finding.pin for _, finding in one.found] == ["hang-submit"]
    assert (one.done, one.refused < 8) == (9, True)


SLOW_AT_FIRST = (
    "        self.live[request.id] = one = ",
    "        import time\n        time.sleep(0.12 if request.id == 0 else 0)\n        self.live[request.id] = one = ",
)


def test_a_slow_call_is_no_hang_though_another_call_was_one(variant: Any) -> None:
    core = variant("slow", SLOW_AT_FIRST)
    known = frozenset({"hang-plan"})
    one = work(FuzzOptions(seed=1, core=core, hang_seconds=0.5), 0, 0, 1, 2, 1e9, known)
    assert (one.found, one.refused) == ((), 0)
    assert one.plans > 50


@pytest.mark.slow
def test_what_is_only_slow_is_not_kept_for_a_call_that_never_returns(variant: Any) -> None:
    both = SLOW_AT_FIRST[1].replace(
        "        import", "        while len(self.live) == 2:\n            pass\n        import"
    )
    core = variant("slow_and_hangs", (SLOW_AT_FIRST[0], both))
    requests = [{"prompt_tokens": 1, "output_tokens": 1}] * 4
    scenario = planned_only(
        core={"kind": core, "batch_size": 1, "prefill_chunk": 1},
        cache={"page_size": 1, "num_pages": 3, "max_sequence_length": 1},
        workload={"arrivals": {"kind": "script", "requests": requests}},
        invariants={"hang_seconds": 0.5},
    )
    shrunk = shrink(scenario)
    assert (shrunk.finding.pin, shrunk.num_requests) == ("hang-submit", 3)


@pytest.mark.slow
def test_a_search_in_several_processes_goes_on_after_a_hang(variant: Any, tmp_path: Path) -> None:
    core = variant("hangs_in_workers", WAITS_FOR_ROOM)
    options = FuzzOptions(seed=1, seconds=1e9, runs=12, jobs=2, core=core, hang_seconds=BOUND)
    result = fuzz(options, tmp_path, lambda result: None)
    assert set(result.shrunk) == {"hang-submit"}
    assert result.scenarios == 12
    assert result.refused < 11


def test_a_run_of_a_core_that_hangs_ends_with_a_sentence_and_says_so_again_when_it_is_replayed(
    variant: Any, kvproof: Any, tmp_path: Path
) -> None:
    core = variant("hangs_in_run", WAITS_FOR_ROOM)
    (tmp_path / "first.yaml").write_text(FILES["first.yaml"], encoding="utf-8")
    keys = (f"core.kind={core}", f"invariants.hang_seconds={BOUND}")
    flags = [word for key in keys for word in ("--set", key)]
    status, out, err = kvproof("run", "first.yaml", *flags, "--no-plots", "--out", "runs")
    assert status == 1
    assert "hung: step " in out
    assert "ReservingCore.submit() did not return within 0.2 s (at hangs_in_run.py:" in out
    assert "give it longer: --set invariants.hang_seconds=60" in out
    assert "\nHUNG: first" in out
    assert "Traceback" not in out + err
    status, out, _ = kvproof("replay", "runs/failure")
    assert status == 0
    assert "hung: step " in out
    assert "the same again" in out


def test_waiting_for_a_lock_for_ever_is_a_hang_too(variant: Any) -> None:
    core = variant("deadlocks", DEADLOCKS)
    report = run(planned_only(core__kind=core, workload__num_requests=2, invariants={"hang_seconds": BOUND}))
    assert (report.exit_code, report.summary["verdict"]) == (1, "hung")
    assert (report.summary["crash_id"], report.summary["crash_cause"]) == ("hang", "pending")


def test_a_core_that_swallows_every_exception_is_told_again_until_it_ends(variant: Any) -> None:
    core = variant("swallows", SWALLOWS)
    report = run(planned_only(core__kind=core, workload__num_requests=2, invariants={"hang_seconds": BOUND}))
    assert report.summary["crash_cause"] == "plan"


def test_an_exploration_ends_at_a_call_that_hangs_and_tells_a_shortest_way_to_it(variant: Any) -> None:
    build = import_module(variant("hangs_somewhere", WAITS_FOR_ROOM).partition(":")[0]).build
    found = explore(Scope(requests=3, pages=3, slots=1), CheckedFactory(build, "it"), hang_seconds=BOUND).violations[0]
    assert found.id == "hang"
    assert [action.what for action in found.actions] == ["submit"] * 3


@pytest.mark.slow
def test_a_state_machine_finds_a_call_that_hangs(variant: Any) -> None:
    build = import_module(variant("hangs_anywhere", WAITS_FOR_ROOM).partition(":")[0]).build
    with pytest.raises(BrokenError, match=r"submit\(\) did not return within"):
        kvproof_stateful(build, max_examples=500, steps=5, hang_seconds=BOUND)("runTest").runTest()


class Steps:
    """A core that is asked for plans again and again, each quick, or for one that is not."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self._wait = wait

    def plan(self) -> None:
        self._wait()

    submit = cancel = apply = abandon = pending = snapshot = fork = plan


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_many_quick_calls_and_slow_work_between_them_are_no_hang() -> None:
    core, looks = Steps(lambda: spin(1e-4)), 0
    with HangWatch(0.02):
        for _ in range(500):
            core.plan()
            looks += 1
        spin(0.1)
    assert looks == 500


def test_a_call_that_takes_longer_than_the_bound_is_named() -> None:
    core = Steps(lambda: spin(60.0))
    with (
        pytest.raises(HangError, match=r"Steps\.plan\(\) did not return within 0\.05 s \(at test_hangs\.py:"),
        HangWatch(0.05),
    ):
        core.plan()


def test_without_a_bound_nobody_looks() -> None:
    with HangWatch(0.0):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_alarm_of_somebody_else_is_left_alone() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with HangWatch(0.01):
            Steps(lambda: spin(0.2)).plan()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        assert signal.signal(signal.SIGALRM, before) is not signal.SIG_DFL
    assert rung == [signal.SIGALRM]


def test_the_alarm_is_given_back() -> None:
    with HangWatch(5.0):
        assert signal.getitimer(signal.ITIMER_REAL)[1] > 0
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_another_thread_goes_on_without() -> None:
    found: list[bool] = []

    def work() -> None:
        with HangWatch(0.01):
            Steps(lambda: spin(0.05)).plan()
            found.append(can_watch())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert can_watch()


def test_patience_is_shorter_once_a_hang_was_seen_and_none_stays_none() -> None:
    told = []
    for seconds in (0.0, 0.01, 0.2, 10.0):
        patience = Patience(seconds)
        patience.hung()
        patience.hung()
        told.append(patience.seconds)
    assert told == [0.0, 0.01, 0.05, 0.5]


def raising(error: str) -> tuple[str, str]:
    return "        columns, tokens = [], []", f"        raise {error}('nothing will do')"


def test_a_crash_of_another_class_is_not_the_crash_that_a_file_expects(
    variant: Any, kvproof: Any, tmp_path: Path
) -> None:
    for error in ("KeyError", "IndexError"):
        variant(error.lower(), raising(error))
    (tmp_path / "first.yaml").write_text(FILES["first.yaml"], encoding="utf-8")
    status, *_ = kvproof("shrink", "first.yaml", "--set", "core.kind=keyerror:build", "--out", "small.yaml", "-q")
    text = (tmp_path / "small.yaml").read_text()
    assert status == 0
    assert "cause: KeyError" in text
    (tmp_path / "other.yaml").write_text(text.replace("keyerror:build", "indexerror:build"))
    assert kvproof("replay", "small.yaml", "-q")[0] == 0
    status, out, _ = kvproof("replay", "other.yaml")
    assert status == 1
    assert "the recorded run violated crash (KeyError) at step 0, this one crash (IndexError) at step 0" in out
    runs = ("--no-plots", "-q", "--out")
    assert kvproof("run", "small.yaml", *runs, "one")[0] == 0
    assert kvproof("run", "other.yaml", *runs, "two")[0] == 1


def test_a_file_that_names_no_cause_takes_any_crash(variant: Any, kvproof: Any, tmp_path: Path) -> None:
    variant("keyerror", raising("KeyError"))
    (tmp_path / "first.yaml").write_text(FILES["first.yaml"], encoding="utf-8")
    kvproof("shrink", "first.yaml", "--set", "core.kind=keyerror:build", "--out", "small.yaml", "-q")
    old, count = re.subn(r"cause: KeyError,?\s*", "", (tmp_path / "small.yaml").read_text())
    assert count == 1
    (tmp_path / "old.yaml").write_text(old)
    assert kvproof("replay", "old.yaml", "-q")[0] == 0
    assert kvproof("run", "old.yaml", "--no-plots", "-q", "--out", "run")[0] == 0
