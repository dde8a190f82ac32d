"""The selftest itself: what is noticed is said, and what is not noticed is said too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from sim.cli import main, selftest_command
from sim.mutants import MUTANTS, registry
from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant
from sim.selftest import Selftest, campaign, fate
from sim.selftest.drivers import drivers_of
from sim.selftest.fate import Fate, alarms, kill, killed_alone

PAGES = "paged_attention.pages:HBMPageManager"


def plant(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """Add a mutant, and let it have two drivers only: nobody notices it anyway."""
    monkeypatch.setitem(registry.MUTANTS, mutant.id, mutant)
    monkeypatch.setattr(fate, "drivers_of", lambda mutant: ("host-starved", "host-lag-two"))
    monkeypatch.setattr(fate, "gauntlet", lambda prefix: ("host-starved",) if prefix == "host-" else ())


def test_a_killed_mutant_names_who_noticed_where_and_after_how_many_steps_and_replays() -> None:
    found = kill("MP01")
    assert (found.killed_by, found.driver, found.replayed) == ("P3", drivers_of(MUTANTS["MP01"])[0], True)
    assert found.steps >= 0
    assert "P3" in found.fired
    assert "page 0" in found.complaint


def test_what_a_process_remembers_shows_at_the_same_step_each_time() -> None:
    found = [kill("KR16") for _ in range(4)]
    assert {(one.killed_by, one.steps, one.replayed) for one in found} == {("D5", 1, True)}


def test_a_bug_that_nobody_notices_survives_and_fails_the_selftest(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Edit(f"{PAGES}.pages_for", "-(-num_tokens", "0 - (-num_tokens")
    plant(monkeypatch, Mutant("KX01", "Changes nothing.", ("P1",), edits=(harmless,)))
    found = kill("KX01")
    assert found.killed_by == ""
    assert not Selftest(canary_caught=True, fates=[found]).passed


def test_a_bug_called_legal_raises_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    leak = MUTANTS["MP04"].edits
    plant(monkeypatch, Mutant("kx-leak", "Loses pages and says that it may.", edits=leak, benign=True))
    assert any(alarm.startswith("kx-leak in host-starved: P") for alarm in alarms("kx-leak"))


def test_an_invariant_alone_notices_what_is_its_business_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = drivers_of(MUTANTS["MP01"])[0]
    monkeypatch.setattr(fate, "drivers_of", lambda mutant: (driver,))
    assert killed_alone("P3", (("MP01", driver),)) == "MP01"
    assert killed_alone("S9", (("MP01", driver),)) == ""


def test_with_a_canary_that_survives_no_verdict_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harmless = Edit(f"{PAGES}.pages_for", "-(-num_tokens", "0 - (-num_tokens")
    plant(monkeypatch, Mutant("kx-canary", "Sings on.", ("P1",), edits=(harmless,)))
    monkeypatch.setattr(campaign, "CANARY", "kx-canary")
    with pytest.raises(SystemExit) as end:
        main(["selftest", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert end.value.code == 3
    assert (found["canary"]["caught"], found["passed"], found["mutants"]) == (False, False, [])


def test_the_selftest_prints_what_became_of_each_mutant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["selftest", "--json", "--only", "MP01", "--only", "mp04"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert [mutant["id"] for mutant in found["mutants"]] == ["MP01", "MP04"]
    assert found["mutants"][0].keys() >= {"id", "applicable", "killed_by", "driver", "seconds", "steps"}
    keys = {"killed", "applicable", "false_alarms", "benign", "canary", "sole_killer_missing"}
    assert found.keys() >= keys
    assert (found["killed"], found["applicable"], found["canary"]["caught"]) == (2, 2, True)


def test_who_survived_and_what_does_not_replay_stands_in_the_last_lines(capsys: pytest.CaptureFixture[str]) -> None:
    survivor = Fate("MP01", "host", "", "host-starved", 0, 0.1)
    fickle = Fate("MP04", "host", "P2", "host-starved", 3, 0.1, replayed=False)
    selftest_command._show(Console(soft_wrap=True), Selftest(canary_caught=True, fates=[survivor, fickle]))
    *_, survived, other, verdict = capsys.readouterr().out.splitlines()
    assert survived == "survived: MP01"
    assert other == "another violation, step or hash in a second run: MP04"
    assert verdict.startswith("ASLEEP: 1 of 2")


def test_who_is_tried_alone_depends_on_no_clock_and_without_a_device_on_what_fires_only() -> None:
    fates = [
        Fate("SEED-10", "device", "O1", "device-int8", 3, 0.1, fired=("O1", "P3")),
        Fate("MP02", "host", "P1", "host-starved", 7, 9.9, fired=("P1", "P3")),
        Fate("MP04", "host", "P2", "host-starved", 5, 0.2, fired=("P2", "P3")),
        Fate("MP01", "host", "P3", "host-starved", 9, 5.0, fired=("P3",)),
        Fate("MP10", "host", "P6", "host-starved", 2, 0.1, fired=("P6",)),
    ]
    assert [fate.id for fate in campaign._likeliest(fates, "P3", declared=True)] == ["MP01", "MP04", "MP02", "SEED-10"]
    assert [fate.id for fate in campaign._likeliest(fates, "K1", declared=True)] == ["MP10"]
    assert campaign._likeliest(fates, "K1", declared=False) == []
