"""Each invariant is broken once, by one change to an honest story, and says so while all others are off."""

from dataclasses import replace

import numpy as np
import pytest

from invariants.auditor import GAUGES, AuditConfig
from invariants.catalogue import select
from invariants.determinism import first_divergence
from paged_attention.plan import Effect, StepPlan
from tests.invariants.reference import TinyCore, World, ints, small_policy


class Once:
    """Changes the first value of a kind that `change` can change (it gives None for those it cannot)."""

    def __init__(self, what, change, *, after=0):
        self.what, self.change, self.after, self.done = what, change, after, False

    def __call__(self, what, value):
        if what == self.what and not self.done:
            if self.after:
                self.after -= 1
                return value
            changed = self.change(value)
            if changed is not None:
                self.done = True
                return changed
        return value


class Always(Once):
    def __call__(self, what, value):
        changed = self.change(value) if what == self.what else None
        return value if changed is None else changed


def busy(name, tamper, *, lag=1, num_pages=10, finish=True, core=None, **world):
    """A run with preemptions, lag, an EOS, a failed step, cancels and a refusal, with one invariant on."""
    policy = small_policy(num_pages=num_pages, lag=lag)
    config = AuditConfig(full_every=1, only=frozenset({name}))
    world = World(policy, tamper=tamper, eos={2: 14}, config=config, core=core and core(policy), **world)
    for request, (prompt, max_tokens) in enumerate([(7, 12), (9, 20), (11, 8), (5, 5), (0, 3), (8, 30)]):
        world.submit(request, prompt, max_tokens)
    for _ in range(3):
        world.step()
    world.step(abandon=True)
    world.step()
    world.cancel(3)
    world.cancel(77)
    if finish:
        world.drain()
    return world


def effect_of(kind, change, where=lambda e: True):
    """Change the first effect of a kind, in a plan or in a tuple of effects."""

    def apply(value):
        effects = value.effects if isinstance(value, StepPlan) else value
        for i, effect in enumerate(effects):
            if effect.kind == kind and where(effect):
                new = change(effect)
                new = (
                    *effects[:i],
                    *([] if new is None else new if isinstance(new, list) else [new]),
                    *effects[i + 1 :],
                )
                return replace(value, effects=new) if isinstance(value, StepPlan) else new
        return None

    return apply


def array_of(field, change, where):
    """Change one array of a plan at the first row for which `where(plan, row)` holds."""

    def apply(plan):
        for row in range(plan.num_rows):
            if where(plan, row):
                array = getattr(plan, field).copy()
                return replace(plan, **{field: change(array, plan, row)})
        return None

    return apply


def put(array, index, value):
    array[index] = value
    return array


def decode(plan, row):
    return plan.slot[row] >= 0


def prefill(plan, row):
    return plan.slot[row] < 0


def first_write(change):
    return lambda writes: [*change(writes[0]), *writes[1:]] if writes else None


def free_less(snapshot):
    return replace(snapshot, free=snapshot.free[1:]) if len(snapshot.free) else None


def table_tail(plan):
    for row in range(plan.num_rows):
        if plan.num_pages[row] < plan.table.shape[1]:
            table = plan.table.copy()
            table[row, -1] = 3
            return replace(plan, table=table)
    return None


def unqueued(snapshot):
    running = snapshot.queues["running"]
    return replace(snapshot, queues={**snapshot.queues, "running": running[1:]}) if len(running) else None


def longer_row(plan):
    if plan.num_rows and plan.slot[0] < 0 and plan.samples[0]:
        count, tokens = plan.count.copy(), plan.tokens
        count[0] += 1
        return replace(plan, count=count, tokens=np.insert(tokens, 0, 1))
    return None


def token_of(change):
    def apply(outcome):
        rows = np.flatnonzero(outcome.token > 0)
        return replace(outcome, token=change(outcome.token.copy(), rows[0])) if len(rows) else None

    return apply


def needless_preemption(plan):
    joined = [e for e in plan.effects if e.kind == "joined"]
    if not joined:
        return None
    e = joined[0]
    return replace(plan, effects=(*plan.effects, Effect("preempted", e.request, e.admission, e.slot)))


def extra_page(plan):
    granted = [e for e in plan.effects if e.kind == "allocated"]
    if not granted:
        return None
    e = granted[-1]
    more = e._replace(first_page=e.first_page + len(e.pages), pages=(19,))
    return replace(plan, effects=(*plan.effects, more))


def overtaken(effect):
    return effect._replace(request=1) if effect.request == 0 else effect


def wrong_resumed_token(plan):
    if plan.num_rows and plan.slot[0] < 0 and plan.admission[0] == 2:
        return replace(plan, tokens=put(plan.tokens.copy(), 0, 49 if plan.tokens[0] != 49 else 48))
    return None


def first_page_twice(e):
    return e._replace(pages=(1, *e.pages[1:]))


def gauge(name):
    at = GAUGES.index(name)
    return lambda gauges: (*gauges[:at], gauges[at] + 1, *gauges[at + 1 :])


def series_of(name):
    return lambda t: replace(t, series={**t.series, name: t.series[name][::-1]})


def ran_with(field, change):
    """Another array of the step's input, in a step with a chunk of several tokens."""

    def apply(evidence):
        ran = evidence.ran
        if ran is None or ran.query_starts[1] < 2:
            return None
        return replace(evidence, ran=replace(ran, **{field: change(ran)}))

    return apply


def doubled_shard(buffers):
    (array,) = buffers.arrays
    return replace(buffers, arrays=(replace(array, boxes=(array.boxes[0],) * 2),))


def older_row(evidence):
    """A row that lacks its newest page."""
    for i, row in enumerate(evidence.rows):
        used = np.count_nonzero(row)
        if used > 1:
            rows = evidence.rows.copy()
            rows[i, used - 1] = 0
            return replace(evidence, rows=rows)
    return None


STORIES = {
    "P1": (Once("plan", effect_of("allocated", first_page_twice), after=1), "page 1 was handed to request"),
    "P2": (Once("snapshot", free_less), "do not make 9"),
    "P3": (Once("plan", effect_of("allocated", lambda e: e._replace(pages=(0,)))), "page 0, the dummy, was allocated"),
    "P5": (Once("apply", effect_of("freed", lambda e: [e, e])), "which gave them back before"),
    "P6": (Once("plan", extra_page), "holds 3 pages for 6 tokens"),
    "P7": (Once("plan", effect_of("allocated", lambda e: e._replace(first_page=e.first_page + 1))), "logical page 1"),
    "P8": (Once("plan", effect_of("allocated", lambda e: e._replace(pages=(900,)))), "page 900 was allocated to"),
    "P9": (Always("snapshot", free_less), "after a failed allocation"),
    "P10": (Once("apply", effect_of("freed", lambda e: None)), "is done but still holds"),
    "P11": (
        Once("apply", effect_of("freed", lambda e: [e, e._replace(kind="unfenced", slot=-1)])),
        "left the fence while a step",
    ),
    "P12": (Always("snapshot", lambda s: replace(s, slot_of={**s.slot_of, 99: 0})), "slots are still mapped: {99: 0}"),
    "P13": (
        Once("plan", effect_of("allocated", lambda e: e._replace(pages=e.pages[::-1]), lambda e: len(e.pages) > 1)),
        "against the declared order 'fifo'",
    ),
    "T1": (Once("plan", array_of("table", lambda t, p, r: put(t, (r, 0), 5), decode)), "is page 5 in step"),
    "T2": (Once("plan", table_tail), "past its"),
    "T3": (Once("plan", effect_of("joined", lambda e: e._replace(slot=99))), "joined in slot 99"),
    "T5": (Once("evidence", older_row), "from before its last change"),
    "T6": (
        Once("evidence", lambda e: replace(e, positions=e.positions + 1) if (e.positions > 0).any() else None),
        "on the device",
    ),
    "K1": (
        Once("writes", first_write(lambda w: [(w[0], (w[1] + 1) % 4, *w[2:])]), after=1),
        "was planned to be written",
    ),
    "K2": (Once("writes", first_write(lambda w: [w, (8, 2, *w[2:])])), "changed outside the planned writes"),
    "K3": (Once("writes", first_write(lambda w: [])), "but still holds nothing (never written)"),
    "K7": (Once("words", lambda w: w[:, ::-1], after=3), "holds the V words of head 0 of the same token"),
    "K8": (Once("buffers", lambda b: replace(b, num_not_donated=4), after=1), "left 4 of the cache's arrays alive"),
    "K10": (Once("buffers", doubled_shard), "hold ((0, 2), (0, 6)) 2 times, not 1"),
    "K9": (Once("writes", first_write(lambda w: [(*w[:3], (0,))])), "wrong in layers [1]"),
    "S1": (Once("plan", lambda p: replace(p, tokens=np.append(p.tokens, np.int32(1)))), "do not fit together"),
    "S2": (Once("plan", array_of("start", lambda a, p, r: put(a, r, a[r] - 1), decode)), "tokens are computed"),
    "S3": (Once("plan", array_of("samples", lambda a, p, r: put(a, r, 1 - a[r]), prefill)), "yields"),
    "S4": (Once("plan", longer_row), "tokens are known"),
    "S5": (Once("plan", effect_of("allocated", lambda e: None, lambda e: e.first_page)), "beyond its"),
    "S6": (Once("snapshot", unqueued), "which is running, is in the queues []"),
    "S7": (Once("plan", effect_of("joined", lambda e: [e, e])), "'joined' of request 0, admission 1, while"),
    "S8": (
        Always("evidence", ran_with("sampled_row", lambda r: put(r.sampled_row.copy(), 0, 0))),
        "was sampled at row 0",
    ),
    "S9": (Once("plan", effect_of("admitted", overtaken)), "before request 0, which heads"),
    "S10": (Once("plan", needless_preemption), "but request 1 is the newest holder"),
    "S13": (Once("submit", lambda v: ((), "too long")), "was refused (too long) although it fits"),
    "O1": (Once("outcome", token_of(lambda t, i: put(t, i, t[i] % 49 + 1))), "but a run by itself yields"),
    "O3": (Once("apply", effect_of("ended", lambda e: None)), "did not end although"),
    "O11": (Once("evidence", ran_with("seed", lambda r: np.roll(r.seed, 1)), after=6), "ran with seed 0 for request"),
    "O10": (Once("outcome", token_of(lambda t, i: put(t, i, -1))), "yielded no token"),
    "R1": (Once("plan", effect_of("preempted", lambda e: e._replace(slot=7))), "'preempted' of request"),
    "R2": (Once("plan", wrong_resumed_token), "is fed token"),
    "R4": (Once("cancel", lambda e: None if e else (Effect("cancelled", 77, 0),)), "cancel of request 77"),
    "M1": (Once("totals", lambda t: replace(t, scheduled_tokens=t.scheduled_tokens + 1)), "scheduled tokens"),
    "M2": (Once("totals", lambda t: replace(t, request_ns=t.request_ns + 1)), "the integral of live requests"),
    "M3": (Once("gauges", gauge("pages_owned")), "the record says pages_owned 3 in step 0"),
    "M6": (Once("gauges", gauge("live_tokens")), "the record says live_tokens"),
    "M7": (Once("gauges", gauge("decode_tokens"), after=3), "the record says decode_tokens"),
    "M8": (Once("totals", series_of("waiting")), "the recorded series tells another 'waiting' among"),
    "M4": (
        Once("done", lambda d: {**d, "first_token_ns": d["first_token_ns"] + 1} if d["first_token_ns"] else None),
        "its first token was at",
    ),
    "M5": (Once("totals", lambda t: replace(t, arrived=t.arrived + 1)), "the record counts (7, "),
    "L6": (Once("pending", lambda p: {5: "asleep"}), "still waits for request 5 (asleep)"),
}


@pytest.mark.parametrize("name", STORIES)
def test_one_change_breaks_the_invariant_and_the_message_says_what(name):
    tamper, words = STORIES[name]
    # A small pool preempts; a page that was never handed out needs a larger one.
    pages = 24 if name in {"P6", "K2"} else 10
    world = busy(name, tamper, num_pages=pages, finish=name in END or name in LATE)
    assert set(world.found) == {name}, world.found
    first = world.auditor.violations[0]
    assert words in first.message, first.message
    assert first.statement
    assert world.auditor.counters()[name]["violated"] >= 1


END = {"P12", "M1", "M2", "M5", "M8", "L6"}
LATE = {"P9", "S10", "R1", "R2", "P10", "P5", "P11", "O3", "M4", "T2"}


def only(name, policy=None, **world):
    return World(policy or small_policy(), config=AuditConfig(full_every=1, only=frozenset({name})), **world)


def test_t6_also_judges_the_host_batch():
    world = only("T6", tamper=Once("snapshot", lambda s: replace(s, positions=s.positions + 2)))
    world.submit(0, 3, 9)
    world.step()
    assert "in the host batch" in world.auditor.violations[0].message


class LazyCore(TinyCore):
    """Leaves the queue alone while anything decodes."""

    def _admit(self, effects):
        return None if any(self.slots) else super()._admit(effects)


def test_s11_names_the_head_that_could_have_been_admitted():
    world = only("S11", core=LazyCore(small_policy()))
    for request in range(2):
        world.submit(request, 5, 9)
    world.drain()
    assert set(world.found) == {"S11"}
    assert "request 1 heads the waiting queue and was not admitted" in world.auditor.violations[0].message


class DeafCore(TinyCore):
    def plan(self):
        return None


def test_s11_and_l6_say_when_a_core_sleeps_on_live_requests():
    for name, words in (("S11", "request 0 is waiting"), ("L6", "request 0 is waiting at the end of the run: waiting")):
        world = only(name, core=DeafCore(small_policy()))
        world.submit(0, 5, 9)
        world.step()
        world.finish()
        assert words in world.auditor.violations[0].message


class SkippingCore(TinyCore):
    """Leaves the last decode out of step 5, though it stands ready."""

    def _plan(self, rows, effects):
        return super()._plan(rows[:-1] if self.step == 5 else rows, effects)


def test_s12_names_the_decode_that_was_left_out():
    world = only("S12", core=SkippingCore(small_policy()))
    for request in range(2):
        world.submit(request, 5, 9)
    world.drain()
    assert world.found == ["S12"]
    assert "the decode of request 1 in slot 1 was left out of 1 steps" in world.auditor.violations[0].message


def test_l1_counts_steps_against_work():
    policy = small_policy()
    world = only("L1", core=TinyCore(replace(policy, prefill_chunk=1)))
    world.submit(0, 30, 2)
    world.drain()
    assert set(world.found) == {"L1"}
    assert "the work left then was 6 rows" in world.auditor.violations[0].message


def empty_plan(step, effects=(), rows=0):
    none = ints([])
    return StepPlan(step, none, none, none, none, none, none, none, none, np.zeros((0, 0), np.int32), tuple(effects))


def test_l2_notices_that_steps_lead_nowhere():
    world = only("L2")
    world.submit(0, 30, 2)
    world.step()
    for step in range(1, 60):
        world.auditor.planned(1000 + step, empty_plan(step), None)
    assert set(world.found) == {"L2"}
    assert "no request got further" in world.auditor.violations[0].message


class LastComeCore(TinyCore):
    """Serves the newest request first."""

    def _admit(self, effects):
        self.waiting.insert(0, self.waiting.pop())
        return super()._admit(effects)


def test_l3_bounds_the_wait_of_the_head():
    world = only("L3", policy=small_policy(batch_size=1), core=LastComeCore(small_policy(batch_size=1)))
    world.submit(0, 4, 2)
    world.submit(1, 4, 2)
    for request in range(2, 30):
        world.submit(request, 4, 2)
        world.step()
        world.step()
    assert set(world.found) == {"L3"}
    assert "request 0 has waited" in world.auditor.violations[0].message


def test_l4_forbids_a_second_preemption_without_progress():
    world = only("L4")
    world.submit(0, 5, 9)
    world.step()
    pages = world.core.live[0].pages
    again = [Effect("admitted", 0, 2), Effect("preempted", 0, 2), Effect("freed", 0, 2)]
    first = [Effect("preempted", 0, 1), Effect("freed", 0, 1, pages=tuple(pages))]
    world.auditor.planned(50, empty_plan(7, first), None)
    world.auditor.planned(60, empty_plan(8, again), None)
    assert world.found == ["L4"]
    assert "request 0 was preempted again before any request had made progress" in str(world.auditor.violations[0])


def test_l5_notices_that_time_stands_still():
    world = only("L5", step_ns=0)
    world.submit(0, 5, 30)
    world.drain()
    assert set(world.found) == {"L5"}
    assert "virtual time stands still" in world.auditor.violations[0].message


def test_l5_notices_a_lost_wake_up():
    world = only("L5")
    world.submit(0, 5, 30)
    world.auditor.finished(5, {}, None, None, world.tamper("totals", totals_of(live=1)))
    assert "the wake-up was lost" in world.auditor.violations[0].message


def totals_of(live):
    from invariants.auditor import Totals

    return Totals(scheduled_tokens=0, arrived=1, finished=0, cancelled=0, rejected=0, live=live)


def test_o3_wants_the_right_reason():
    world = only("O3", tamper=Once("apply", effect_of("ended", lambda e: e._replace(reason="length"))))
    world.submit(0, 5, 3)
    world.drain()
    (violation,) = world.auditor.violations
    assert (violation.expected, violation.found) == ("max_tokens", "length")


def test_s13_wants_what_never_fits_refused():
    world = only("S13", tamper=Once("submit", lambda v: ((Effect("submitted", 0, 0),), None)))
    world.submit(0, 41, 3)
    assert "accepted although its prompt of 41 tokens exceeds the maximum length 40" in str(world.auditor.violations[0])


def test_a_wrong_place_names_the_owner_of_what_it_holds():
    swap = Once("writes", lambda w: [w[0], (*w[1][:2], w[0][2], w[1][3]), *w[2:]] if len(w) > 1 else None)
    world = only("K1", tamper=swap)
    world.submit(4, 6, 3)
    world.step()
    message = world.auditor.violations[0].message
    assert "planned to be written with request 4, admission 1, position 1" in message
    assert "but holds request 4, admission 1, position 0, whose place is page 1, offset 0" in message


def test_s10_forbids_a_preemption_while_pages_are_free():
    world = only("S10", policy=small_policy(batch_size=1), tamper=Once("plan", needless_preemption))
    world.submit(0, 5, 9)
    world.step()
    world.plan()
    assert "request 0 was preempted although its decodes need 0 pages and 21 are free" in str(
        world.auditor.violations[0]
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_r3_wants_what_a_cancelled_request_holds(steps):
    world = only("R3", tamper=Once("cancel", lambda effects: effects[:1]))
    world.submit(0, 9, 9)
    for _ in range(steps):
        world.step()
    world.cancel(0)
    assert "did not give back what it held" in world.auditor.violations[0].message


def test_r3_forbids_a_row_of_a_cancelled_request():
    world = only("R3")
    world.submit(0, 5, 9)
    world.step()
    world.step()
    zombie = world.core.plan()
    world.cancel(0)
    world.auditor.planned(99, zombie, None)
    assert "runs request 0, admission 1, which is cancelled" in world.auditor.violations[0].message


def test_d1_names_the_first_step_that_differs():
    assert first_divergence(["a", "b"], ["a", "b"]) is None
    violation = first_divergence(["a", "b", "c"], ["a", "x", "y"])
    assert violation is not None
    assert (violation.id, violation.step) == ("D1", 1)
    assert "one run has 1 steps and the other 2" in str(first_divergence(["a"], ["a", "b"]))


def test_each_active_invariant_has_a_story_here():
    # O2 needs a decoder: tests/decoder has its story.
    elsewhere = {"R3", "S11", "S12", "L1", "L2", "L3", "L4", "L5", "O2"}
    assert set(STORIES) | elsewhere == select(None, "always")


def test_at_most_max_violations_are_kept_and_all_are_counted():
    config = AuditConfig(full_every=1, only=frozenset({"M3"}), max_violations=3)
    world = World(small_policy(), tamper=Always("gauges", gauge("running")), config=config)
    world.submit(0, 5, 12)
    world.drain()
    assert len(world.auditor.violations) == 3
    assert world.auditor.counters()["M3"]["violated"] > 3


def test_s8_also_wants_query_starts_that_repeat_where_no_row_is():
    def zeros_behind(evidence):
        starts = evidence.ran.query_starts if evidence.ran is not None else ints([])
        if not len(starts) or starts[-1] != starts[-2] or not starts[-1]:
            return None
        return replace(evidence, ran=replace(evidence.ran, query_starts=put(starts.copy(), -1, 0)))

    world = only("S8", tamper=Once("evidence", zeros_behind, after=1))
    world.submit(0, 3, 9)
    world.step()
    assert world.found == ["S8"]
    assert "query start 4 of step 0 is 0 on the device, but the rows before it have 3 tokens" in str(
        world.auditor.violations[0]
    )


def test_t5_also_knows_the_row_of_whoever_was_in_the_slot_before():
    policy = small_policy(batch_size=1)
    seen = []

    def holder_before(evidence):
        seen.append(evidence.rows[:1])
        return replace(evidence, rows=seen[3]) if len(seen) == 7 else None

    world = only("T5", policy=policy, tamper=Always("evidence", holder_before))
    world.submit(0, 3, 3)
    world.submit(1, 3, 9)
    for _ in range(8):
        world.step()
    assert world.found == ["T5"]
    assert "held by request 1" in world.auditor.violations[0].message


def test_m6_also_wants_no_page_too_many_in_any_sequence():
    world = only("M6", tamper=Once("plan", extra_page))
    world.submit(0, 5, 9)
    world.step()
    assert "request 0, admission 1, wastes" in world.auditor.violations[0].message


def test_o11_also_wants_the_right_seeds_in_the_neutral_rows():
    world = only("O11", device=False)
    world.submit(0, 5, 9)
    plan = world.core.plan()
    rows = replace(world.rows(plan), token_seed=np.array([3], np.uint32))
    world.auditor.planned(1, plan, None)
    world.auditor.dispatched(1, plan, rows, None)
    assert "row 0 of step 0 with seed 3 for request 0, whose own is 1000" in world.auditor.violations[0].message
