"""Scenario files: load with every problem at once, write back, hash, and the JSON Schema."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sim.scenario.errors import ScenarioError
from sim.scenario.explain import explain
from sim.scenario.models import Scenario
from sim.scenario.overrides import apply_overrides
from sim.scenario.source import KeyPath, Source, read_source, yaml_engine

_FILES: tuple[KeyPath, ...] = (
    ("workload", "arrivals", "path"),
    ("workload", "prompt_tokens", "path"),
    ("workload", "output_tokens", "path"),
    ("cost", "file"),
)
"""Keys that may name a file."""


def load_scenario(path: str | Path, overrides: Iterable[str] = (), seed: int | None = None) -> Scenario:
    """Load a scenario file with `key.path=value` overrides and another seed laid over it.

    Paths of files become absolute: from the scenario's folder, or from the working folder where an override
    gave them. ScenarioError: one line `file:line:column: key.path: what is wrong` for every problem.
    """
    source = read_source(Path(path))
    problems = apply_overrides(source, overrides, seed)
    if problems:
        raise ScenarioError(problems)
    wrong = _resolve_files(source)
    try:
        scenario = Scenario.model_validate(source.data)
    except ValidationError as error:
        wrong += explain(error, source.data)
    else:
        if not wrong:
            return scenario
    wrong.sort(key=lambda problem: (source.place(problem[0]), problem))
    raise ScenarioError(source.problem(where, what) for where, what in wrong)


def _resolve_files(source: Source) -> list[tuple[KeyPath, str]]:
    """Make the paths in the data absolute; the problems of those that are no file."""
    wrong: list[tuple[KeyPath, str]] = []
    for where in _FILES:
        node, key = _at(source.data, where[:-1]), where[-1]
        name = node.get(key) if node is not None else None
        if node is None or not isinstance(name, str) or not name:
            continue
        base = Path.cwd() if source.flag(where) else Path(source.name).parent
        full = (base / name).resolve()
        node[key] = str(full)
        if full.is_dir():
            wrong.append((where, f"'{name}' is a directory: expected a file"))
        elif not full.exists():
            wrong.append((where, f"no such file: '{full}'"))
    return wrong


def _at(data: Any, path: KeyPath) -> dict[str | int, Any] | None:
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return data if isinstance(data, dict) else None  # pyright: ignore[reportUnknownVariableType]


def scenario_text(scenario: Scenario, folder: str | Path | None = None) -> str:
    """The scenario as YAML with every default written out; files are named relative to `folder` where one is given."""
    data = scenario.model_dump(mode="json", by_alias=True)
    for *section, key in _FILES:
        node = _at(data, tuple(section))
        if folder is not None and node is not None and key in node:
            node[key] = _relative(node[key], Path(folder))
    yaml = yaml_engine("safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    stream = StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _relative(path: str, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder.resolve())).as_posix()
    except ValueError:  # another drive
        return path


def dump_scenario(scenario: Scenario, path: str | Path) -> None:
    """Write a scenario file that loads as an equal scenario, also after both it and its files have moved together."""
    Path(path).write_text(scenario_text(scenario, Path(path).parent), encoding="utf-8")


def scenario_hash(scenario: Scenario) -> str:
    """16 hex digits over every key; of a file its name counts, not its folder."""
    data = scenario.model_dump(mode="json", by_alias=True)
    for *section, key in _FILES:
        node = _at(data, tuple(section))
        if node is not None and key in node:
            node[key] = Path(node[key]).name
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of scenario files, for editors."""
    schema = Scenario.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "kvproof scenario"}


def schema_text() -> str:
    """`json_schema` as the text of scenarios/schema.json."""
    return json.dumps(json_schema(), indent=2) + "\n"
