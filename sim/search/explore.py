"""Exhaustive exploration: breadth-first over every order of events in a small world, each state once.

    frontier --thaw--> world --move--> new worlds --state_key--> seen before? else judge, freeze, next frontier

Breadth-first, so that the first counterexample is a shortest one. The frontier holds whole worlds, the past only keys
and who came from whom, so that memory grows by some hundred bytes a state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sim.hang import HangError, HangWatch
from sim.search.small_world import (
    Action,
    CoreFactory,
    Scope,
    World,
    actions,
    broke,
    freeze,
    is_over,
    judge_end,
    move,
    new_world,
    thaw,
)
from sim.search.state_key import state_key

PROGRESS_EVERY: Final = 500

Waiting = tuple[int, bytes, tuple[Action, ...]]
"""A state to go on from: its number, its world, and every move that may come next."""


@dataclass(frozen=True, slots=True)
class Counterexample:
    """A shortest way to a violation."""

    id: str
    message: str
    actions: tuple[Action, ...]


@dataclass(slots=True)
class Explored:
    """What an exploration has seen."""

    scope: Scope
    states: int = 0
    transitions: int = 0
    depth: int = 0
    exhausted: bool = False
    """Every state that can be reached was visited."""
    violations: list[Counterexample] = field(default_factory=list[Counterexample])
    cpu_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The result as a dict of JSON values."""
        return {
            "states": self.states,
            "transitions": self.transitions,
            "depth": self.depth,
            "exhausted": self.exhausted,
            "violations": [
                {"id": found.id, "message": found.message, "actions": [str(action) for action in found.actions]}
                for found in self.violations
            ],
            "scope": {name: getattr(self.scope, name) for name in Scope.__dataclass_fields__},
            "cpu_seconds": round(self.cpu_seconds, 3),
        }


def explore(
    scope: Scope,
    factory: CoreFactory,
    *,
    max_seconds: float = float("inf"),
    max_states: int | None = None,
    hang_seconds: float = 0.0,
    progress: Callable[[Explored], None] = lambda explored: None,
) -> Explored:
    """Visit every state of `scope`, or as many as time and `max_states` allow; it ends at the first violation.

    A call of the core that takes longer than `hang_seconds` (0: any) is one.
    """
    with HangWatch(hang_seconds):
        return _explored(_Search(scope, factory, progress), max_seconds, max_states)


def _explored(search: _Search, max_seconds: float, max_states: int | None) -> Explored:
    deadline, start = time.monotonic() + max_seconds, time.process_time()
    while search.frontier and not search.found.violations:
        if time.monotonic() > deadline or (max_states is not None and search.found.states >= max_states):
            break
        search.level(deadline)
    search.found.exhausted = not search.frontier and not search.found.violations
    search.found.cpu_seconds = time.process_time() - start
    return search.found


class _Search:
    def __init__(self, scope: Scope, factory: CoreFactory, progress: Callable[[Explored], None]) -> None:
        self.scope, self.progress = scope, progress
        self.found = Explored(scope)
        self._parents: list[tuple[int, Action]] = []
        self._seen: set[bytes] = set()
        self.frontier: list[Waiting] = []
        self._next: list[Waiting] = []
        self._arrive(new_world(scope, factory), -1, Action("start"))
        self.frontier, self._next = self._next, []

    def level(self, deadline: float) -> None:
        """All states one action further; what is left of the frontier at the deadline stays."""
        while self.frontier:
            number, frozen, choices = self.frontier.pop()
            for action in choices:
                self._step(number, frozen, action)
                if self.found.violations:
                    return
            if time.monotonic() > deadline:
                self.frontier += self._next
                self._next = []
                return
        self.frontier, self._next = self._next, []
        self.found.depth += bool(self.frontier)

    def _step(self, number: int, frozen: bytes, action: Action) -> None:
        world = thaw(frozen)
        choices = move(world, action, all_eos=self.scope.eos)
        if not choices:
            self._arrive(world, number, action)
            return
        planned = freeze(world) if len(choices) > 1 else b""
        for nth, (choice, make) in enumerate(choices):
            branch = world if nth == len(choices) - 1 else thaw(planned)
            make(branch)
            self._arrive(branch, number, choice)

    def _arrive(self, world: World, parent: int, action: Action) -> None:
        self.found.transitions += parent >= 0
        if not world.crash and not world.violations and is_over(world, self.scope):
            judge_end(world)
        if world.crash or world.violations:
            self._broke(world, parent, action)
            return
        try:
            key = state_key(world, symmetry=self.scope.symmetry)
        except HangError as error:
            broke(world, error)
            self._broke(world, parent, action)
            return
        if key in self._seen:
            return
        self._seen.add(key)
        self._parents.append((parent, action))
        self.found.states += 1
        if not is_over(world, self.scope):
            self._next.append((self.found.states - 1, freeze(world), tuple(actions(world, self.scope))))
        if self.found.states % PROGRESS_EVERY == 0:
            self.progress(self.found)

    def _broke(self, world: World, parent: int, action: Action) -> None:
        name, message = (world.crash_id, world.crash) if world.crash else _first(world)
        self.found.violations.append(Counterexample(name, message, (*self._path(parent), action)))

    def _path(self, number: int) -> tuple[Action, ...]:
        path: list[Action] = []
        while number > 0:
            number, action = self._parents[number]
            path.append(action)
        return tuple(reversed(path))


def _first(world: World) -> tuple[str, str]:
    first = world.violations[0]
    return first.id, str(first)
