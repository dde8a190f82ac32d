"""The minimal scenario on disk: what broke, how to see it again, and every key that is not a default."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from sim.run import package_versions
from sim.scenario import Scenario
from sim.scenario.models import Expectations, FirstViolation
from sim.scenario.source import yaml_engine
from sim.search.shrink import Shrunk


def as_regression(shrunk: Shrunk) -> Scenario:
    """The scenario with what it must show again in `expect`."""
    finding = shrunk.finding
    first = FirstViolation(id=finding.id, step=finding.step, trace_hash=finding.trace_hash, versions=package_versions())
    return shrunk.scenario.model_copy(update={"expect": Expectations(first=first)})


def failure_text(shrunk: Shrunk) -> str:
    """The scenario as YAML, comments first; it loads as `as_regression`."""
    scenario, finding = as_regression(shrunk), shrunk.finding
    lines = [
        f"# Breaks {finding.id}: {_one_line(finding.message)}",
        f"# {shrunk.num_operations} operations are left; no smaller scenario breaks it first.",
        "# See it again: kvproof replay FILE. Once it is fixed, replace expect by {violations: 0}.",
    ]
    return "\n".join(lines) + "\n" + minimal_yaml(scenario)


def minimal_yaml(scenario: Scenario) -> str:
    """The scenario as YAML without the keys that have their default values."""
    data: dict[str, Any] = {"schema": "kvproof/v1"}
    data |= scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    yaml = yaml_engine("safe")
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    stream = StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def write_failure_file(path: Path, shrunk: Shrunk) -> None:
    """Write the minimal scenario. OSError: the disk does not take it."""
    path.write_text(failure_text(shrunk), encoding="utf-8")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:199] + "…"
