"""The plan log `kvproof/plan-v1`: what a serving engine did, as JSON lines that any engine in any language can write.

    {"schema": "kvproof/plan-v1", "policy": {...}, "vocab_size": null}          the first line; fields of DeclaredPolicy
    {"submit": {"id": 0, "prompt": [5, 7], "max_tokens": 4}, "effects": [...]}  or "refused": "why", without effects
    {"plan": {"step": 0, "request": [0], ..., "table": [[1]]}, "effects": [...]}    fields of StepPlan; [] effects
    {"idle": true}                                                              plan() had nothing to run
    {"outcome": {"step": 0, "token": [9], "eos": [0]}}                          before the effects of its apply
    {"apply": 0, "effects": [...]}, {"abandon": 0, "effects": [...]}, {"cancel": 3, "effects": [...]}
    {"end": {"pending": {}}}                                                    the last line: what is unfinished, why

Every line may carry "time_ns" (never decreasing). An effect is [kind, request, admission, slot, first_page, pages,
reason]; trailing fields may be left out. With a vocab_size the tokens are those of the scripted model: "seed" and
"eos_position" (-1: no EOS) in submit say which. A file whose name ends in .gz is gzip.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, cast

from paged_attention.plan import DeclaredPolicy, Effect, Request, StepOutcome, StepPlan

SCHEMA: Final = "kvproof/plan-v1"
_DEFAULTS: Final[tuple[Any, ...]] = ("", [], 0, -1)
"""Of an effect's last fields, last first."""

ROW_FIELDS: Final = ("request", "admission", "slot", "start", "count", "samples", "num_pages")


def open_text(path: Path, mode: str) -> IO[str]:
    """Open a plan log, gzip or not. OSError: it cannot be opened."""
    if path.name.endswith(".gz"):
        return cast("IO[str]", gzip.open(path, mode + "t", encoding="utf-8"))
    return path.open(mode, encoding="utf-8")


class PlanLogWriteError(OSError):
    """A plan log that the disk does not take any further; `filename` names it."""


class PlanLogWriter:
    """An observer that writes what it is told; with path None it writes nothing.

    PlanLogWriteError: the disk does not take it. To enter raises OSError where the file cannot be opened.
    """

    def __init__(
        self, path: Path | None, policy: DeclaredPolicy, vocab_size: int | None, eos_position: Callable[[int], int]
    ) -> None:
        self._path = path
        self._eos_position = eos_position
        self._header = {"schema": SCHEMA, "policy": asdict(policy), "vocab_size": vocab_size}
        self._file: IO[str] | None = None

    def __enter__(self) -> PlanLogWriter:
        if self._path is not None:
            self._file = open_text(self._path, "w")
            self._write(self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as failure:
                raise self._failed(failure) from failure

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """See Observer."""
        what = {"id": request.id, "prompt": request.prompt.tolist(), "max_tokens": request.max_tokens}
        what["seed"] = request.seed
        what["eos_position"] = self._eos_position(request.id)
        rest = {"effects": pack(effects)} if refusal is None else {"refused": refusal}
        self._write({"time_ns": now_ns, "submit": what, **rest})

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._write({"time_ns": now_ns, "cancel": request, "effects": pack(effects)})

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """See Observer."""
        rows = {name: getattr(plan, name).tolist() for name in ROW_FIELDS}
        table = [row[:n] for row, n in zip(plan.table.tolist(), rows["num_pages"], strict=True)]
        what = {"step": plan.step, **rows, "tokens": plan.tokens.tolist(), "table": table}
        del what["num_pages"]
        self._write({"time_ns": now_ns, "plan": what, "effects": pack(plan.effects)})

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """See Observer."""
        what = {"step": outcome.step, "token": outcome.token.tolist(), "eos": outcome.eos.tolist()}
        self._write({"time_ns": now_ns, "outcome": what})

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._write({"time_ns": now_ns, "apply": step, "effects": pack(effects)})

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._write({"time_ns": now_ns, "abandon": plan.step, "effects": pack(effects)})

    def idle(self, now_ns: int) -> None:
        """See Observer."""
        self._write({"time_ns": now_ns, "idle": True})

    def ended(self, now_ns: int, pending: Mapping[int, str]) -> None:
        """See Observer."""
        self._write({"time_ns": now_ns, "end": {"pending": {str(request): why for request, why in pending.items()}}})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            except OSError as failure:
                raise self._failed(failure) from failure

    def _failed(self, failure: OSError) -> PlanLogWriteError:
        return PlanLogWriteError(failure.errno, failure.strerror, str(self._path))


def pack(effects: Iterable[Effect]) -> list[list[Any]]:
    """Effects as JSON lists, without the trailing fields that say nothing."""
    packed: list[list[Any]] = []
    for effect in effects:
        fields: list[Any] = [*effect[:5], list(effect.pages), effect.reason]
        for default in _DEFAULTS:
            if fields[-1] != default:
                break
            fields.pop()
        packed.append(fields)
    return packed
