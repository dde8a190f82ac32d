"""Cores that are not ours: what they refuse, declare and hand over is taken at its word, and told in sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_attention.plan import CoreSnapshot
from sim.cli import main
from sim.cores.checked import CheckedFactory, CoreFormError
from sim.exit_codes import ExitCode
from sim.run import run
from sim.search.explore import explore
from sim.search.fuzz import FuzzOptions, work
from sim.search.small_world import Scope
from sim.search.stateful import BrokenError, kvproof_stateful
from tests.sim.page_parts import ROOT, files_and_commands
from tests.sim.run_parts import planned_only

FILES, _ = files_and_commands(ROOT / "docs" / "bring-your-own-core.md")
SMALL = Scope(requests=2, pages=3, slots=1)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the page's core, in the working folder."""
    (tmp_path / "my_core.py").write_text(FILES["my_core.py"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield import_module("my_core")
    sys.modules.pop("my_core", None)


def crash_of(mine: Any, method: str, change: Callable[[Any, Any], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a run says once the core's method answers `change(core, what it answered)`."""
    honest = getattr(mine.ReservingCore, method)
    monkeypatch.setattr(mine.ReservingCore, method, lambda self, *args: change(self, honest(self, *args)))
    report = run(planned_only(core__kind="my_core:build", workload__num_requests=3, invariants={"full_every": 1}))
    assert report.exit_code == ExitCode.BROKE
    return str(report.summary["crash"])


def of_plan(**changes: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda core, plan: plan and replace(plan, **{key: f(getattr(plan, key)) for key, f in changes.items()})


def of_snapshot(**values: Any) -> Callable[[Any, Any], Any]:
    return lambda core, snapshot: replace(snapshot, **values)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("plan", lambda core, plan: {"rows": 3}, "plan() returned a dict; expected a StepPlan, or None"),
        ("plan", of_plan(start=lambda a: a.astype(np.int64)), "start is an array of int64"),
        ("plan", of_plan(count=lambda a: a.tolist()), "count is a list; expected a one-dimensional NumPy array of"),
        ("plan", of_plan(slot=lambda a: a[:-1]), "slot 0, start 1"),
        ("plan", of_plan(tokens=lambda a: a[:-1]), "while count adds up to"),
        ("plan", of_plan(table=lambda a: a[:, :0]), "while the table has 0 columns"),
        ("plan", of_plan(step=lambda a: 0), "returned step 0 after step 0; expected a plain int that grows"),
        ("plan", of_plan(effects=list), "plan(): the effects are a list; expected a tuple of Effect"),
        ("plan", of_plan(effects=lambda e: ("joined",)), "'joined' among the effects; expected an Effect"),
        ("plan", of_plan(effects=lambda e: tuple(x._replace(kind="fred") for x in e)), "(did you mean 'freed'?)"),
        ("plan", of_plan(effects=lambda e: tuple(x._replace(slot=np.int32(1)) for x in e)), "slot np.int32(1)"),
        (
            "plan",
            of_plan(effects=lambda e: tuple(x._replace(pages=[1]) for x in e)),
            "with pages [1]; expected a tuple",
        ),
        ("apply", lambda core, effects: None, "apply(): the effects are None (is a return missing?)"),
        ("pending", lambda core, pending: [], "pending() returned a list; expected a mapping"),
        ("snapshot", lambda core, snapshot: {}, "snapshot() returned a dict; expected a CoreSnapshot"),
        ("snapshot", lambda core, snapshot: CoreSnapshot(free=snapshot.free), "TypeError"),
        ("snapshot", of_snapshot(queues={"waitng": np.zeros(0, np.int32)}), "(did you mean 'waiting'?)"),
        ("snapshot", of_snapshot(queues={"waiting": [1]}), "queues['waiting'] is a list"),
        ("snapshot", of_snapshot(queues=None), "queues is None (is a return missing?); expected a mapping"),
        ("snapshot", of_snapshot(pages={3: np.zeros(0, np.int32)}), "key 3; expected (request, admission)"),
        ("snapshot", of_snapshot(rows=np.zeros((1, 1), np.int32)), "1 rows and 4 positions; expected 4 of each"),
        ("submit", lambda core, effects: None, "submit(): the effects are None"),
    ],
)
def test_an_answer_of_another_form_is_told_with_what_was_expected(
    mine: Any, method: str, change: Callable[[Any, Any], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = crash_of(mine, method, change, monkeypatch)
    assert f"ReservingCore.{method}()" in crash
    assert words in crash


def test_what_a_core_raises_is_told_with_the_line_of_its_file(mine: Any, tmp_path: Path) -> None:
    lines = FILES["my_core.py"].splitlines()
    at = next(number for number, line in enumerate(lines, 1) if "self.slots.popleft()" in line)
    (tmp_path / "raises.py").write_text(FILES["my_core.py"].replace("self.slots.popleft()", "self.slots.pop_left()"))
    report = run(planned_only(core__kind="raises:build", workload__num_requests=3))
    crash = str(report.summary["crash"])
    assert "ReservingCore.plan() raised AttributeError" in crash
    assert crash.endswith(f"(at raises.py:{at})")
    assert explore(SMALL, CheckedFactory(import_module("raises").build, "it")).violations[0].message.endswith(f":{at})")


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"page_size": 3}, "declares page_size 3; expected page_size 1, as was asked for"),
        (
            {"mix": "mixd"},
            "policy.mix is 'mixd'; expected one of mixed, prefill_first, decode_first, any (did you mean",
        ),
        ({"lookahead": 1.5}, "policy.lookahead is a float; expected a plain int"),
        ({"free_pages": (1, 1, 2)}, "free_pages is (1, 1, 2); expected () or each of the pages 1 to 3 once"),
    ],
)
def test_a_declaration_that_cannot_be_is_told(mine: Any, declared: dict[str, Any], words: str) -> None:
    def build(config: Any) -> Any:
        core = mine.build(config)
        core.policy = replace(core.policy, **declared)
        return core

    with pytest.raises(CoreFormError) as error:
        CheckedFactory(build, "mine")(SMALL.config())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda config: None, "mine returned None (is a return missing?); expected a serving core with policy, submit"),
        (
            lambda config: object(),
            "an object without submit, cancel, plan, apply, abandon, pending, snapshot, fork, policy",
        ),
        (lambda config: {}["size"], "mine raised KeyError: 'size' (at test_foreign_cores.py:"),
    ],
)
def test_a_factory_that_makes_no_core_is_told(factory: Any, words: str) -> None:
    with pytest.raises(CoreFormError) as error:
        CheckedFactory(factory, "mine")(SMALL.config())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:build", "there is no nowhere.py in the working folder, and no installed package 'nowhere'"),
        ("my_core:biuld", "my_core.py has no function 'biuld'; did you mean 'build'?"),
        ("my_core:STATES", "is no function: found tuple"),
        ("my_core:", "expected 'module:function', such as 'my_module:build'"),
        ("halved:build", "its import raised SyntaxError"),
        ("needy:build", "it imports 'nowhere_at_all', which is not installed"),
    ],
)
def test_a_core_that_cannot_be_loaded_is_a_usage_error(
    mine: Any, name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "halved.py").write_text("def build(config:\n")
    (tmp_path / "needy.py").write_text("import nowhere_at_all\n")
    with pytest.raises(SystemExit) as end:
        main(["fuzz", "--core", name, "--runs", "1", "-q"])
    assert end.value.code == ExitCode.USAGE
    assert words in capsys.readouterr().err


def test_a_search_leaves_out_what_the_core_refuses_and_counts_it(mine: Any) -> None:
    one = work(FuzzOptions(core="my_core:build", seed=1), 0, 0, 1, 12, 1e9)
    assert one.done == 12
    assert 0 < one.refused < 12
    assert "lag must be 0" in one.refusal
    assert one.found == ()


@pytest.mark.parametrize("command", [["fuzz", "--runs", "3"], ["explore", "--requests", "1"]])
def test_a_core_that_refuses_everything_is_told_once_and_is_no_success(
    mine: Any, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shy.py").write_text("def build(config):\n    raise ValueError('not today')\n")
    with pytest.raises(SystemExit) as end:
        main([*command, "--core", "shy:build", "-q"])
    assert end.value.code == ExitCode.USAGE
    assert "core: not today" in capsys.readouterr().err


@pytest.mark.slow
def test_the_state_machine_skips_sizes_that_the_core_refuses_and_still_finds_its_bug(mine: Any) -> None:
    kvproof_stateful(mine.build, max_examples=5, steps=10)("runTest").runTest()
    mine.ReservingCore.abandon = lambda self, step: None
    with pytest.raises(BrokenError, match=r"abandon\(\): the effects are None"):
        kvproof_stateful(mine.build, max_examples=30, steps=10)("runTest").runTest()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", ""),
        ("need <= len(self.free)", "need < len(self.free)", "was not admitted, though"),
        ("need = self.pages_for(one.last)", "need = self.pages_for(len(one.tokens))", "was admitted although it needs"),
    ],
)
def test_s11_whoever_declares_all_pages_at_admission_admits_when_they_are_free_and_no_sooner(
    mine: Any, old: str, new: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "other.py").write_text(FILES["my_core.py"].replace(old, new), encoding="utf-8")
    sys.modules.pop("other", None)
    scenario = planned_only(
        core__kind="other:build",
        cache__num_pages=12,
        workload__arrivals={"kind": "poisson", "request_rate": 2e5},
        invariants={"only": ["S11"]},
    )
    violations = run(scenario).violations
    assert [violation.id for violation in violations[:1]] == (["S11"] if words else [])
    assert all(words in str(violation) for violation in violations[:1])


def test_a_core_that_cannot_be_copied_is_told_so_by_the_exploration(mine: Any) -> None:
    def build(config: Any) -> Any:
        core = mine.build(config)
        core.clock = lambda: 0
        return core

    with pytest.raises(CoreFormError, match=r"ReservingCore cannot be copied by pickle .*lambda"):
        explore(SMALL, build)
