"""Drives an engine the way the simulator does, and keeps the few facts that the tests of this folder ask for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from paged_attention.engine import PagedAttentionEngine
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.plan import EOS_TOKEN, Effect, Request, StepOutcome, StepPlan
from paged_attention.scheduler import SchedulingPolicy


def make_engine(
    batch_size: int = 3,
    page_size: int = 2,
    num_pages: int = 12,
    max_sequences: int = 16,
    prefill_chunk: int = 4,
    lag: int = 0,
    preemption: str = "recompute",
    **policy: object,
) -> PagedAttentionEngine:
    metadata = PagedAttentionCacheMetaData(
        batch_size=batch_size,
        num_hidden_layers=1,
        num_pages_per_layer=num_pages,
        num_pages_per_sequence=-(-max_sequences // page_size),
        max_sequences=max_sequences,
        page_size=page_size,
        num_kv_heads=1,
        kv_head_dim_size=1,
        hbm_utilization=1.0,
    )
    return PagedAttentionEngine(
        metadata, prefill_chunk=prefill_chunk, lag=lag, policy=SchedulingPolicy(preemption=preemption, **policy)
    )


def make_request(number: int, prompt: int = 3, max_tokens: int = 4) -> Request:
    return Request(id=number, prompt=np.arange(1, prompt + 1, dtype=np.int32), max_tokens=max_tokens, seed=number)


@dataclass
class World:
    """An engine, the steps in flight, and what every request has yielded.

    `eos_at` names the position of a request's EOS token; token values are 1000 * request + position.
    """

    engine: PagedAttentionEngine
    eos_at: dict[int, int] = field(default_factory=dict)
    flights: deque[tuple[StepPlan, StepOutcome]] = field(default_factory=deque)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)
    dead: set[tuple[int, int]] = field(default_factory=set)

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.effects += self.engine.submit(request)

    def cancel(self, request: int) -> None:
        self.effects += self.engine.cancel(request)

    def plan(self) -> StepPlan | None:
        plan = self.engine.plan()
        if plan is not None:
            self.plans.append(plan)
            self.effects += plan.effects
            self.flights.append((plan, self.outcome(plan)))
        return plan

    def outcome(self, plan: StepPlan) -> StepOutcome:
        token = np.full(plan.num_rows, -1, np.int32)
        eos = np.zeros(plan.num_rows, np.int32)
        for row in range(plan.num_rows):
            who = (int(plan.request[row]), int(plan.admission[row]))
            if who in self.dead or not plan.samples[row]:
                continue
            position = int(plan.start[row] + plan.count[row])
            eos[row] = self.eos_at.get(who[0]) == position
            token[row] = EOS_TOKEN if eos[row] else 1000 * who[0] + position
            if eos[row]:
                self.dead.add(who)
        return StepOutcome(plan.step, token, eos)

    def apply(self) -> tuple[Effect, ...]:
        plan, outcome = self.flights.popleft()
        alive = set(self.engine.pending())
        for row in range(plan.num_rows):
            request = int(plan.request[row])
            if outcome.token[row] != -1 and request in alive:
                self.tokens.setdefault(request, []).append(int(outcome.token[row]))
        effects = self.engine.apply(outcome)
        self.effects += effects
        return effects

    def step(self) -> bool:
        """Fill the pipeline and finish one step; False where nothing is left to do."""
        while len(self.flights) <= self.engine.lag and self.plan() is not None:
            pass
        if not self.flights:
            return False
        self.apply()
        return True

    def drain(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"not drained after {max_steps} steps: {dict(self.engine.pending())}")

    def count(self, kind: str, request: int | None = None) -> int:
        return sum(e.kind == kind and request in (None, e.request) for e in self.effects)


def is_pristine(engine: PagedAttentionEngine) -> bool:
    """Every page is free, every slot is free and cleared, every queue and map is empty."""
    snapshot = engine.snapshot()
    return (
        sorted(snapshot.free.tolist()) == list(range(1, engine.metadata.num_pages_per_layer))
        and not len(snapshot.fenced)
        and not snapshot.rows.any()
        and (snapshot.positions == -1).all()
        and not snapshot.slot_of
        and not snapshot.pages
        and not any(len(queue) for queue in snapshot.queues.values())
        and sorted(engine.batch.available_slots) == list(range(engine.metadata.batch_size))
        and not engine.batch.active_slot_requests_map
    )
