"""Reads the lines of a plan log back into values; what is wrong with a line is said, never guessed around."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from paged_attention.plan import DUMMY_PAGE, EFFECT_KINDS, UNKNOWN_TOKEN, DeclaredPolicy, Effect, StepPlan
from sim.planlog import ROW_FIELDS, SCHEMA

Line = dict[str, Any]
MAX_INT32: Final = 2**31 - 1
MAX_TOKENS: Final = 2**30
"""Books are kept for each slot and position and for each place of a page: 4 to 16 bytes each, most of them lazily."""

MAX_STEP_TOKENS: Final = 2**24
"""Of one plan, and of one prompt."""

_BOUNDS: Final = {
    "batch_size": (1, 2**16),
    "page_size": (1, 2**24),
    "num_pages": (1, 2**24),
    "max_sequence_length": (1, 2**24),
    "prefill_chunk": (1, 2**24),
    "lag": (0, 2**16),
    "max_prefill_rows": (1, 2**16),
    "max_step_tokens": (0, MAX_INT32),
    "max_decode_wait": (0, MAX_INT32),
    "max_prefill_wait": (0, MAX_INT32),
    "lookahead": (0, 2**24),
}
"""Smallest and largest value of each number of a policy."""


class LineError(Exception):
    """What is wrong with the line at hand."""


def parse(row: str) -> Line:
    """The object of a line. LineError: it holds none."""
    try:
        line = json.loads(row)
    except json.JSONDecodeError as error:
        raise LineError(f"column {error.colno}: no JSON ({error.msg})") from None
    except (RecursionError, ValueError):
        raise LineError("expected JSON, found lists nested too deeply or a number of thousands of digits") from None
    if not isinstance(line, dict):
        raise LineError(f"expected an object, found {type(line).__name__}")
    return cast("Line", line)


def header_of(line: Line) -> tuple[DeclaredPolicy, int | None]:
    """Policy and vocabulary size of the first line. LineError: it is no header."""
    if line.get("schema") != SCHEMA:
        raise LineError(f"expected a header with schema '{SCHEMA}', found {line.get('schema')!r:.60}")
    policy = _policy(object_of(line, "policy"))
    if line.get("vocab_size") is None:
        return policy, None
    return policy, whole(line, "vocab_size", 2, MAX_INT32)


def _policy(what: Line) -> DeclaredPolicy:
    known = {field.name for field in fields(DeclaredPolicy)}
    if unknown := set(what) - known:
        raise LineError(f"policy: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    try:
        # Strictness forbids dataclasses made from an object, except where that object comes as JSON.
        policy = TypeAdapter(DeclaredPolicy).validate_json(json.dumps(what), strict=True)
    except ValidationError as error:
        raise _policy_error(error.errors(include_url=False)[0]) from None
    for name, (low, high) in _BOUNDS.items():
        if not low <= getattr(policy, name) <= high:
            raise _found(f"policy.{name}", f"a whole number from {low} to {high}", getattr(policy, name))
    tokens = policy.batch_size * policy.max_sequence_length
    if tokens > MAX_TOKENS:
        raise _found("policy", f"batch_size * max_sequence_length of at most {MAX_TOKENS}", tokens)
    if policy.free_pages and sorted(policy.free_pages) != list(range(1, policy.num_pages)):
        raise _found("policy.free_pages", f"each of the pages 1 to {policy.num_pages - 1} once", policy.free_pages)
    places = policy.num_pages * policy.page_size
    if places > MAX_TOKENS:
        raise _found("policy", f"num_pages * page_size of at most {MAX_TOKENS}", places)
    return policy


def _policy_error(item: ErrorDetails) -> LineError:
    if not item["loc"]:
        return LineError("policy: expected valid Unicode, found half of a surrogate pair")
    key = f"policy.{item['loc'][0]}"
    if item["type"] == "missing":
        return LineError(f"{key}: the key is missing")
    kinds = {"int_type": "a whole number", "bool_type": "true or false"}
    return _found(key, kinds.get(item["type"]) or item.get("ctx", {}).get("expected") or item["msg"], item["input"])


def _need(line: Line, key: str) -> Any:
    if key not in line:
        raise LineError(f"expected the key '{key}', found {', '.join(line) or 'none'}")
    return line[key]


def _found(key: str, kind: str, value: Any) -> LineError:
    return LineError(f"{key}: expected {kind}, found {value!r:.60}")


def object_of(line: Line, key: str) -> Line:
    """The object at a key. LineError: there is none."""
    value = _need(line, key)
    if not isinstance(value, dict):
        raise _found(key, "an object", value)
    return cast("Line", value)


def list_of(line: Line, key: str) -> list[Any]:
    """The list at a key. LineError: there is none."""
    value = _need(line, key)
    if not isinstance(value, list):
        raise _found(key, "a list", value)
    return cast("list[Any]", value)


def whole(line: Line, key: str, low: int = -MAX_INT32, high: int = MAX_INT32) -> int:
    """The whole number at a key. LineError: there is none, or it is out of its bounds."""
    value = _need(line, key)
    if type(value) is not int:
        raise _found(key, "a whole number", value)
    if not low <= value <= high:
        raise _found(key, f"a whole number from {low} to {high}", value)
    return value


def text(line: Line, key: str) -> str:
    """The text at a key. LineError: there is none."""
    value = _need(line, key)
    if not isinstance(value, str):
        raise _found(key, "a text", value)
    return value


def ints_of(line: Line, key: str) -> NDArray[np.int32]:
    """The int32 array at a key, read-only. LineError: there is none."""
    values = list_of(line, key)
    if not all(type(value) is int and -MAX_INT32 - 1 <= value <= MAX_INT32 for value in values):
        raise LineError(f"{key}: expected a list of whole numbers (int32)")
    array = np.array(values, np.int32)
    array.flags.writeable = False
    return array


def effects_of(line: Line) -> tuple[Effect, ...]:
    """The effects of a line."""
    return tuple(_effects(list_of(line, "effects") if "effects" in line else []))


def _effects(packed: list[Any]) -> Iterator[Effect]:
    for index, raw in enumerate(packed):
        if not isinstance(raw, list) or not 3 <= len(cast("list[Any]", raw)) <= 7:
            raise LineError(f"effects[{index}]: expected [kind, request, admission, ...] of 3 to 7 entries")
        kind, *rest = cast("list[Any]", raw)
        if not isinstance(kind, str) or kind not in EFFECT_KINDS:
            raise LineError(f"effects[{index}]: unknown kind {kind!r:.60}; known are {', '.join(EFFECT_KINDS)}")
        numbers = rest[:4]
        pages = list_of({"pages": rest[4]}, "pages") if len(rest) > 4 else []
        reason: Any = rest[5] if len(rest) > 5 else ""
        if not all(type(n) is int and -MAX_INT32 <= n <= MAX_INT32 for n in (*numbers, *pages)) or not isinstance(
            reason, str
        ):
            raise LineError(f"effects[{index}]: expected whole numbers (int32), a list of pages and a text")
        padded = [*numbers, *(-1, 0)[len(numbers) - 2 :]] if len(numbers) < 4 else numbers
        yield Effect(kind, *padded, pages=tuple(pages), reason=reason)


def plan_of(line: Line) -> StepPlan:
    """The plan of a line."""
    what = object_of(line, "plan")
    rows = {name: ints_of(what, name) for name in ROW_FIELDS if name != "num_pages"}
    num_rows = len(rows["request"])
    for name, values in rows.items():
        if len(values) != num_rows:
            raise LineError(f"plan.{name}: expected {num_rows} entries as in request, found {len(values)}")
    lists = list_of(what, "table")
    if len(lists) != num_rows:
        raise LineError(f"plan.table: expected {num_rows} rows as in request, found {len(lists)}")
    pages = [ints_of({"table": row}, "table") for row in lists]
    num_pages = np.array([len(row) for row in pages], np.int32)
    table = np.full((num_rows, int(num_pages.max(initial=0))), DUMMY_PAGE, np.int32)
    for row, owned in enumerate(pages):
        table[row, : len(owned)] = owned
    total = int(rows["count"].sum(dtype=np.int64))
    if not 0 <= total <= MAX_STEP_TOKENS:
        raise _found("plan.count", f"a sum from 0 to {MAX_STEP_TOKENS}", total)
    tokens = ints_of(what, "tokens") if "tokens" in what else np.full(total, UNKNOWN_TOKEN, np.int32)
    if len(tokens) != total:
        raise LineError(f"plan.tokens: expected {total} entries (the sum of count), found {len(tokens)}")
    for array in (num_pages, table, tokens):
        array.flags.writeable = False
    return StepPlan(
        step=whole(what, "step", 0), **rows, num_pages=num_pages, table=table, tokens=tokens, effects=effects_of(line)
    )
