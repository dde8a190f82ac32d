"""Ctrl-C: what the first and the second one do to a run."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import sim.run
from sim.exit_codes import ExitCode
from sim.interrupt import Interrupt
from sim.replay import load_recorded, replay
from sim.run import run
from tests.sim.run_parts import planned_only


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_raises_only_where_it_is_checked() -> None:
    with Interrupt() as interrupt:
        interrupt.check()
        ctrl_c()
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


def test_the_second_ctrl_c_raises_at_once() -> None:
    with Interrupt():
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_a_ctrl_c_that_nobody_checked_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt():
        ctrl_c()


def test_an_error_is_not_hidden_by_a_ctrl_c() -> None:
    def failing() -> None:
        with Interrupt():
            ctrl_c()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()


def test_the_handler_is_given_back() -> None:
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_ignores_the_signal_still_does() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            ctrl_c()
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_outside_the_main_thread_needs_no_handler() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(planned_only(workload__num_requests=2)).exit_code))
    thread.start()
    thread.join()
    assert codes == [ExitCode.HELD]


def test_a_replay_that_ctrl_c_ends_compares_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(planned_only(workload__num_requests=3), out=tmp_path)
    recorded = load_recorded(tmp_path)
    original = sim.run.open_backend
    monkeypatch.setattr(sim.run, "open_backend", lambda *arguments: (ctrl_c(), original(*arguments))[1])
    with pytest.raises(KeyboardInterrupt):
        replay(recorded)


def test_a_ctrl_c_while_the_backend_opens_ends_the_run_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> Any:
        ctrl_c()
        return opened(*arguments)

    opened = sim.run.open_backend
    monkeypatch.setattr(sim.run, "open_backend", slow)
    report = run(planned_only())
    assert (report.exit_code, report.summary["verdict"], report.summary["steps"]) == (130, "interrupted", 0)


@pytest.mark.parametrize("lag", [0, 2])
def test_a_step_that_swallows_exceptions_cannot_lose_a_ctrl_c(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(self: object, now_ns: int, plan: Any) -> None:
        original(self, now_ns, plan)
        if plan.step == 7:
            try:
                ctrl_c()
            except KeyboardInterrupt:
                pytest.fail("raised within a step")

    original = sim.run.Sometimes.planned
    monkeypatch.setattr(sim.run.Sometimes, "planned", planned)
    report = run(planned_only(backend__kind="numpy", core__lag=lag))
    assert (report.exit_code, report.summary["verdict"]) == (130, "interrupted")
    assert report.summary["steps"] == 8 - lag
    assert report.summary["cache_hash"] is None
