"""Whoever follows a run without taking part in it; with or without observers a run is the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from paged_attention.plan import Effect, Request, StepOutcome, StepPlan


class Observer(Protocol):
    """Is told what happens, in the order in which it happens; times are simulated ns."""

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """A request came in; `refusal` is the reason where the core refused it."""
        ...

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """A cancel was asked for."""
        ...

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """A step was planned."""
        ...

    def idle(self, now_ns: int) -> None:
        """The core was asked for a plan and had none."""
        ...

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """A step ran."""
        ...

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """A step's outcome was applied."""
        ...

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """A planned step never ran."""
        ...

    def ended(self, now_ns: int, pending: Mapping[int, str]) -> None:
        """Nothing is left to come; `pending` are the requests that are unfinished all the same."""
        ...


class Bystander:
    """An observer that lets everything pass; subclasses override what they follow."""

    def submitted(self, now_ns: int, request: Request, effects: tuple[Effect, ...], refusal: str | None) -> None:
        """See Observer."""

    def cancelled(self, now_ns: int, request: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""

    def planned(self, now_ns: int, plan: StepPlan) -> None:
        """See Observer."""

    def idle(self, now_ns: int) -> None:
        """See Observer."""

    def executed(self, now_ns: int, plan: StepPlan, outcome: StepOutcome) -> None:
        """See Observer."""

    def applied(self, now_ns: int, step: int, effects: tuple[Effect, ...]) -> None:
        """See Observer."""

    def abandoned(self, now_ns: int, plan: StepPlan, effects: tuple[Effect, ...]) -> None:
        """See Observer."""

    def ended(self, now_ns: int, pending: Mapping[int, str]) -> None:
        """See Observer."""


def listeners(observers: Sequence[Observer], hook: str) -> tuple[Callable[..., None], ...]:
    """Each observer's method of that name, but for those that let it pass."""
    passes = getattr(Bystander, hook)
    return tuple(getattr(observer, hook) for observer in observers if getattr(type(observer), hook) is not passes)
