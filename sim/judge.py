"""Judges a plan log of any engine with every invariant that needs no device."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from invariants.auditor import AuditConfig, Auditor
from paged_attention.fingerprint import kv_base
from paged_attention.plan import DeclaredPolicy, Effect, ModelRows, Request, StepOutcome, StepPlan
from sim.planlog import SCHEMA, open_text
from sim.planlog_lines import (
    MAX_STEP_TOKENS,
    Line,
    LineError,
    effects_of,
    header_of,
    ints_of,
    object_of,
    parse,
    plan_of,
    text,
    whole,
)
from sim.record import Recorder
from sim.script import NO_EOS

MAX_TIME_NS: Final = 2**62
"""Sums of two times are still int64."""


class PlanLogError(Exception):
    """A line of a plan log is not what it must be; the message names file and line."""


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
            for row in file:
                number += 1
                if judge_ is None:
                    judge_ = _Judge(*header_of(parse(row)), config or AuditConfig())
                elif row.strip():
                    judge_.line(parse(row))
    except LineError as error:
        raise PlanLogError(f"{path}:{number}: {error}") from None
    except UnicodeDecodeError as error:
        raise PlanLogError(f"{path}:{number + 1}: no UTF-8 text ({error.reason})") from None
    except gzip.BadGzipFile:
        raise PlanLogError(f"{path}: the name ends in .gz, but the file is not gzip; rename or compress it") from None
    except (EOFError, zlib.error) as error:
        raise PlanLogError(f"{path}:{number + 1}: the gzip stream is cut short or damaged ({error})") from None
    if judge_ is None:
        raise PlanLogError(f"{path}:1: the file is empty; expected a header with schema {SCHEMA}")
    return Judgement(judge_.auditor, judge_.recorder, number, judge_.complete)


class _Judge:
    """Feeds an auditor and a recorder, line by line."""

    def __init__(self, policy: DeclaredPolicy, vocab_size: int | None, config: AuditConfig) -> None:
        self.auditor = Auditor(policy, config, vocab_size)
        self.recorder = Recorder(policy)
        self.complete = False
        self._now_ns = 0
        self._plans: list[StepPlan] = []
        self._scripted = vocab_size is not None
        self._seeds: dict[int, int] = {}
        self._eos_positions: dict[int, int] = {}
        self._done: StepPlan | None = None
        self._handlers: dict[str, Callable[[Line], None]] = {
            "submit": self._submit,
            "cancel": self._cancel,
            "plan": self._plan,
            "idle": self._idle,
            "outcome": self._outcome,
            "apply": self._apply,
            "abandon": self._abandon,
            "end": self._end,
        }

    def line(self, line: Line) -> None:
        """Take in one line."""
        if self.complete:
            raise LineError("nothing may follow the line 'end'")
        kinds = [key for key in self._handlers if key in line]
        if len(kinds) != 1:
            raise LineError(f"expected one of {', '.join(self._handlers)}, found {', '.join(line) or 'none'}")
        if "time_ns" in line:
            now_ns = whole(line, "time_ns", -MAX_TIME_NS, MAX_TIME_NS)
            if now_ns < self._now_ns:
                raise LineError(f"time_ns: expected at least {self._now_ns}, the time before, found {now_ns}")
            self._now_ns = now_ns
        self._handlers[kinds[0]](line)

    def _submit(self, line: Line) -> None:
        what = object_of(line, "submit")
        if "prompt" in what:
            prompt = ints_of(what, "prompt")
        else:
            prompt = np.ones(whole(what, "prompt_tokens", 0, MAX_STEP_TOKENS), np.int32)
        seed = whole(what, "seed", -(2**63), 2**63 - 1) if "seed" in what else 0
        request = Request(whole(what, "id", 0), prompt, whole(what, "max_tokens"), seed=seed)
        self._seeds[request.id] = seed & 0xFFFFFFFF
        self._eos_positions[request.id] = whole(what, "eos_position") if "eos_position" in what else NO_EOS
        if "refused" in line:
            refusal = text(line, "refused")
            self.recorder.rejected(self._now_ns, request.id, len(prompt), refusal)
            self.auditor.submitted(self._now_ns, request, (), refusal)
            return
        effects = effects_of(line)
        self.recorder.submitted(self._now_ns, request.id, len(prompt), effects)
        self.auditor.submitted(self._now_ns, request, effects, None)

    def _cancel(self, line: Line) -> None:
        request, effects = whole(line, "cancel"), effects_of(line)
        self.recorder.cancelled(self._now_ns, effects)
        self.auditor.cancelled(self._now_ns, request, effects)
        self._ends(effects)

    def _plan(self, line: Line) -> None:
        plan = plan_of(line)
        if strangers := set(plan.request.tolist()) - self._seeds.keys():
            raise LineError(f"plan.request: request {min(strangers)} was never submitted")
        self.recorder.planned(self._now_ns, plan)
        self.auditor.planned(self._now_ns, plan, None)
        self.auditor.dispatched(self._now_ns, plan, self._rows(plan), None)
        self._plans.append(plan)

    def _rows(self, plan: StepPlan) -> ModelRows | None:
        """What the scripted model computes; None: the tokens are the engine's own business."""
        if not self._scripted:
            return None
        requests = plan.request.tolist()
        return ModelRows(
            kv_base=kv_base(plan.request, plan.admission),
            token_seed=np.array([self._seeds[request] for request in requests], np.uint32),
            eos_position=np.array([self._eos_positions[request] for request in requests], np.int32),
        )

    def _idle(self, line: Line) -> None:
        self.auditor.idle(self._now_ns, None)

    def _outcome(self, line: Line) -> None:
        what = object_of(line, "outcome")
        outcome = StepOutcome(whole(what, "step"), ints_of(what, "token"), ints_of(what, "eos"))
        if not self._plans or self._plans[0].step != outcome.step:
            due = self._plans[0].step if self._plans else "none"
            raise LineError(f"outcome.step: the oldest step in flight is {due}, found {outcome.step}")
        plan = self._plans.pop(0)
        if not len(outcome.token) == len(outcome.eos) == plan.num_rows:
            raise LineError(f"outcome: expected {plan.num_rows} tokens and eos flags, one per row of the plan")
        self.recorder.executed(self._now_ns, self._now_ns, outcome)
        self.auditor.executed(self._now_ns, plan, outcome)
        self._done = plan

    def _apply(self, line: Line) -> None:
        step, effects = whole(line, "apply"), effects_of(line)
        if self._done is None or self._done.step != step:
            raise LineError(f"apply: expected the step whose outcome came last, found {step}")
        self._done = None
        self.recorder.applied(self._now_ns, effects)
        self.auditor.applied(self._now_ns, step, effects, None)
        self._ends(effects)

    def _abandon(self, line: Line) -> None:
        step, effects = whole(line, "abandon"), effects_of(line)
        if not self._plans or self._plans[-1].step != step:
            raise LineError(f"abandon: only the newest plan can be taken back, found step {step}")
        self.recorder.abandoned(self._now_ns, self._plans.pop(), effects)
        self.auditor.abandoned(self._now_ns, step, effects)

    def _end(self, line: Line) -> None:
        pending = object_of(object_of(line, "end"), "pending")
        for key in pending:
            if not re.fullmatch(r"[0-9]{1,10}", key):
                raise LineError(f"end.pending: expected request ids as keys, found {key!r:.60}")
        why = {int(key): text(pending, key) for key in pending}
        self.complete = True
        self.auditor.finished(self._now_ns, why, None, None, self.recorder.totals(self._now_ns))

    def _ends(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            if effect.kind in ("ended", "cancelled"):
                self.auditor.request_done(**self.recorder.times_of(effect.request))
