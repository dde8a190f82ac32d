"""The last events of a run, one line of fixed columns each, for the folder of a failure.

    time       step event     request admission  slot  range        pages   free hash
    1.234567890   17 allocated      3         1     -  0+2          4,9       57 -

`range` is first position + count for a row, first logical page + count for pages; `hash` is the rolling hash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from paged_attention.plan import Effect, Request, StepOutcome, StepPlan
from sim.record import Recorder

HEADER: Final = (
    f"{'seconds':>16} {'step':>7} {'event':<10} {'request':>8} {'adm':>4} {'slot':>5} "
    f"{'start+n':>12} {'free':>7} {'hash':<16} pages"
)
_MAX_PAGES_SHOWN: Final = 12


class EventLog:
    """Keeps references to the newest `capacity` events; formats them only when asked."""

    def __init__(self, recorder: Recorder, capacity: int = 64) -> None:
        self._recorder = recorder
        self._events: deque[tuple[int, int, str, Any, int, str]] = deque(maxlen=capacity)
        self._step = 0

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """See Observer."""
        if refusal is not None:
            self._add(now_ns, "rejected", (Effect("submitted", request.id, 0, reason=refusal),))
        else:
            self._add(now_ns, "", effects)

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._add(now_ns, "", effects)

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """See Observer."""
        self._step = plan.step
        self._add(now_ns, "plan", plan)

    def idle(self, now_ns: int) -> None:
        """See Observer; an idle engine leaves no line."""

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """See Observer."""
        self._events.append((now_ns, plan.step, "outcome", (plan, outcome), self._recorder.pages_free, ""))

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        digest = bytes(self._recorder.hash.step_digests[-8:]).hex()
        self._events.append((now_ns, step, "applied", effects, self._recorder.pages_free, digest))

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._add(now_ns, "abandoned", effects)

    def ended(self, now_ns: int, pending: Mapping[int, str]) -> None:
        """See Observer."""

    def _add(self, now_ns: int, event: str, what: Any) -> None:
        self._events.append((now_ns, self._step, event, what, self._recorder.pages_free, ""))

    def lines(self) -> list[str]:
        """The kept events, oldest first, below a header."""
        lines = [HEADER]
        for now_ns, step, event, what, free, digest in self._events:
            if isinstance(what, StepPlan):
                lines += [_effect_line(now_ns, step, effect.kind, effect, free) for effect in what.effects]
                lines += [_row_line(now_ns, step, what, row, free) for row in range(what.num_rows)]
                continue
            if event == "outcome":
                lines += _outcome_lines(now_ns, step, *what, free)
                continue
            lines += [_effect_line(now_ns, step, event_of(event, e), e, free) for e in what]
            if event in ("applied", "abandoned"):
                lines.append(_line(now_ns, step, event, -1, -1, -1, "", free, digest, ""))
        return lines


def event_of(event: str, effect: Effect) -> str:
    """The name of an effect's line: a refused submission is no submission."""
    return event if event == "rejected" else effect.kind


def _line(
    now_ns: int,
    step: int,
    event: str,
    request: int,
    admission: int,
    slot: int,
    span: str,
    free: int,
    digest: str,
    rest: str,
) -> str:
    seconds = f"{now_ns // 10**9}.{now_ns % 10**9:09d}"
    who, which, where = (str(n) if n >= 0 else "-" for n in (request, admission, slot))
    return (
        f"{seconds:>16} {step:>7} {event:<10} {who:>8} {which:>4} {where:>5} "
        f"{span or '-':>12} {free:>7} {digest or '-':<16} {rest}"
    ).rstrip()


def _effect_line(now_ns: int, step: int, event: str, effect: Effect, free: int) -> str:
    sign = "+" if effect.kind == "allocated" else "-"
    shown = ",".join(f"{sign}{page}" for page in effect.pages[:_MAX_PAGES_SHOWN])
    if len(effect.pages) > _MAX_PAGES_SHOWN:
        shown += f",... ({len(effect.pages)} in all)"
    span = f"{effect.first_page}+{len(effect.pages)}" if effect.pages else ""
    rest = " ".join(part for part in (shown, effect.reason) if part)
    return _line(now_ns, step, event, effect.request, effect.admission, effect.slot, span, free, "", rest)


def _row_line(now_ns: int, step: int, plan: StepPlan, row: int, free: int) -> str:
    slot = int(plan.slot[row])
    span = f"{plan.start[row]}+{plan.count[row]}"
    event = "prefill" if slot < 0 else "decode"
    return _line(now_ns, step, event, int(plan.request[row]), int(plan.admission[row]), slot, span, free, "", "")


def _outcome_lines(now_ns: int, step: int, plan: StepPlan, outcome: StepOutcome, free: int) -> list[str]:
    lines: list[str] = []
    for row in range(min(plan.num_rows, len(outcome.token))):
        if outcome.token[row] >= 0:
            rest = f"token {outcome.token[row]}" + (" eos" if outcome.eos[row] else "")
            who, which, slot = int(plan.request[row]), int(plan.admission[row]), int(plan.slot[row])
            lines.append(_line(now_ns, step, "token", who, which, slot, "", free, "", rest))
    return lines
