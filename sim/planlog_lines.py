"""Reads the lines of a plan log back into values; what is wrong with a line is said, never guessed around."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from paged_attention.plan import DUMMY_PAGE, EFFECT_KINDS, UNKNOWN_TOKEN, DeclaredPolicy, Effect, StepPlan
from sim.planlog import ROW_FIELDS, SCHEMA

Line = dict[str, Any]
_INT32: Final = np.iinfo(np.int32)


class LineError(Exception):
    """What is wrong with the line at hand."""


def parse(row: str) -> Line:
    """The object of a line. LineError: it holds none."""
    try:
        line = json.loads(row)
    except json.JSONDecodeError as error:
        raise LineError(f"column {error.colno}: no JSON ({error.msg})") from None
    if not isinstance(line, dict):
        raise LineError(f"expected an object, found {type(line).__name__}")
    return cast("Line", line)


def header_of(line: Line) -> tuple[DeclaredPolicy, int | None]:
    """Policy and vocabulary size of the first line. LineError: it is no header."""
    if line.get("schema") != SCHEMA:
        raise LineError(f"expected a header with schema '{SCHEMA}', found {line.get('schema')!r}")
    policy = object_of(line, "policy")
    known = {field.name for field in fields(DeclaredPolicy)}
    if unknown := set(policy) - known:
        raise LineError(f"policy: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    try:
        declared = DeclaredPolicy(**policy)
    except TypeError as error:
        raise LineError(f"policy: {str(error).partition('__init__() ')[2]}") from None
    for name in ("batch_size", "page_size", "num_pages", "max_sequence_length", "prefill_chunk"):
        if not isinstance(getattr(declared, name), int) or getattr(declared, name) < 1:
            raise LineError(f"policy.{name}: expected a whole number of at least 1, found {getattr(declared, name)!r}")
    vocab_size = line.get("vocab_size")
    if vocab_size is not None and not isinstance(vocab_size, int):
        raise LineError(f"vocab_size: expected a whole number or null, found {vocab_size!r}")
    return declared, vocab_size


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


def whole(line: Line, key: str) -> int:
    """The whole number at a key. LineError: there is none."""
    value = _need(line, key)
    if type(value) is not int:
        raise _found(key, "a whole number", value)
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
    if not all(type(value) is int and _INT32.min <= value <= _INT32.max for value in values):
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
        if kind not in EFFECT_KINDS:
            raise LineError(f"effects[{index}]: unknown kind {kind!r}; known are {', '.join(EFFECT_KINDS)}")
        numbers = rest[:4]
        pages = list_of({"pages": rest[4]}, "pages") if len(rest) > 4 else []
        reason: Any = rest[5] if len(rest) > 5 else ""
        if not all(type(n) is int for n in (*numbers, *pages)) or not isinstance(reason, str):
            raise LineError(f"effects[{index}]: expected whole numbers, a list of pages and a text")
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
    total = int(rows["count"].sum())
    tokens = ints_of(what, "tokens") if "tokens" in what else np.full(total, UNKNOWN_TOKEN, np.int32)
    if len(tokens) != total:
        raise LineError(f"plan.tokens: expected {total} entries (the sum of count), found {len(tokens)}")
    for array in (num_pages, table, tokens):
        array.flags.writeable = False
    return StepPlan(
        step=whole(what, "step"), **rows, num_pages=num_pages, table=table, tokens=tokens, effects=effects_of(line)
    )
