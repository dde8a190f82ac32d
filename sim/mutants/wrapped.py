"""Planted bugs that wrap whatever core or backend runs, ours or another: the first three to try on code of your own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from backends.protocol import CacheSpec, DeviceSpec, ModelSpec, Pending
from paged_attention.plan import Effect, ModelRows, StepOutcome, StepPlan
from sim.backend_wrapper import BackendWrapper
from sim.cores.protocol import ServingCore
from sim.mutants.core_wrapper import CoreWrapper
from sim.mutants.mutant import Mutant


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


class WrongOffset(BackendWrapper):
    """Decode rows are executed at offset (position + 1) % page_size of the right page."""

    _page_size = 1

    def open(self, cache: CacheSpec, model: ModelSpec, devices: DeviceSpec) -> None:
        """Remember the page size."""
        self._page_size = cache.page_size
        self.backend.open(cache, model, devices)

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        """Execute the plan's rows, decodes shifted by one within their page."""
        size = self._page_size
        in_page = plan.start % size
        shifted = np.where(plan.slot >= 0, plan.start - in_page + (in_page + 1) % size, plan.start).astype(np.int32)
        return self.backend.execute(replace(plan, start=shifted, native=None), rows)


MUTANTS = (
    Mutant("leak-on-finish", "A finished request gives back all its pages but the last.", ("P10",), core=LeakOnFinish),
    Mutant(
        "double-allocation",
        "A page that another request owns is handed out a second time.",
        ("P1",),
        core=DoubleAllocation,
    ),
    Mutant(
        "wrong-offset",
        "Decodes write their K/V one place behind the right one in its page.",
        ("K1",),
        where="device",
        backend=WrongOffset,
    ),
)
