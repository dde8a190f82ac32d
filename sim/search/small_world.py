"""A core, its judge and its users in a world so small that every order of events can be tried.

A world is a value that moves by actions: submit, cancel, plan (with every choice of who yields an EOS), fail, apply.
The device of this world yields token 1 or an EOS; rows of a sequence that has ended on the device yield nothing.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from invariants.auditor import AuditConfig, Auditor, Totals
from invariants.catalogue import CATALOGUE
from invariants.findings import Count
from invariants.violation import Violation
from paged_attention.plan import EOS_TOKEN, UNKNOWN_TOKEN, DeclaredPolicy, Request, StepOutcome, StepPlan
from sim.cores.checked import CheckedCore, CoreFormError, raised
from sim.cores.protocol import CoreConfig, ServingCore
from sim.hang import HangError
from sim.part_calls import CRASH, HANG

Kind = tuple[int, int]
"""Prompt tokens and max_tokens of a request."""

CoreFactory = Callable[[CoreConfig], ServingCore]
ANY_TOKEN: Final = 1


class Action(NamedTuple):
    """One move: what, whose or which kind, and who yields an EOS (by row of the plan)."""

    what: str
    which: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.what == "submit":
            return f"submit (prompt {self.which[0]}, max_tokens {self.which[1]})"
        if self.what == "cancel":
            return f"cancel request {self.which[0]}"
        if self.what == "plan":
            return f"plan, EOS in rows {list(self.which)}" if self.which else "plan"
        return self.what


@dataclass(frozen=True, slots=True)
class Scope:
    """How small the world is, and what may happen in it."""

    requests: int = 3
    pages: int = 5
    """Usable ones: the dummy comes on top."""
    page_size: int = 1
    slots: int = 2
    max_prompt: int = 2
    max_output: int = 2
    chunk: int = 2
    lag: int = 0
    mix: str = "mixed"
    eos: bool = True
    cancels: bool = True
    fails: bool = False
    symmetry: bool = True
    """Count states that differ only in the names of pages and requests once."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Every kind of request that may be submitted."""
        return tuple(product(range(1, self.max_prompt + 1), range(1, self.max_output + 1)))

    def config(self) -> CoreConfig:
        """The core's sizes and policy."""
        return CoreConfig(
            batch_size=self.slots,
            page_size=self.page_size,
            num_pages=self.pages + 1,
            max_sequence_length=self.max_prompt + self.max_output,
            prefill_chunk=self.chunk,
            lag=self.lag,
            mix=self.mix,  # pyright: ignore[reportArgumentType]
        )


@dataclass(slots=True)
class Asked:
    """What the users know of a live request."""

    kind: Kind
    tokens: int = 0
    """Tokens that reached them."""


@dataclass(slots=True)
class Flight:
    """A dispatched step and what the device will answer."""

    plan: StepPlan
    outcome: StepOutcome


@dataclass(slots=True)
class World:
    """One state, with everything that its future depends on."""

    core: ServingCore
    auditor: Auditor
    submitted: int = 0
    asked: dict[int, Asked] = field(default_factory=dict[int, Asked])
    flights: deque[Flight] = field(default_factory=deque[Flight])
    dead: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    """Admissions that ended on the device with an EOS that the host may not have seen."""
    now_ns: int = 0
    """Virtual time: one nanosecond a move."""
    crash: str = ""
    """What the core raised, or which call of it did not return."""
    crash_id: str = ""
    """CRASH or HANG."""

    @property
    def violations(self) -> list[Violation]:
        """What the judge has found."""
        return self.auditor.violations


def new_world(scope: Scope, factory: CoreFactory) -> World:
    """The empty world. ValueError: the core takes no such sizes."""
    core = factory(scope.config())
    # Nobody records here, so that there is no record to judge.
    host = frozenset(name for name, entry in CATALOGUE.items() if entry.active and entry.mode == "always")
    only = frozenset(name for name in host if CATALOGUE[name].family not in {"metrics", "contents"})
    return World(core, Auditor(core.policy, AuditConfig(full_every=1, only=only), None))


def actions(world: World, scope: Scope) -> Iterator[Action]:
    """Every move that may come next; `plan` stands for all choices of EOS (`plans`)."""
    if world.flights:
        yield Action("apply")
    if len(world.flights) <= scope.lag:
        yield Action("plan")
        if scope.fails:
            yield Action("fail")
    if world.submitted < scope.requests:
        yield from (Action("submit", kind) for kind in scope.kinds)
    if scope.cancels:
        yield from (Action("cancel", (request,)) for request in sorted(world.asked))


def move(world: World, action: Action, *, all_eos: bool) -> list[tuple[Action, Callable[[World], None]]]:
    """Make a move in place. For `plan` also: the choices that are still open, each with how to make it.

    Whatever the core raises ends this branch as a crash, what does not return (HangWatch) as a hang.
    """
    world.now_ns += 1
    try:
        return _MOVES[action.what](world, action, all_eos)
    except (Exception, HangError) as error:
        broke(world, error)
        return []


def broke(world: World, error: BaseException) -> None:
    """Note what the core raised, or that a call of it did not return, as the end of this world."""
    own = isinstance(error, (CoreFormError, HangError))
    world.crash = str(error) if own else f"the core raised {raised(error, world.core)}"
    world.crash_id = HANG if isinstance(error, HangError) else CRASH


def _submit(world: World, action: Action, all_eos: bool) -> list[Any]:
    prompt, output = action.which
    request = Request(world.submitted, np.ones(prompt, np.int32), output)
    world.submitted += 1
    try:
        effects = world.core.submit(request)
    except ValueError as error:
        world.auditor.submitted(world.now_ns, request, (), str(error))
        return []
    world.asked[request.id] = Asked((prompt, output))
    world.auditor.submitted(world.now_ns, request, effects, None)
    return []


def _cancel(world: World, action: Action, all_eos: bool) -> list[Any]:
    request = action.which[0]
    effects = world.core.cancel(request)
    del world.asked[request]
    world.auditor.cancelled(world.now_ns, request, effects)
    return []


def _plan(world: World, action: Action, all_eos: bool) -> list[Any]:
    plan = world.core.plan()
    if plan is None:
        world.auditor.idle(world.now_ns, world.core.snapshot)
        return []
    world.auditor.planned(world.now_ns, plan, world.core.snapshot)
    alive = [(r, a) not in world.dead for r, a in zip(plan.request.tolist(), plan.admission.tolist(), strict=True)]
    choosers = [row for row, lives in enumerate(alive) if lives and plan.samples[row]]
    if action.which or not all_eos:
        _dispatch(world, plan, alive, frozenset(action.which))
        return []
    subsets = product((False, True), repeat=len(choosers))
    chosen = [tuple(row for row, eos in zip(choosers, subset, strict=True) if eos) for subset in subsets]
    return [(Action("plan", eos), _dispatcher(plan, alive, frozenset(eos))) for eos in chosen]


def _dispatcher(plan: StepPlan, alive: list[bool], eos: frozenset[int]) -> Callable[[World], None]:
    return lambda world: _dispatch(world, plan, alive, eos)


def _dispatch(world: World, plan: StepPlan, alive: list[bool], eos: frozenset[int]) -> None:
    token = np.full(plan.num_rows, UNKNOWN_TOKEN, np.int32)
    ends = np.zeros(plan.num_rows, np.int32)
    for row, lives in enumerate(alive):
        if lives and plan.samples[row]:
            ends[row] = row in eos
            token[row] = EOS_TOKEN if row in eos else ANY_TOKEN
            if row in eos:
                world.dead.add((int(plan.request[row]), int(plan.admission[row])))
    world.auditor.dispatched(world.now_ns, plan, None, None)
    world.flights.append(Flight(plan, StepOutcome(plan.step, token, ends)))


def _fail(world: World, action: Action, all_eos: bool) -> list[Any]:
    plan = world.core.plan()
    if plan is None:
        return []
    world.auditor.planned(world.now_ns, plan, world.core.snapshot)
    world.auditor.abandoned(world.now_ns, plan.step, world.core.abandon(plan.step))
    return []


def _apply(world: World, action: Action, all_eos: bool) -> list[Any]:
    flight = world.flights.popleft()
    world.auditor.executed(world.now_ns, flight.plan, flight.outcome)
    effects = world.core.apply(flight.outcome)
    world.auditor.applied(world.now_ns, flight.plan.step, effects, world.core.snapshot)
    for request, token in zip(flight.plan.request.tolist(), flight.outcome.token.tolist(), strict=True):
        if token != UNKNOWN_TOKEN and request in world.asked:
            world.asked[request].tokens += 1
    for effect in effects:
        if effect.kind == "ended":
            world.asked.pop(effect.request, None)
    in_flight = {
        (r, a)
        for later in world.flights
        for r, a in zip(later.plan.request.tolist(), later.plan.admission.tolist(), strict=True)
    }
    world.dead = {admission for admission in world.dead if admission in in_flight or admission[0] in world.asked}
    return []


_MOVES: Final[dict[str, Callable[[World, Action, bool], list[Any]]]] = {
    "submit": _submit,
    "cancel": _cancel,
    "plan": _plan,
    "fail": _fail,
    "apply": _apply,
}


def is_over(world: World, scope: Scope) -> bool:
    """Whether everybody has come and gone."""
    return world.submitted == scope.requests and not world.asked and not world.flights


def judge_end(world: World) -> None:
    """What must hold once everybody is gone."""
    try:
        pending = world.core.pending()
        world.auditor.finished(world.now_ns, pending, world.core.snapshot, None, Totals(0, 0, 0, 0, 0, 0))
    except (Exception, HangError) as error:
        broke(world, error)


# ---- copies


def _array(array: NDArray[Any]) -> Any:
    """How an array is taken apart: a copy's view is of the copy's own array, and loading calls nothing in Python."""
    base: Any = array.base
    if isinstance(base, np.ndarray) and base.flags.c_contiguous and array.flags.writeable == base.flags.writeable:
        offset = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        return np.ndarray, (array.shape, array.dtype, base, offset, array.strides)
    if not array.flags.c_contiguous or array.dtype.hasobject:
        return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    content = bytearray(array.tobytes()) if array.flags.writeable else array.tobytes()
    return np.ndarray, (array.shape, array.dtype, content)


def _fields(value: Any) -> Any:
    """How a frozen value is taken apart, without the detour that dataclasses take."""
    return type(value), tuple([getattr(value, name) for name in value.__dataclass_fields__])


_APART: Final[dict[type, Callable[[Any], Any]]] = {
    **copyreg.dispatch_table,
    type(threading.Lock()): lambda lock: (threading.Lock, ()),
    type(threading.RLock()): lambda lock: (threading.RLock, ()),
    np.ndarray: _array,
    # Nobody asks an exploration how often a statement was checked.
    Count: lambda count: (Count, ()),
    **dict.fromkeys((Request, StepPlan, StepOutcome, DeclaredPolicy), _fields),
}
"""What pickle alone would copy wrongly (locks: a copy gets its own; views) or slowly, by exact type."""


class _Pickler(pickle.Pickler):
    dispatch_table = _APART


def freeze(world: World) -> bytes:
    """The world as bytes, from which any number of copies can be made. CoreFormError: its core cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(world)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        inner = world.core.core if isinstance(world.core, CheckedCore) else world.core
        raise CoreFormError(
            f"{type(inner).__name__} cannot be copied by pickle ({error}); an exploration copies cores: keep lambdas,"
            " generators, threads and open files out of its attributes, and its class in a module"
        ) from error
    return buffer.getvalue()


def thaw(frozen: bytes) -> World:
    """A copy of the world."""
    return pickle.loads(frozen)
