"""`kvproof bench devices`: rows held to their targets, and sections that are asked for by name."""

from __future__ import annotations

import pytest

from sim import bench_devices
from sim.bench_devices import Row


def test_a_row_says_whether_its_target_is_met_and_by_how_much() -> None:
    assert Row("a", 3.0, "memcpys", 3.0, {}).met
    missed = Row("a", 3.01, "memcpys", 3.0, {"call_us": 2.0})
    assert missed.met is False
    assert "3.01 memcpys (at most 3: MISSED); call_us 2.0" in missed.line()
    assert Row("a", 3.0, "us", None, {}).met is None


def test_sections_run_by_name_and_come_out_as_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    row, told = Row("one", 1.0, "memcpys", 2.0, {}), []

    def section(seconds, tell):
        tell(f"{seconds} s")
        yield row

    monkeypatch.setattr(bench_devices, "SECTIONS", {"first": section, "other": section})
    found = bench_devices.bench_devices(["first"], 0.5, told.append)
    assert told == ["first: 0.5 s"]
    one = {"name": "one", "figure": 1.0, "unit": "memcpys", "target": 2.0, "met": True, "details": {}}
    assert bench_devices.as_json(found) == {"first": [one]}
