"""Checks the form of what a foreign core hands over: types, lengths and names, each time, before anybody reads it.

What it means is the judges' business. A core that breaks the form gets a sentence that says what was expected, what
was found, and where to look it up; our own core is checked by the tests and goes without.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args, get_origin, get_type_hints

import numpy as np

from paged_attention.plan import (
    EFFECT_KINDS,
    CoreSnapshot,
    DeclaredPolicy,
    Effect,
    Request,
    StepOutcome,
    StepPlan,
)
from sim.cores.protocol import CoreConfig, ServingCore

METHODS: Final = ("submit", "cancel", "plan", "apply", "abandon", "pending", "snapshot", "fork")
SIZES: Final = ("batch_size", "page_size", "num_pages", "max_sequence_length", "prefill_chunk", "lag")
"""What a core may refuse, but not change."""
ROW_ARRAYS: Final = ("request", "admission", "slot", "start", "count", "samples", "num_pages")
QUEUES: Final = ("waiting", "prefill", "joining", "running", "draining")


class CoreFormError(Exception):
    """A core handed over something of another form than its protocol says; the message says what and where."""


class CheckedFactory:
    """Makes cores whose every answer is checked."""

    def __init__(self, factory: Callable[[CoreConfig], ServingCore], name: str) -> None:
        """`name` is how messages call the factory."""
        self._factory, self._name = factory, name

    def __call__(self, config: CoreConfig) -> ServingCore:
        """A core of these sizes. ValueError: it takes no such sizes. CoreFormError: what came is none, or it raised."""
        try:
            core: Any = self._factory(config)
        except (ValueError, CoreFormError):
            raise
        except Exception as error:
            raise CoreFormError(f"{self._name} raised {raised(error, self._factory)}") from error
        if isinstance(core, CheckedCore):
            return core
        _check_core(core, self._name)
        _check_policy(core, config)
        return CheckedCore(core)


class CheckedCore:
    """A core that passes on what the core inside answers, once its form is right. CoreFormError: it is not."""

    def __init__(self, core: ServingCore) -> None:
        self.core = core
        self._newest_step = -1

    @property
    def policy(self) -> DeclaredPolicy:
        """See ServingCore."""
        return self.core.policy

    @property
    def hidden_state(self) -> Any:
        """What the core says of itself beside its snapshot, where it does (`sim.search.state_key`)."""
        return getattr(self.core, "hidden_state", None)

    def submit(self, request: Request) -> tuple[Effect, ...]:
        """See ServingCore."""
        return self._effects("submit", self.core.submit(request))

    def cancel(self, request: int) -> tuple[Effect, ...]:
        """See ServingCore."""
        return self._effects("cancel", self.core.cancel(request))

    def plan(self) -> StepPlan | None:
        """See ServingCore."""
        plan: Any = self.core.plan()
        if plan is None:
            return None
        where = f"{_name(self.core)}.plan()"
        if not isinstance(plan, StepPlan):
            raise _wrong(f"{where} returned {_kind(plan)}", "a StepPlan, or None where nothing runs")
        _check_plan(plan, where, self._newest_step)
        self._effects("plan", plan.effects)
        self._newest_step = plan.step
        return plan

    def apply(self, outcome: StepOutcome) -> tuple[Effect, ...]:
        """See ServingCore."""
        return self._effects("apply", self.core.apply(outcome))

    def abandon(self, step: int) -> tuple[Effect, ...]:
        """See ServingCore."""
        return self._effects("abandon", self.core.abandon(step))

    def pending(self) -> Mapping[int, str]:
        """See ServingCore."""
        pending: Any = self.core.pending()
        if not isinstance(pending, Mapping):
            found = f"{_name(self.core)}.pending() returned {_kind(pending)}"
            raise _wrong(found, "a mapping from each unfinished request's id to a reason")
        return cast("Mapping[int, str]", pending)

    def snapshot(self) -> CoreSnapshot:
        """See ServingCore."""
        snapshot: Any = self.core.snapshot()
        where = f"{_name(self.core)}.snapshot()"
        if not isinstance(snapshot, CoreSnapshot):
            raise _wrong(f"{where} returned {_kind(snapshot)}", "a CoreSnapshot")
        _check_snapshot(snapshot, where, self.policy.batch_size)
        return snapshot

    def fork(self) -> ServingCore:
        """See ServingCore."""
        twin = CheckedCore(self.core.fork())
        _check_core(twin.core, f"{_name(self.core)}.fork()")
        twin._newest_step = self._newest_step
        return twin

    def _effects(self, call: str, effects: Any) -> tuple[Effect, ...]:
        where = f"{_name(self.core)}.{call}()"
        if not isinstance(effects, tuple):
            raise _wrong(f"{where}: the effects are {_kind(effects)}", "a tuple of Effect, () where nothing changed")
        for effect in cast("tuple[Any, ...]", effects):
            _check_effect(effect, where)
        return cast("tuple[Effect, ...]", effects)


def raised(error: BaseException, part: object) -> str:
    """What a part under test raised, and the deepest line of its own module on the way there."""
    return f"{type(error).__name__}: {error}{place_of(error, part)}"


def place_of(error: BaseException, part: object) -> str:
    """The deepest line of the part's own module on the way to the error, in brackets; "" where there is none."""
    inner: Any = part.core if isinstance(part, CheckedCore) else part
    module = getattr(inner, "__module__", None) or type(inner).__module__
    path = getattr(sys.modules.get(module), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" (at {Path(path).name}:{lines[-1]})" if path and lines else ""


# ---- what the form is


def _wrong(found: str, expected: str) -> CoreFormError:
    return CoreFormError(f"{found}; expected {expected}")


def _kind(value: Any) -> str:
    if value is None:
        return "None (is a return missing?)"
    if isinstance(value, np.ndarray):
        array = cast("np.ndarray[Any, Any]", value)
        return f"an array of {array.dtype} and shape {array.shape}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _name(core: object) -> str:
    return type(core).__name__


def _meant(word: object, known: Sequence[str]) -> str:
    near = get_close_matches(str(word), known, 1)
    return f"one of {', '.join(known)}" + (f" (did you mean '{near[0]}'?)" if near else "")


def _check_core(core: Any, name: str) -> None:
    missing = [method for method in METHODS if not callable(getattr(core, method, None))]
    missing += [] if hasattr(core, "policy") else ["policy"]
    if missing:
        found = f"{name} returned {_kind(core)}" + (f" without {', '.join(missing)}" if core is not None else "")
        raise _wrong(found, f"a serving core with policy, {', '.join(METHODS)} (sim/cores/protocol.py)")


def _check_policy(core: Any, config: CoreConfig) -> None:
    policy, where = core.policy, f"{_name(core)}.policy"
    if not isinstance(policy, DeclaredPolicy):
        raise _wrong(f"{where} is {_kind(policy)}", "a DeclaredPolicy (an attribute or a property, no method)")
    for size in SIZES:
        asked, found = getattr(config, size), getattr(policy, size)
        if asked != found:
            expected = f"{size} {asked}, as was asked for (a size that a core cannot take is refused with a ValueError)"
            raise _wrong(f"{where} declares {size} {found!r}", expected)
    hints = get_type_hints(DeclaredPolicy)
    for field in fields(DeclaredPolicy):
        hint, value = hints[field.name], getattr(policy, field.name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise _wrong(f"{where}.{field.name} is {value!r}", _meant(value, get_args(hint)))
        if hint in (int, bool) and type(value) is not hint:
            raise _wrong(f"{where}.{field.name} is {_kind(value)}", f"a plain {hint.__name__}")
    if policy.free_pages and sorted(policy.free_pages) != list(range(1, config.num_pages)):
        expected = f"() or each of the pages 1 to {config.num_pages - 1} once, in hand-out order"
        raise _wrong(f"{where}.free_pages is {policy.free_pages}", expected)


def _check_plan(plan: StepPlan, where: str, newest_step: int) -> None:
    if type(plan.step) is not int or plan.step <= newest_step:
        found = f"{where} returned step {plan.step!r} after step {newest_step}"
        raise _wrong(found, "a plain int that grows with every plan, from 0 on")
    for name in (*ROW_ARRAYS, "tokens"):
        _check_ints(getattr(plan, name), 1, where, name)
    _check_ints(plan.table, 2, where, "table")
    lengths = {name: len(getattr(plan, name)) for name in (*ROW_ARRAYS, "table")}
    if len(set(lengths.values())) > 1:
        odd = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise _wrong(f"{where}: entries of {odd}", "as many in each as the step has rows")
    counts = int(plan.count.sum())
    if counts != len(plan.tokens):
        found = f"{where}: {len(plan.tokens)} tokens, while count adds up to {counts}"
        raise _wrong(found, "the input tokens of all rows, row after row")
    if plan.num_rows and int(plan.num_pages.max()) > plan.table.shape[1]:
        found = f"{where}: num_pages up to {plan.num_pages.max()}, while the table has {plan.table.shape[1]} columns"
        raise _wrong(found, "at least as many columns as any row has pages")


def _check_ints(value: Any, axes: int, where: str, name: str) -> None:
    if not isinstance(value, np.ndarray) or cast("Any", value).dtype != np.int32 or value.ndim != axes:
        shape = "one-dimensional" if axes == 1 else "two-dimensional"
        raise _wrong(f"{where}: {name} is {_kind(cast('Any', value))}", f"a {shape} NumPy array of int32")


def _check_effect(effect: Any, where: str) -> None:
    if not isinstance(effect, Effect):
        raise _wrong(f"{where}: {effect!r:.80} among the effects", "an Effect (paged_attention/plan.py)")
    kind: Any = effect.kind
    if kind not in EFFECT_KINDS:
        raise _wrong(f"{where}: an effect of the kind {kind!r}", _meant(kind, EFFECT_KINDS))
    for name in ("request", "admission", "slot", "first_page"):
        value = getattr(effect, name)
        if type(value) is not int:
            raise _wrong(f"{where}: {kind!r} with {name} {value!r}", "a plain int (of a NumPy scalar: .item())")
    pages: Any = effect.pages
    if not isinstance(pages, tuple) or not all(type(page) is int for page in cast("tuple[Any, ...]", pages)):
        raise _wrong(f"{where}: {kind!r} with pages {pages!r:.80}", "a tuple of plain ints (of an array: .tolist())")


def _check_snapshot(snapshot: CoreSnapshot, where: str, slots: int) -> None:
    for name, axes in (("free", 1), ("fenced", 1), ("rows", 2), ("positions", 1)):
        _check_ints(getattr(snapshot, name), axes, where, name)
    if not len(snapshot.rows) == len(snapshot.positions) == slots:
        found = f"{where}: {len(snapshot.rows)} rows and {len(snapshot.positions)} positions"
        raise _wrong(found, f"{slots} of each, one for each slot")
    for name in ("slot_of", "pages", "queues"):
        value: Any = getattr(snapshot, name)
        if not isinstance(value, Mapping):
            raise _wrong(f"{where}: {name} is {_kind(value)}", "a mapping")
    for key, pages in snapshot.pages.items():
        pair: Any = key
        if not isinstance(pair, tuple) or [type(part) for part in cast("tuple[Any, ...]", pair)] != [int, int]:
            raise _wrong(f"{where}: pages has the key {pair!r}", "(request, admission)")
        _check_ints(pages, 1, where, f"pages[{pair}]")
    for name, queue in snapshot.queues.items():
        if name not in QUEUES:
            raise _wrong(f"{where}: queues has the key {name!r}", _meant(name, QUEUES))
        _check_ints(queue, 1, where, f"queues[{name!r}]")
