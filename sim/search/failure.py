"""The minimal scenario on disk: what broke, how to see it again, and every key that is not a default."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any, cast

from sim.run import package_versions
from sim.scenario import Scenario
from sim.scenario.models import Expectations, FirstViolation
from sim.scenario.source import yaml_engine
from sim.search.shrink import Shrunk


def as_regression(shrunk: Shrunk) -> Scenario:
    """The scenario with what it must show again in `expect`."""
    finding = shrunk.finding
    first = FirstViolation(
        id=finding.id,
        cause=finding.cause,
        step=finding.step,
        trace_hash=finding.trace_hash,
        versions=package_versions(),
    )
    return shrunk.scenario.model_copy(update={"expect": Expectations(first=first)})


def failure_text(shrunk: Shrunk) -> str:
    """The scenario as YAML, comments first; it loads as `as_regression`."""
    scenario, finding = as_regression(shrunk), shrunk.finding
    left = "1 operation is" if shrunk.num_operations == 1 else f"{shrunk.num_operations} operations are"
    lines = [
        f"# Breaks {finding.id}: {_one_line(finding.message)}",
        f"# {left} left; no smaller scenario breaks it first.",
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


def write_failure_file(path: Path, shrunk: Shrunk, source: Path | None = None) -> None:
    """Write the minimal scenario; comments of `source`, the file that it came from, stay with what is left of it.

    OSError: the disk does not take it.
    """
    path.write_text(failure_text(shrunk) if source is None else _edited(source, shrunk), encoding="utf-8")


def _edited(source: Path, shrunk: Shrunk) -> str:
    """The source's own text with the values of the minimal scenario."""
    yaml = yaml_engine("rt")
    yaml.width = 120
    document = yaml.load(source.read_text(encoding="utf-8"))
    scenario = as_regression(shrunk)
    full = scenario.model_dump(mode="json", by_alias=True)
    minimal = scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    _keep_requests(document, shrunk.kept)
    _lay_over(document, full, minimal)
    stream = StringIO()
    yaml.dump(document, stream)
    return f"# Breaks {shrunk.finding.id}: {_one_line(shrunk.finding.message)}\n" + stream.getvalue()


def _keep_requests(document: Any, kept: tuple[int, ...]) -> None:
    """Leave the requests that are left in the list where they stand, with their comments."""
    arrivals = document["workload"]["arrivals"]
    requests: Any = arrivals["requests"] if arrivals["kind"] == "script" else []
    for at in reversed(range(len(requests))):
        if at not in kept:
            del requests[at]


def _lay_over(node: Any, full: dict[str, Any], minimal: dict[str, Any]) -> None:
    """Change what differs, drop what is gone, add what is new and no default; equal values keep their spelling."""
    for key in list(node):
        value = full.get(key)
        if value is None or (isinstance(node[key], dict) and not isinstance(value, dict)):
            del node[key]
        elif isinstance(value, dict) and _same_kind(node[key], cast("dict[str, Any]", value)):
            _lay_over(node[key], cast("dict[str, Any]", value), minimal.get(key, {}))
        elif isinstance(value, list) and _aligned(node[key], value):
            for item, new in zip(node[key], cast("list[Any]", value), strict=True):
                _lay_over(item, new, {name: given for name, given in new.items() if given})
        elif node[key] != value:
            node[key] = minimal.get(key, value)
    for key, value in minimal.items():
        if key not in node:
            node[key] = value


def _same_kind(old: Any, new: dict[str, Any]) -> bool:
    return isinstance(old, dict) and cast("dict[str, Any]", old).get("kind") == new.get("kind")


def _aligned(old: Any, new: Any) -> bool:
    return isinstance(old, list) and len(cast("list[Any]", old)) == len(new) and all(isinstance(x, dict) for x in new)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:199] + "…"
