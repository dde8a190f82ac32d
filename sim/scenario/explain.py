"""Validation errors in the words of the person who wrote the scenario."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, cast, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sim.scenario.base import Section
from sim.scenario.checks import Problem
from sim.scenario.errors import did_you_mean
from sim.scenario.models import Scenario
from sim.scenario.source import KeyPath, found

_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "string_too_short": "text",
    "too_short": "at least one item",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
}
"""What was expected, by pydantic's name of the error."""


def explain(error: ValidationError, data: dict[str, Any], root: type[Section] = Scenario) -> list[Problem]:
    """Each error as a key path of `data`, which should be a `root`, and what is wrong there."""
    problems: list[Problem] = []
    for item in error.errors(include_url=False):
        if item["type"] == "contradiction":
            problems.extend(cast("list[Problem]", item.get("ctx", {})["problems"]))
        else:
            problems.append(_one(item, data, root))
    return problems


def _one(item: ErrorDetails, data: dict[str, Any], root: type[Section]) -> Problem:
    kind, path = item["type"], _key_path(item, data)
    if kind == "union_tag_invalid":
        path = (*path, "kind")
    if special := _SPECIAL.get(kind):
        return path, special(item, root)
    shown = found(item["input"])
    if expected := _TYPES.get(kind):
        return path, f"expected {expected.format(**item.get('ctx', {}))}, found {shown}"
    return path, f"{item['msg']}, found {shown}"


def _unknown_key(item: ErrorDetails, root: type[Section]) -> str:
    return f"unknown key{did_you_mean(str(item['loc'][-1]), _known_keys(item['loc'], root))}"


def _unknown_value(item: ErrorDetails, _: type[Section]) -> str:
    """A key of a mapping with fixed keys is validated as a value too; pydantic marks it with "[key]"."""
    noun = "key" if item["loc"][-1] == "[key]" else "value"
    known = _quoted(item.get("ctx", {})["expected"])
    return f"unknown {noun} {found(item['input'])}{did_you_mean(str(item['input']), known)}"


def _unknown_kind(item: ErrorDetails, _: type[Section]) -> str:
    ctx = item.get("ctx", {})
    return f"unknown kind {found(ctx['tag'])}{did_you_mean(ctx['tag'], _quoted(ctx['expected_tags']))}"


def _no_kind(item: ErrorDetails, root: type[Section]) -> str:
    return f"the key 'kind' is missing (known: {', '.join(_known_kinds(item['loc'], root))})"


_SPECIAL: dict[str, Callable[[ErrorDetails, type[Section]], str]] = {
    "missing": lambda _item, _root: "the key is missing",
    "invalid_key": lambda _item, _root: "unknown key: keys are text",
    "extra_forbidden": _unknown_key,
    "literal_error": _unknown_value,
    "union_tag_invalid": _unknown_kind,
    "union_tag_not_found": _no_kind,
}


def _key_path(item: ErrorDetails, data: dict[str, Any]) -> KeyPath:
    """The error's location without the names of union members, which stand in no file."""
    node: object = data
    path: KeyPath = ()
    for position, step in enumerate(item["loc"]):
        inside = _step(node, step)
        if inside is not _ABSENT:
            node = inside
            path = (*path, step)
        elif item["type"] == "missing" and position == len(item["loc"]) - 1:
            path = (*path, step)
    return path


_ABSENT = object()


def _step(node: object, step: str | int) -> object:
    if isinstance(node, dict):
        return cast("dict[object, object]", node).get(step, _ABSENT)
    if isinstance(node, list) and isinstance(step, int):
        return cast("list[object]", node)[step]
    return _ABSENT


def _known_keys(loc: tuple[str | int, ...], root: type[Section]) -> list[str]:
    return [field.alias or name for model in _models_at(loc[:-1], root) for name, field in model.model_fields.items()]


def _known_kinds(loc: tuple[str | int, ...], root: type[Section]) -> list[str]:
    return [kind for model in _models_at(loc, root) for kind in _kinds(model)]


def _models_at(loc: Iterable[str | int], root: type[Section]) -> list[type[Section]]:
    """The sections that may stand at a location, found through the field annotations."""
    models: list[type[Section]] = [root]
    for step in loc:
        fields = [field for m in models for name, field in m.model_fields.items() if step in {name, field.alias}]
        if fields:
            models = [model for field in fields for model in _sections(field.annotation)]
        elif isinstance(step, str):
            models = [model for model in models if step in _kinds(model)] or models
    return models


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _kinds(model: type[Section]) -> tuple[str, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)
