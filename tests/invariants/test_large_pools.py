"""Pools that are not compared whole in every step: what is seen of damage beside the planned writes, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from backends.numpy_oracle import NumpyBackend
from invariants.contents import SMALL_PLACES, SMALL_TOUCHED
from invariants.frame import FramePlaces
from sim.run import run
from tests.sim.run_parts import planned_only

PAGE_SIZE, NUM_PAGES, NEVER = 4, 800, 1_000_000
assert NUM_PAGES * PAGE_SIZE > SMALL_PLACES


def large(decodes: int, prompt: int, output: int) -> Any:
    """As many requests as slots, all of one size, in a pool with room for all; no full look but those at both ends."""
    return planned_only(
        backend__kind="numpy",
        core__batch_size=decodes,
        core__prefill_chunk=64,
        cache__num_pages=NUM_PAGES,
        cache__max_sequence_length=prompt + output,
        workload__arrivals={"kind": "concurrent", "concurrency": decodes},
        workload__prompt_tokens={"kind": "fixed", "value": prompt},
        workload__output_tokens={"kind": "fixed", "value": output},
        workload__num_requests=decodes,
        # One that reads nothing: what lies there is seen by looking alone.
        model={"kind": "echo"},
        invariants={"full_every": NEVER},
    )


def damaged(monkeypatch: pytest.MonkeyPatch, choose: Callable[[Any], tuple[int, int] | None]) -> list[int]:
    """Has the backend spoil the place (page, offset) that `choose` finds after a plan; the steps at which it did."""
    steps: list[int] = []
    execute = NumpyBackend.execute

    def spoil(self: Any, plan: Any, rows: Any) -> Any:
        done, place = execute(self, plan, rows), choose(plan)
        if place is not None:
            page, offset = place
            self._words[:, :, :, page, offset] ^= 1
            steps.append(plan.step)
        return done

    monkeypatch.setattr(NumpyBackend, "execute", spoil)
    return steps


def behind_the_chunk(plan: Any) -> tuple[int, int] | None:
    """After the first step, which looks at everything."""
    end = int(plan.start[0] + plan.count[0])
    if plan.step == 0 or plan.count[0] * PAGE_SIZE <= SMALL_TOUCHED or end % PAGE_SIZE == 0:
        return None
    return int(plan.table[0, end // PAGE_SIZE]), end % PAGE_SIZE


def older_token(plan: Any) -> tuple[int, int] | None:
    """Of another decode at each step, in a page that is full."""
    row = plan.step % plan.num_rows
    full = int(plan.start[row]) // PAGE_SIZE
    are_many = plan.num_rows * PAGE_SIZE > SMALL_TOUCHED and np.all(plan.count == 1)
    return (int(plan.table[row, plan.step % full]), 1) if are_many and full else None


def test_what_a_chunk_writes_behind_its_end_is_seen_in_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = damaged(monkeypatch, behind_the_chunk)
    report = run(large(decodes=2, prompt=50, output=30))
    assert (report.violations[0].id, report.violations[0].step) == ("K2", steps[0])


def test_damage_to_older_tokens_is_seen_before_the_look_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = large(decodes=36, prompt=2, output=80)
    whole = run(scenario).summary["steps"]
    steps = damaged(monkeypatch, older_token)
    report = run(scenario)
    assert report.violations[0].id in {"K1", "K2"}
    assert report.violations[0].step == steps[-1]
    assert report.summary["steps"] < steps[0] + 16 < whole


def test_a_step_with_a_chunk_looks_beside_its_writes_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    many: list[bool] = []
    looks: list[int] = []
    execute, next_places = NumpyBackend.execute, FramePlaces.next_places

    def executed(self: Any, plan: Any, rows: Any) -> Any:
        if plan.num_tokens * PAGE_SIZE > SMALL_TOUCHED:
            many.append(bool((plan.slot < 0).any()))
        return execute(self, plan, rows)

    def looked(self: Any, slots: Any) -> Any:
        looks.append(len(slots))
        return next_places(self, slots)

    monkeypatch.setattr(NumpyBackend, "execute", executed)
    monkeypatch.setattr(FramePlaces, "next_places", looked)
    run(large(decodes=4, prompt=50, output=30))
    assert any(many)
    assert len(looks) == len(many)
