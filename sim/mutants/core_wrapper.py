"""A serving core around a serving core: what a core says or does differently from the one inside."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from paged_attention.plan import CoreSnapshot, DeclaredPolicy, Effect, Request, StepOutcome, StepPlan
from sim.cores.protocol import ServingCore


class CoreWrapper:
    """A serving core that passes everything on; a mutant overrides what it breaks."""

    def __init__(self, core: ServingCore) -> None:
        self.core = core

    @property
    def policy(self) -> DeclaredPolicy:
        """See ServingCore."""
        return self.core.policy

    def submit(self, request: Request) -> tuple[Effect, ...]:
        """See ServingCore."""
        return self.core.submit(request)

    def cancel(self, request: int) -> tuple[Effect, ...]:
        """See ServingCore."""
        return self.core.cancel(request)

    def plan(self) -> StepPlan | None:
        """See ServingCore."""
        return self.core.plan()

    def apply(self, outcome: StepOutcome) -> tuple[Effect, ...]:
        """See ServingCore."""
        return self.core.apply(outcome)

    def abandon(self, step: int) -> tuple[Effect, ...]:
        """See ServingCore."""
        return self.core.abandon(step)

    def pending(self) -> Mapping[int, str]:
        """See ServingCore."""
        return self.core.pending()

    def snapshot(self) -> CoreSnapshot:
        """See ServingCore."""
        return self.core.snapshot()

    def fork(self) -> ServingCore:
        """A wrapper of the same kind, in the same state, around a fork."""
        twin = type(self)(self.core.fork())
        vars(twin).update({name: deepcopy(value) for name, value in vars(self).items() if name != "core"})
        return twin
