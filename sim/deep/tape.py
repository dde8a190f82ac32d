"""What a run leaves behind for comparison with another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Literal
from zlib import crc32

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from paged_attention.plan import CoreSnapshot, Effect, Request, StepOutcome, StepPlan
from sim.deep.places import Places
from sim.observer import Bystander
from sim.record import Recorder
from sim.request_table import RequestTimes
from sim.trace_hash import pack_effects

STATES_EVERY: Final = 16
"""The core's state is looked at after each n-th plan."""

CallKind = Literal["submit", "cancel", "plan", "apply", "abandon"]
Call = tuple[CallKind, Any]
"""What was asked of the core, and with what; of a plan: its check sum, or None where there was none."""


@dataclass(slots=True)
class Tape:
    """What came out of a run, request by request and plan by plan."""

    tokens: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """By request: what it yielded until it ended."""
    token_steps: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """The step that yielded each of them."""
    prompt_tokens: dict[int, int] = field(default_factory=dict[int, int])
    ends: dict[int, str] = field(default_factory=dict[int, str])
    """By request: an EndReason, "cancelled" or "rejected"; unfinished ones are missing."""
    submitted_at: dict[int, int] = field(default_factory=dict[int, int])
    """By request: the number of plans made before it came."""
    gone_at: dict[int, int] = field(default_factory=dict[int, int])
    """By request: the number of plans made before it ended."""
    preemptions: dict[int, int] = field(default_factory=dict[int, int])
    plans: list[int] = field(default_factory=list[int])
    """The check sum of each plan, with pages under their own names."""
    raw_plans: list[int] = field(default_factory=list[int])
    """The check sum of each plan, with pages as the core numbered them."""
    rows: list[frozenset[tuple[int, int, int]]] = field(default_factory=list[frozenset[tuple[int, int, int]]])
    """Of each plan: (request, start, count) of every row."""
    calls: list[Call] = field(default_factory=list[Call])
    states: dict[int, dict[str, str]] = field(default_factory=dict[int, dict[str, str]])
    """The digests of the core's state after that many plans."""
    places: list[Places] = field(default_factory=list[Places])
    """What each step has written, where that was looked at."""
    times: dict[int, RequestTimes] = field(default_factory=dict[int, RequestTimes])
    step_times: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    """Start and end of each completed step, in ns."""
    digests: bytes = b""
    """The rolling hash after each completed step."""
    trace_hash: str = ""
    cache_hash: str | None = None
    holds_cache: bool = False
    crash: str | None = None
    """What a part raised, or that the run found no end."""

    def finish(self, recorder: Recorder) -> None:
        """Take over what the recorder says."""
        self.digests = bytes(recorder.hash.step_digests)
        self.trace_hash = recorder.hash.hexdigest
        self.times = {request: recorder.times_of(request) for request in self.submitted_at}
        series = recorder.series
        self.step_times = np.stack([series["start_ns"], series["end_ns"]])

    @property
    def num_tokens(self) -> int:
        """Tokens yielded in all."""
        return sum(map(len, self.tokens.values()))


class Taping(Bystander):
    """An observer that fills a tape."""

    def __init__(self, tape: Tape, names: Int32[np.ndarray, " pages"] | None) -> None:
        """`names` gives each page of the core its own name; None: its number is its name."""
        self._tape = tape
        self._names = names
        self.state: Callable[[], CoreSnapshot] | None = None
        self._outcome: StepOutcome | None = None

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """See Observer."""
        tape = self._tape
        tape.calls.append(("submit", request))
        tape.submitted_at[request.id] = len(tape.plans)
        tape.prompt_tokens[request.id] = len(request.prompt)
        if refusal is None:
            tape.tokens[request.id], tape.token_steps[request.id] = [], []
        else:
            tape.ends[request.id] = "rejected"

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._tape.calls.append(("cancel", request))
        self._follow(effects)

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """See Observer."""
        tape = self._tape
        check = plan_check(plan, None)
        tape.calls.append(("plan", check))
        tape.raw_plans.append(check)
        tape.plans.append(check if self._names is None else plan_check(plan, self._names))
        tape.rows.append(frozenset(zip(plan.request.tolist(), plan.start.tolist(), plan.count.tolist(), strict=True)))
        self._follow(plan.effects)
        if self.state is not None and len(tape.plans) % STATES_EVERY == 0:
            tape.states[len(tape.plans)] = state_digests(self.state())

    def idle(self, now_ns: int) -> None:
        """See Observer."""
        self._tape.calls.append(("plan", None))

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """See Observer."""
        tape, self._outcome = self._tape, outcome
        for row in (outcome.token >= 0).nonzero()[0].tolist():
            request = plan.request.item(row)
            if request in tape.tokens and request not in tape.ends:
                tape.tokens[request].append(outcome.token.item(row))
                tape.token_steps[request].append(plan.step)

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._tape.calls.append(("apply", self._outcome))
        self._follow(effects)

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """See Observer."""
        self._tape.calls.append(("abandon", plan.step))
        self._follow(effects)

    def _follow(self, effects: tuple[Effect, ...]) -> None:
        tape = self._tape
        for effect in effects:
            if effect.kind in {"ended", "cancelled"}:
                tape.ends[effect.request] = effect.reason if effect.kind == "ended" else "cancelled"
                tape.gone_at[effect.request] = len(tape.plans)
            elif effect.kind == "preempted":
                tape.preemptions[effect.request] = tape.preemptions.get(effect.request, 0) + 1


def plan_check(plan: StepPlan, names: Int32[np.ndarray, " pages"] | None) -> int:
    """A check sum of everything in a plan but `native`; pages go in under their names."""
    effects, table = plan.effects, plan.table
    if names is not None:
        effects = tuple(e._replace(pages=tuple(_named(np.array(e.pages, np.int32), names).tolist())) for e in effects)
        table = _named(table, names)
    check = crc32(pack_effects(effects), plan.step)
    columns = (plan.request, plan.admission, plan.slot, plan.start, plan.count, plan.samples, plan.num_pages)
    for column in (*columns, plan.tokens, table):
        check = crc32(np.ascontiguousarray(column).tobytes(), check)
    return check


def _named(pages: NDArray[np.int32], names: Int32[np.ndarray, " pages"]) -> NDArray[np.int32]:
    """Ids that no page has keep their number."""
    inside = (pages >= 0) & (pages < len(names))
    return np.where(inside, names[np.where(inside, pages, 0)], pages)


def state_digests(state: CoreSnapshot) -> dict[str, str]:
    """The digest of each part of a core's state."""
    lists = [part for key, pages in sorted(state.pages.items()) for part in (np.array(key), pages)]
    queues = [part for _, queue in sorted(state.queues.items()) for part in (np.array(len(queue)), queue)]
    return {
        "free list": _digest(state.free),
        "fence": _digest(state.fenced),
        "page table": _digest(state.rows),
        "positions": _digest(state.positions),
        "slots": _digest(np.array(sorted(state.slot_of.items()))),
        "page lists": _digest(*lists),
        "queues": _digest(*queues),
    }


def _digest(*arrays: NDArray[np.integer]) -> str:
    digest = blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
