"""Planted bugs in the page manager, seen from outside: a wrapper changes what the real core says it did."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

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


class LeakOnFinish(CoreWrapper):
    """The pages freed at the end of a request lack the last one."""

    def apply(self, outcome: StepOutcome) -> tuple[Effect, ...]:
        """Drop the last page of everything freed."""
        return tuple(
            effect._replace(pages=effect.pages[:-1]) if effect.kind == "freed" else effect
            for effect in self.core.apply(outcome)
        )


class DoubleAllocation(CoreWrapper):
    """Each second allocation begins with a page that its neighbour in the plan, or an earlier owner, still holds."""

    def __init__(self, core: ServingCore) -> None:
        super().__init__(core)
        self._owned: dict[int, int] = {}

    def plan(self) -> StepPlan | None:
        """Hand out somebody else's page, in the effect and in the table alike."""
        plan = self.core.plan()
        if plan is None:
            return None
        effects = list(plan.effects)
        for index, effect in enumerate(effects):
            if effect.kind != "allocated":
                continue
            stolen = next((page for page, owner in self._owned.items() if owner != effect.request), None)
            if stolen is not None:
                effects[index] = effect._replace(pages=(stolen, *effect.pages[1:]))
                table = plan.table.copy()
                table[(plan.request == effect.request).nonzero()[0], effect.first_page] = stolen
                table.flags.writeable = False
                return replace(plan, effects=tuple(effects), table=table)
            self._owned.update(dict.fromkeys(effect.pages, effect.request))
        self._forget(plan.effects)
        return plan

    def apply(self, outcome: StepOutcome) -> tuple[Effect, ...]:
        """Follow what is given back."""
        effects = self.core.apply(outcome)
        self._forget(effects)
        return effects

    def cancel(self, request: int) -> tuple[Effect, ...]:
        """Follow what is given back."""
        effects = self.core.cancel(request)
        self._forget(effects)
        return effects

    def _forget(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            if effect.kind == "freed":
                for page in effect.pages:
                    self._owned.pop(page, None)
