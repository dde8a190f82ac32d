"""The last events of a run, one line of fixed columns each, for the folder of a failure.

    seconds  step event  request adm slot  start+n  free hash pages

`adm` is the admission; `start+n` is first position + count for a row, first logical page + count for pages; `free` are
the free pages after the event; `hash` is the rolling hash after the step; pages handed out are +n, given back -n.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from paged_attention.plan import Effect, Request, StepOutcome, StepPlan
from sim.observer import Bystander
from sim.record import Recorder
from sim.trace_hash import DIGEST_BYTES

HEADER: Final = (
    f"{'seconds':>16} {'step':>7} {'event':<10} {'request':>8} {'adm':>4} {'slot':>5} "
    f"{'start+n':>12} {'free':>7} {'hash':<16} pages"
)
_MAX_PAGES_SHOWN: Final = 12


class EventLog(Bystander):
    """Keeps references to the newest `capacity` events; formats them only when asked."""

    def __init__(self, recorder: Recorder, capacity: int = 64) -> None:
        self._recorder = recorder
        self._events: deque[tuple[Callable[..., list[str]], tuple[Any, ...]]] = deque(maxlen=capacity)
        """Who makes the lines of an event, and of what."""
        self._step = 0

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """See Observer."""
        if refusal is None:
            self._add(_effect_lines, now_ns, self._step, effects)
        else:
            self._add(_refusal_lines, now_ns, self._step, request.id, refusal)

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._add(_effect_lines, now_ns, self._step, effects)

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """See Observer."""
        self._step = plan.step
        self._events.append((_plan_lines, (self._recorder.pages_free, now_ns, plan)))

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """See Observer."""
        self._events.append((_outcome_lines, (self._recorder.pages_free, now_ns, plan, outcome)))

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        free, digest = self._recorder.pages_free, self._recorder.hash.step_digests[-DIGEST_BYTES:]
        self._events.append((_applied_lines, (free, now_ns, step, effects, digest)))

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._add(_abandoned_lines, now_ns, plan.step, effects)

    def _add(self, render: Callable[..., list[str]], *what: Any) -> None:
        self._events.append((render, (self._recorder.pages_free, *what)))

    def lines(self) -> list[str]:
        """The kept events, oldest first, below a header."""
        return [HEADER, *(line for render, what in self._events for line in render(*what))]


def _line(
    free: int,
    now_ns: int,
    step: int,
    event: str,
    who: tuple[int, int, int] = (-1, -1, -1),
    span: str = "-",
    digest: str = "-",
    rest: str = "",
) -> str:
    """One line; `who` is (request, admission, slot), negative where there is none."""
    seconds = f"{now_ns // 10**9}.{now_ns % 10**9:09d}"
    request, admission, slot = (str(n) if n >= 0 else "-" for n in who)
    return (
        f"{seconds:>16} {step:>7} {event:<10} {request:>8} {admission:>4} {slot:>5} "
        f"{span:>12} {free:>7} {digest:<16} {rest}"
    ).rstrip()


def _effect_lines(free: int, now_ns: int, step: int, effects: tuple[Effect, ...]) -> list[str]:
    return [_effect_line(free, now_ns, step, effect) for effect in effects]


def _effect_line(free: int, now_ns: int, step: int, effect: Effect) -> str:
    sign = "+" if effect.kind == "allocated" else "-"
    shown = ",".join(f"{sign}{page}" for page in effect.pages[:_MAX_PAGES_SHOWN])
    if len(effect.pages) > _MAX_PAGES_SHOWN:
        shown += f",... ({len(effect.pages)} in all)"
    span = f"{effect.first_page}+{len(effect.pages)}" if effect.pages else "-"
    rest = " ".join(part for part in (shown, effect.reason) if part)
    return _line(free, now_ns, step, effect.kind, (effect.request, effect.admission, effect.slot), span, rest=rest)


def _refusal_lines(free: int, now_ns: int, step: int, request: int, refusal: str) -> list[str]:
    return [_line(free, now_ns, step, "rejected", (request, -1, -1), rest=refusal)]


def _plan_lines(free: int, now_ns: int, plan: StepPlan) -> list[str]:
    lines = _effect_lines(free, now_ns, plan.step, plan.effects)
    for row in range(plan.num_rows):
        event = "prefill" if plan.slot[row] < 0 else "decode"
        span = f"{plan.start[row]}+{plan.count[row]}"
        lines.append(_line(free, now_ns, plan.step, event, _who(plan, row), span))
    return lines


def _outcome_lines(free: int, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> list[str]:
    lines: list[str] = []
    for row in range(min(plan.num_rows, len(outcome.token))):
        if outcome.token[row] >= 0:
            rest = f"token {outcome.token[row]}" + (" eos" if outcome.eos[row] else "")
            lines.append(_line(free, now_ns, plan.step, "token", _who(plan, row), rest=rest))
    return lines


def _applied_lines(free: int, now_ns: int, step: int, effects: tuple[Effect, ...], digest: bytes) -> list[str]:
    return [*_effect_lines(free, now_ns, step, effects), _line(free, now_ns, step, "applied", digest=digest.hex())]


def _abandoned_lines(free: int, now_ns: int, step: int, effects: tuple[Effect, ...]) -> list[str]:
    return [*_effect_lines(free, now_ns, step, effects), _line(free, now_ns, step, "abandoned")]


def _who(plan: StepPlan, row: int) -> tuple[int, int, int]:
    return int(plan.request[row]), int(plan.admission[row]), int(plan.slot[row])
