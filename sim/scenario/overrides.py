"""Command-line overrides: key.path=value laid over what a scenario file says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from ruamel.yaml.error import YAMLError

from sim.scenario.source import KeyPath, Source, dotted, yaml_engine


def apply_overrides(source: Source, overrides: Iterable[str], seed: int | None) -> list[str]:
    """Lay overrides and seed over the source's data, in order; returns the problems found."""
    problems: list[str] = []
    for override in overrides:
        flag = f"--set {override}"
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"{flag}: expected key.path=value")
            continue
        try:
            value = yaml_engine("safe").load(text)
        except (YAMLError, RecursionError) as error:
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            problems.append(f"{flag}: the value is not YAML: {reason}")
            continue
        if problem := _lay(source, tuple(key.split(".")), value, flag):
            problems.append(problem)
    if seed is not None:
        _lay(source, ("seed",), seed, f"--seed {seed}")
    return problems


def _lay(source: Source, keys: tuple[str, ...], value: object, flag: str) -> str | None:
    """Set one key, making the mappings around it; the problem, if the path leads through a plain value."""
    node: object = source.data
    path: KeyPath = ()
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(node, list):
            inner = cast("dict[str | int, object]", node)  # a list is indexed in the same way
            if not (key.isascii() and key.isdigit() and int(key) < len(inner)):
                return f"{flag}: {dotted(path)} is a list of {len(inner)}: expected an index, found '{key}'"
            place: str | int = int(key)
        elif isinstance(node, dict):
            inner = cast("dict[str | int, object]", node)
            place = key
            if not last and inner.get(key) is None:
                inner[key] = {}
        else:
            return f"{flag}: {dotted(path)} is no mapping, so it has no key '{key}'"
        path = (*path, place)
        if last:
            inner[place] = value
        node = inner[place]
    source.overrides[path] = flag
    return None
