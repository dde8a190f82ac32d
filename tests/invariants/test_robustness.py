"""Whatever a core says, the auditor answers with violations, never with an exception."""

from dataclasses import fields, replace
from random import Random
from unittest.mock import patch

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from invariants import contents
from invariants.auditor import AuditConfig
from paged_attention.plan import EFFECT_KINDS, Effect, StepOutcome, StepPlan
from tests.invariants.reference import World, small_policy

ROWS = ("request", "admission", "slot", "start", "count", "samples", "tokens", "num_pages")


class Liar:
    """Changes what the auditor is told, at random: effects lost, doubled, exchanged, invented; numbers changed."""

    def __init__(self, random):
        self.random = random

    def __call__(self, what, value):
        if self.random.random() > 0.15:
            return value
        if what == "told":
            return self._plan(value)
        if what in {"apply", "cancel"}:
            return self._effects(value)
        if what == "seen":
            return self._outcome(value)
        return value

    def _number(self):
        return self.random.choice([-1, 0, 1, 2, 3, 5, 900])

    def _effects(self, effects):
        effects = list(effects)
        kind = self.random.randrange(3)
        if kind == 0 and effects:
            effects.pop(self.random.randrange(len(effects)))
        elif kind == 1 and effects:
            effects.insert(0, self.random.choice(effects))
        else:
            pages = tuple(self._number() for _ in range(self.random.randrange(3)))
            name = self.random.choice(EFFECT_KINDS)
            effects.append(Effect(name, self._number(), self._number(), self._number(), self._number(), pages, "eos"))
        return tuple(effects)

    def _plan(self, plan: StepPlan):
        if self.random.random() < 0.5:
            return replace(plan, effects=self._effects(plan.effects))
        name = self.random.choice(ROWS)
        array = getattr(plan, name).copy()
        if len(array):
            array[self.random.randrange(len(array))] = self._number()
        if self.random.random() < 0.1:
            array = array[:-1]
        return replace(plan, **{name: array})

    def _outcome(self, outcome: StepOutcome):
        name = self.random.choice(["token", "eos"])
        array = getattr(outcome, name).copy()
        array[self.random.randrange(len(array))] = self._number()
        return replace(outcome, **{name: array[: None if self.random.random() < 0.9 else -1]})


class LyingWorld(World):
    """The device runs the honest plan; the auditor is told another one."""

    def plan(self, *, abandon=False):
        auditor, self.auditor = self.auditor, self
        try:
            self.real = auditor
            return super().plan(abandon=abandon)
        finally:
            self.auditor = auditor

    def planned(self, now, plan, snapshot):
        self.told = self.tamper("told", plan)
        self.real.planned(now, self.told, snapshot)

    def dispatched(self, now, plan, rows, device):
        self.real.dispatched(now, self.told if len(self.told.request) == plan.num_rows else plan, rows, device)

    def idle(self, *args):
        self.real.idle(*args)

    def measured(self, *args):
        self.real.measured(*args)

    def abandoned(self, *args):
        self.real.abandoned(*args)


def judged_lies(seed, lag, vocab):
    """What an auditor says that is lied to; it never raises."""
    policy = small_policy(num_pages=9, lag=lag)
    config = AuditConfig(full_every=2, max_violations=10_000)
    world = LyingWorld(
        policy, tamper=Liar(Random(seed)), eos={1: 12}, config=config, device=vocab is not None, vocab=vocab
    )
    for request, (prompt, max_tokens) in enumerate([(7, 12), (9, 9), (11, 8), (5, 5), (8, 20)]):
        world.submit(request, prompt, max_tokens)
    for step in range(60):
        world.step(abandon=step % 13 == 5)
        if step == 8:
            world.cancel(3)
    return world.auditor


@settings(max_examples=50, deadline=None)
@example(24206, 0, 50)
@given(st.integers(0, 2**32), st.integers(0, 2), st.sampled_from([None, 50]))
def test_no_lie_makes_the_auditor_raise(seed, lag, vocab):
    auditor = judged_lies(seed, lag, vocab)
    for violation in auditor.violations:
        assert violation.to_json()["message"]
        assert {f.name for f in fields(violation)} == set(violation.to_json())
    assert isinstance(np.sum([c["violated"] for c in auditor.counters().values()]), np.integer)


@settings(max_examples=50, deadline=None)
@example(24206, 0)
@given(st.integers(0, 2**32), st.integers(0, 2))
def test_no_lie_makes_the_auditor_raise_where_it_looks_at_a_part_of_the_pool(seed, lag):
    with patch.multiple(contents, SMALL_PLACES=0, SMALL_TOUCHED=0):
        assert judged_lies(seed, lag, 50).violations
