"""Requests spelled out one by one, placed by step."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sim.scenario import Scenario, load_scenario, scenario_text
from tests.sim.run_parts import logged
from tests.sim.scenario_parts import changed


def scripted(*requests: dict[str, int], **keys: Any) -> Scenario:
    data = changed(backend__kind="none", **keys)
    data["workload"] = {"arrivals": {"kind": "script", "requests": list(requests)}}
    return Scenario.model_validate(data)


def submissions(scenario: Scenario) -> list[tuple[int, int]]:
    """(request, steps planned before it came) of each submission."""
    _, lines = logged(scenario)
    seen: list[tuple[int, int]] = []
    plans = 0
    for line in lines:
        plans += "plan" in line
        if "submit" in line:
            seen.append((line["submit"]["id"], plans))
    return seen


def test_a_request_is_submitted_before_its_step_is_planned() -> None:
    scenario = scripted(
        {"prompt_tokens": 4, "output_tokens": 10},
        {"at_step": 3, "prompt_tokens": 2, "output_tokens": 2},
        {"at_step": 3, "prompt_tokens": 1, "output_tokens": 1},
    )
    assert submissions(scenario) == [(0, 0), (1, 3), (2, 3)]


def test_where_nothing_is_left_to_run_the_next_request_comes_at_once() -> None:
    scenario = scripted(
        {"prompt_tokens": 1, "output_tokens": 1}, {"at_step": 1000, "prompt_tokens": 1, "output_tokens": 1}
    )
    assert submissions(scenario) == [(0, 0), (1, 1)]


def test_an_eos_ends_a_scripted_request_after_its_tokens() -> None:
    report, _ = logged(scripted({"prompt_tokens": 3, "output_tokens": 9, "eos_after": 2}))
    assert report.summary["tokens"]["output"] == 2
    assert report.summary["requests"]["finished"] == 1


def test_a_scripted_scenario_survives_being_written_and_read(tmp_path: Any) -> None:
    scenario = scripted(
        {"prompt_tokens": 3, "output_tokens": 2}, {"at_step": 1, "prompt_tokens": 0, "output_tokens": 2}
    )
    path = tmp_path / "scripted.yaml"
    path.write_text(scenario_text(scenario))
    assert load_scenario(path) == scenario


def test_steps_that_fall_and_lengths_of_their_own_are_refused() -> None:
    request = {"prompt_tokens": 1, "output_tokens": 1}
    with pytest.raises(ValidationError, match="comes after"):
        scripted({"at_step": 2, **request}, {"at_step": 1, **request})
    data = changed(backend__kind="none")
    data["workload"]["arrivals"] = {"kind": "script", "requests": [request]}
    with pytest.raises(ValidationError, match="spell out every request"):
        Scenario.model_validate(data)
