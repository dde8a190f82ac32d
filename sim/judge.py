"""Judges a plan log of any engine with every invariant that needs no device."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np

from invariants.auditor import AuditConfig, Auditor
from paged_attention.plan import (
    DUMMY_PAGE,
    EFFECT_KINDS,
    UNKNOWN_TOKEN,
    DeclaredPolicy,
    Effect,
    Request,
    StepOutcome,
    StepPlan,
)
from sim.planlog import ROW_FIELDS, SCHEMA, open_text
from sim.record import Recorder

_INT32: Final = np.iinfo(np.int32)
T = TypeVar("T")


class PlanLogError(Exception):
    """A line of a plan log is not what it must be; the message names file and line."""


class _LineError(Exception):
    """What is wrong with the line at hand."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """An auditor that has seen a whole log, and the recorder that counted along."""

    auditor: Auditor
    recorder: Recorder
    lines: int
    complete: bool
    """The log says that the engine had come to its end."""


def judge(path: Path, config: AuditConfig | None = None) -> Judgement:
    """Audit a plan log. PlanLogError: a line is malformed. OSError: the file cannot be read."""
    judge_: _Judge | None = None
    number = 0
    try:
        with open_text(path, "r") as file:
            for text in file:
                number += 1
                if judge_ is None:
                    judge_ = _Judge(*_header(_parse(text)), config or AuditConfig())
                elif text.strip():
                    judge_.line(_parse(text))
    except _LineError as error:
        raise PlanLogError(f"{path}:{number}: {error}") from None
    except UnicodeDecodeError as error:
        raise PlanLogError(f"{path}:{number + 1}: no UTF-8 text ({error.reason})") from None
    except (EOFError, zlib.error) as error:
        raise PlanLogError(f"{path}:{number + 1}: the gzip stream is cut short or damaged ({error})") from None
    if judge_ is None:
        raise PlanLogError(f"{path}:1: the file is empty; expected a header with schema {SCHEMA}")
    return Judgement(judge_.auditor, judge_.recorder, number, judge_.complete)


def _parse(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise _LineError(f"column {error.colno}: no JSON ({error.msg})") from None
    if not isinstance(line, dict):
        raise _LineError(f"expected an object, found {type(line).__name__}")
    return cast("dict[str, Any]", line)


def _header(line: dict[str, Any]) -> tuple[DeclaredPolicy, int | None]:
    if line.get("schema") != SCHEMA:
        raise _LineError(f"expected a header with schema '{SCHEMA}', found {line.get('schema')!r}")
    policy = _need(line, "policy", dict)
    known = {field.name for field in fields(DeclaredPolicy)}
    if unknown := set(policy) - known:
        raise _LineError(f"policy: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    try:
        declared = DeclaredPolicy(**policy)
    except TypeError as error:
        raise _LineError(f"policy: {str(error).partition('__init__() ')[2]}") from None
    for name in ("batch_size", "page_size", "num_pages", "max_sequence_length", "prefill_chunk"):
        if not isinstance(getattr(declared, name), int) or getattr(declared, name) < 1:
            raise _LineError(f"policy.{name}: expected a whole number of at least 1, found {getattr(declared, name)!r}")
    vocab_size = line.get("vocab_size")
    if vocab_size is not None and not isinstance(vocab_size, int):
        raise _LineError(f"vocab_size: expected a whole number or null, found {vocab_size!r}")
    return declared, vocab_size


def _need(line: dict[str, Any], key: str, kind: type[T]) -> T:
    if key not in line:
        raise _LineError(f"expected the key '{key}', found {', '.join(line) or 'none'}")
    value = line[key]
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise _LineError(f"{key}: expected {kind.__name__}, found {value!r:.60}")
    return value


def _ints(line: dict[str, Any], key: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    values = _need(line, key, list)
    if not all(type(value) is int and _INT32.min <= value <= _INT32.max for value in values):
        raise _LineError(f"{key}: expected a list of whole numbers (int32)")
    array = np.array(values, np.int32)
    array.flags.writeable = False
    return array


def effects_of(line: dict[str, Any]) -> tuple[Effect, ...]:
    """The effects of a line."""
    return tuple(_effects(_need(line, "effects", list) if "effects" in line else []))


def _effects(packed: list[Any]) -> Iterator[Effect]:
    for index, raw in enumerate(packed):
        if not isinstance(raw, list) or not 3 <= len(cast("list[Any]", raw)) <= 7:
            raise _LineError(f"effects[{index}]: expected [kind, request, admission, ...] of 3 to 7 entries")
        kind, *rest = cast("list[Any]", raw)
        if kind not in EFFECT_KINDS:
            raise _LineError(f"effects[{index}]: unknown kind {kind!r}; known are {', '.join(EFFECT_KINDS)}")
        numbers, pages, reason = rest[:4], rest[4] if len(rest) > 4 else [], rest[5] if len(rest) > 5 else ""
        if not all(type(n) is int for n in (*numbers, *pages)) or not isinstance(reason, str):
            raise _LineError(f"effects[{index}]: expected whole numbers, a list of pages and a text")
        padded = [*numbers, *(-1, 0)[len(numbers) - 2 :]] if len(numbers) < 4 else numbers
        yield Effect(kind, *padded, pages=tuple(pages), reason=reason)


def plan_of(line: dict[str, Any]) -> StepPlan:
    """The plan of a line."""
    what = _need(line, "plan", dict)
    rows = {name: _ints(what, name) for name in ROW_FIELDS if name != "num_pages"}
    num_rows = len(rows["request"])
    for name, values in rows.items():
        if len(values) != num_rows:
            raise _LineError(f"plan.{name}: expected {num_rows} entries as in request, found {len(values)}")
    lists = _need(what, "table", list)
    if len(lists) != num_rows:
        raise _LineError(f"plan.table: expected {num_rows} rows as in request, found {len(lists)}")
    pages = [_ints({"table": row}, "table") for row in lists]
    num_pages = np.array([len(row) for row in pages], np.int32)
    table = np.full((num_rows, int(num_pages.max(initial=0))), DUMMY_PAGE, np.int32)
    for row, owned in enumerate(pages):
        table[row, : len(owned)] = owned
    total = int(rows["count"].sum())
    tokens = _ints(what, "tokens") if "tokens" in what else np.full(total, UNKNOWN_TOKEN, np.int32)
    if len(tokens) != total:
        raise _LineError(f"plan.tokens: expected {total} entries (the sum of count), found {len(tokens)}")
    for array in (num_pages, table, tokens):
        array.flags.writeable = False
    return StepPlan(
        step=_need(what, "step", int), **rows, num_pages=num_pages, table=table, tokens=tokens, effects=effects_of(line)
    )


class _Judge:
    """Feeds an auditor and a recorder, line by line."""

    def __init__(self, policy: DeclaredPolicy, vocab_size: int | None, config: AuditConfig) -> None:
        self.auditor = Auditor(policy, config, vocab_size)
        self.recorder = Recorder(policy)
        self.complete = False
        self._now_ns = 0
        self._plans: list[StepPlan] = []
        self._done: StepPlan | None = None
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "submit": self._submit,
            "cancel": self._cancel,
            "plan": self._plan,
            "idle": self._idle,
            "outcome": self._outcome,
            "apply": self._apply,
            "abandon": self._abandon,
            "end": self._end,
        }

    def line(self, line: dict[str, Any]) -> None:
        """Take in one line."""
        if self.complete:
            raise _LineError("nothing may follow the line 'end'")
        kinds = [key for key in self._handlers if key in line]
        if len(kinds) != 1:
            raise _LineError(f"expected one of {', '.join(self._handlers)}, found {', '.join(line) or 'none'}")
        if "time_ns" in line:
            now_ns = _need(line, "time_ns", int)
            if now_ns < self._now_ns:
                raise _LineError(f"time_ns: expected at least {self._now_ns}, the time before, found {now_ns}")
            self._now_ns = now_ns
        self._handlers[kinds[0]](line)

    def _submit(self, line: dict[str, Any]) -> None:
        what = _need(line, "submit", dict)
        prompt = _ints(what, "prompt") if "prompt" in what else np.ones(_need(what, "prompt_tokens", int), np.int32)
        seed = _need(what, "seed", int) if "seed" in what else 0
        request = Request(_need(what, "id", int), prompt, _need(what, "max_tokens", int), seed=seed)
        if not 0 <= request.id <= _INT32.max:
            raise _LineError(f"submit.id: expected 0 to {_INT32.max}, found {request.id}")
        if "refused" in line:
            refusal = _need(line, "refused", str)
            self.recorder.rejected(self._now_ns, request.id, len(prompt), refusal)
            self.auditor.submitted(self._now_ns, request, (), refusal)
            return
        effects = effects_of(line)
        self.recorder.submitted(self._now_ns, request.id, len(prompt), effects)
        self.auditor.submitted(self._now_ns, request, effects, None)

    def _cancel(self, line: dict[str, Any]) -> None:
        request, effects = _need(line, "cancel", int), effects_of(line)
        self.recorder.cancelled(self._now_ns, effects)
        self.auditor.cancelled(self._now_ns, request, effects)
        self._ends(effects)

    def _plan(self, line: dict[str, Any]) -> None:
        plan = plan_of(line)
        known = self.recorder.requests.num_requests
        if plan.num_rows and not (int(plan.request.min()) >= 0 and int(plan.request.max()) < known):
            raise _LineError(f"plan.request: a request that was never submitted; those that were are 0 to {known - 1}")
        self.recorder.planned(self._now_ns, plan)
        self.auditor.planned(self._now_ns, plan, None)
        self.auditor.dispatched(self._now_ns, plan, None, None)
        self._plans.append(plan)

    def _idle(self, line: dict[str, Any]) -> None:
        self.auditor.idle(self._now_ns, None)

    def _outcome(self, line: dict[str, Any]) -> None:
        what = _need(line, "outcome", dict)
        outcome = StepOutcome(_need(what, "step", int), _ints(what, "token"), _ints(what, "eos"))
        if not self._plans or self._plans[0].step != outcome.step:
            due = self._plans[0].step if self._plans else "none"
            raise _LineError(f"outcome.step: the oldest step in flight is {due}, found {outcome.step}")
        plan = self._plans.pop(0)
        if not len(outcome.token) == len(outcome.eos) == plan.num_rows:
            raise _LineError(f"outcome: expected {plan.num_rows} tokens and eos flags, one per row of the plan")
        self.recorder.executed(self._now_ns, self._now_ns, outcome)
        self.auditor.executed(self._now_ns, plan, outcome)
        self._done = plan

    def _apply(self, line: dict[str, Any]) -> None:
        step, effects = _need(line, "apply", int), effects_of(line)
        if self._done is None or self._done.step != step:
            raise _LineError(f"apply: expected the step whose outcome came last, found {step}")
        self._done = None
        self.recorder.applied(self._now_ns, effects)
        self.auditor.applied(self._now_ns, step, effects, None)
        self._ends(effects)

    def _abandon(self, line: dict[str, Any]) -> None:
        step, effects = _need(line, "abandon", int), effects_of(line)
        if not self._plans or self._plans[-1].step != step:
            raise _LineError(f"abandon: only the newest plan can be taken back, found step {step}")
        self.recorder.abandoned(self._now_ns, self._plans.pop(), effects)
        self.auditor.abandoned(self._now_ns, step, effects)

    def _end(self, line: dict[str, Any]) -> None:
        pending = _need(_need(line, "end", dict), "pending", dict)
        self.complete = True
        totals = self.recorder.totals(self._now_ns)
        self.auditor.finished(self._now_ns, {int(k): str(v) for k, v in pending.items()}, None, None, totals)

    def _ends(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            if effect.kind in ("ended", "cancelled"):
                self.auditor.request_done(effect.request, *self.recorder.times_of(effect.request))
