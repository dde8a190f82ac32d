import threading
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_attention import GenerationStepTask, SamplingParams
from paged_attention.plan import EOS_TOKEN, Request, StepOutcome, StepPlan
from paged_attention.scheduler import release_slot
from tests.paged_attention.harness import World, is_pristine, make_engine, make_request


def expected_tokens(request: Request, max_sequences: int, eos_at: int | None = None) -> list[int]:
    """What a request yields, by the rules alone."""
    length = len(request.prompt)
    count = min(request.max_tokens, max_sequences - length + 1)
    positions = range(length, length + count)
    tokens = [1000 * request.id + position for position in positions]
    if eos_at is not None and eos_at in positions:
        tokens = [*tokens[: eos_at - length], EOS_TOKEN]
    return tokens


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_request_yields_its_tokens_and_leaves_nothing_behind(lag: int):
    world = World(make_engine(lag=lag))
    request = make_request(7, prompt=5, max_tokens=6)
    world.submit(request)
    world.drain()
    assert world.tokens[7] == expected_tokens(request, 16)
    assert [e.reason for e in world.effects if e.kind == "ended"] == ["max_tokens"]
    assert is_pristine(world.engine)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "reason"), [(16, 5, "length"), (14, 9, "length"), (14, 3, "max_tokens")]
)
def test_seed_06_07_a_sequence_that_reaches_the_maximum_ends_by_length(prompt: int, max_tokens: int, reason: str):
    world = World(make_engine(max_sequences=16))
    request = make_request(0, prompt, max_tokens)
    world.submit(request)
    world.drain()
    assert world.tokens[0] == expected_tokens(request, 16)
    assert [e.reason for e in world.effects if e.kind == "ended"] == [reason]
    assert max(int((plan.start + plan.count).max()) for plan in world.plans) <= 16


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (17, 1, "the prompt has 17 tokens and a sequence at most 16"),
        (9, 3, "its prompt of 9 and its 3 new tokens need 6 pages; the pool has 5"),
        (0, 1, "the prompt is empty"),
        (1, 0, "max_tokens is 0"),
    ],
)
def test_seed_07_08_24_what_can_never_run_is_refused_and_nothing_changes(prompt: int, max_tokens: int, message: str):
    engine = make_engine(num_pages=6, page_size=2, max_sequences=16)
    with pytest.raises(ValueError, match=message):
        engine.submit(make_request(0, prompt, max_tokens))
    assert not engine.pending()
    assert is_pristine(engine)


@given(prompt=st.integers(0, 18), max_tokens=st.integers(0, 18), num_pages=st.integers(2, 12))
@settings(max_examples=200, deadline=None)
def test_seed_07_16_a_request_is_refused_exactly_where_it_can_never_finish(
    prompt: int, max_tokens: int, num_pages: int
):
    world = World(make_engine(num_pages=num_pages, page_size=2, max_sequences=16))
    fits = 1 <= prompt <= 16 and max_tokens >= 1 and min(prompt + max_tokens - 1, 16) <= 2 * (num_pages - 1)
    request = make_request(0, prompt, max_tokens)
    if not fits:
        with pytest.raises(ValueError, match="request 0: "):
            world.submit(request)
        return
    world.submit(request)
    world.drain()
    assert world.tokens[0] == expected_tokens(request, 16)


def test_an_id_in_use_is_refused():
    engine = make_engine()
    engine.submit(make_request(3))
    with pytest.raises(ValueError, match="request 3: that id belongs to an unfinished request"):
        engine.submit(make_request(3))


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_seed_08_a_request_yields_exactly_max_tokens(lag: int, max_tokens: int):
    world = World(make_engine(lag=lag))
    world.submit(*(make_request(i, 3, max_tokens) for i in range(5)))
    world.drain()
    assert {r: len(t) for r, t in world.tokens.items()} == dict.fromkeys(range(5), max_tokens)


def test_seed_02_13_a_chunk_that_ends_inside_a_page_is_continued_there_and_the_last_one_samples():
    world = World(make_engine(prefill_chunk=3, page_size=2, max_sequences=16))
    world.submit(make_request(0, prompt=8, max_tokens=1))
    world.drain()
    assert [(int(p.start[0]), int(p.count[0]), int(p.samples[0]), _pages_of(p, 0)) for p in world.plans] == [
        (0, 3, 0, [1, 2]),
        (3, 3, 0, [1, 2, 3]),
        (6, 2, 1, [1, 2, 3, 4]),
    ]


def _pages_of(plan: StepPlan, row: int) -> list[int]:
    return plan.table[row, : plan.num_pages[row]].tolist()


def test_seed_14_one_free_page_and_one_sequence_in_need_is_enough():
    world = World(make_engine(batch_size=2, num_pages=6, page_size=2, preemption="none"))
    world.submit(make_request(0, prompt=2, max_tokens=3), make_request(1, prompt=3, max_tokens=2))
    world.drain()
    assert {r: len(t) for r, t in world.tokens.items()} == {0: 3, 1: 2}
    grown = [e for e in world.effects if e.kind == "allocated" and e.first_page > 0]
    assert [(e.request, len(e.pages)) for e in grown] == [(0, 1)]


def test_seed_14_of_three_decodes_the_one_at_a_page_boundary_takes_the_last_page():
    world = World(make_engine(num_pages=5, page_size=4, preemption="none"))
    for request, max_tokens in enumerate((8, 4, 3)):
        world.submit(make_request(request, prompt=1, max_tokens=max_tokens))
    for _ in range(4):
        world.step()
    assert (world.engine.snapshot().free.tolist(), len(world.engine.snapshot().slot_of)) == ([4], 3)
    plan = world.plan()
    assert plan is not None
    assert [(e.kind, e.request, e.first_page, e.pages) for e in plan.effects] == [("allocated", 0, 1, (4,))]
    world.apply()
    world.drain()


def starved(preemption: str) -> World:
    """Two sequences of which either fits alone, but not both."""
    world = World(make_engine(batch_size=2, num_pages=6, page_size=2, preemption=preemption))
    world.submit(make_request(0, prompt=3, max_tokens=6), make_request(1, prompt=3, max_tokens=6))
    return world


def test_seed_15_16_without_preemption_a_want_of_pages_raises_and_changes_nothing():
    world = starved("none")
    with pytest.raises(NotImplementedError, match="preemption 'recompute'"):
        world.drain()
    before, queues = world.engine.snapshot(), dict(world.engine.pending())
    with pytest.raises(NotImplementedError):
        world.engine.plan()
    after = world.engine.snapshot()
    assert after.free.tolist() == before.free.tolist()
    assert (after.rows == before.rows).all()
    assert (after.positions == before.positions).all()
    assert dict(world.engine.pending()) == queues


def scheduler_state(engine) -> list[object]:
    """Everything that a plan may change, as plain values."""
    scheduler, batch, books = engine.books.scheduler, engine.batch, engine.books
    return [
        scheduler.manager.free_pages,
        [(p.id, p.chunk_idx, p.page_indices.tolist()) for p in scheduler.prefill_queue],
        [(t.id, t.slot, t.position, list(t.page_indices)) for t in scheduler.decodes_queue],
        (scheduler.decode_wait, scheduler.prefill_wait),
        list(batch.available_slots),
        {slot: (t.id, list(t.page_indices)) for slot, t in batch.active_slot_requests_map.items()},
        batch.positions.tolist(),
        batch.page_table.tolist(),
        {
            s.request.id: (s.state, s.admission, s.slot, s.fed, s.planned, list(s.pages))
            for s in books.sequences.values()
        },
    ]


@pytest.mark.parametrize(
    ("prompts", "num_free", "queues"),
    [((2, 2, 1, 1), 0, [[0, 1], [2], [3]]), ((2, 3, 4), 1, [[0, 1], [], [2]])],
    ids=["a queued decode", "a page too few"],
)
def test_seed_15_a_plan_that_raises_leaves_queues_slots_pages_and_tasks_as_they_were(
    prompts: tuple[int, ...], num_free: int, queues: list[list[int]]
):
    world = World(make_engine(batch_size=4, num_pages=6, page_size=2, preemption="none"))
    world.submit(*(make_request(i, prompt, max_tokens=6) for i, prompt in enumerate(prompts)))
    for _ in range(3):
        world.step()
    for _ in range(2):
        free = world.engine.books.manager.free_pages
        with pytest.raises(NotImplementedError):
            world.plan()
        assert world.engine.books.manager.free_pages == free
    assert len(free) == num_free
    before, found = scheduler_state(world.engine), world.engine.snapshot().queues
    assert [found[name].tolist() for name in ("running", "joining", "waiting")] == queues
    assert [task.id for task in world.engine.books.scheduler.decodes_queue] == queues[1]
    with pytest.raises(NotImplementedError):
        world.plan()
    assert scheduler_state(world.engine) == before


def test_seed_16_a_prefill_starts_only_when_the_pages_of_its_whole_prompt_are_free():
    world = World(make_engine(num_pages=8, page_size=2))
    world.submit(make_request(0, prompt=2, max_tokens=8), make_request(1, prompt=12, max_tokens=1))
    world.drain()
    happened = [(e.kind, e.request) for e in world.effects]
    assert happened.index(("ended", 0)) < happened.index(("admitted", 1))


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_seed_16_with_recompute_the_newest_is_preempted_and_both_finish_with_their_tokens(lag: int):
    world = starved("recompute")
    world.engine.lag = lag
    world.drain()
    assert world.count("preempted", 1) >= 1
    assert world.count("preempted", 0) == 0
    for request in (0, 1):
        assert world.tokens[request] == expected_tokens(make_request(request, 3, 6), 16)
    assert is_pristine(world.engine)


def test_seed_16_as_many_are_preempted_as_it_takes_and_no_more():
    world = World(make_engine(num_pages=5, page_size=2))
    requests = [make_request(i, prompt, max_tokens=4) for i, prompt in enumerate((2, 1, 2))]
    world.submit(*requests)
    for _ in range(3):
        world.step()
    plan = world.plan()
    assert plan is not None
    assert [e.request for e in plan.effects if e.kind == "preempted"] == [2, 1]
    world.drain()
    assert world.tokens == {request.id: expected_tokens(request, 16) for request in requests}


def test_a_preempted_sequence_feeds_its_prompt_and_what_it_has_generated():
    world = starved("recompute")
    world.drain()
    chunks = [p.tokens[: p.count[0]] for p in world.plans if p.slot[0] == -1 and p.admission[0] == 2]
    fed = np.concatenate(chunks).tolist()
    generated = fed[3:]
    assert fed[:3] == [1, 2, 3]
    assert generated
    assert generated == [1003, 1004, 1005, 1006, 1007][: len(generated)]


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("by_eos", [True, False])
def test_seed_17_a_request_that_completes_at_its_prefill_never_decodes(lag: int, by_eos: bool):
    world = World(make_engine(lag=lag), eos_at={0: 3} if by_eos else {})
    world.submit(make_request(0, prompt=3, max_tokens=5 if by_eos else 1))
    world.drain()
    assert len(world.tokens[0]) == 1
    if lag == 0 or not by_eos:
        assert world.count("joined") == 0
    assert is_pristine(world.engine)


def test_seed_17_20_an_eos_that_comes_while_its_sequence_waits_for_a_page_takes_it_out_of_the_queue():
    world = World(make_engine(batch_size=2, num_pages=3, page_size=2, lag=1), eos_at={1: 2})
    world.submit(make_request(0, prompt=1, max_tokens=2), make_request(1, prompt=2, max_tokens=2))
    world.plan()
    world.plan()
    world.apply()
    assert world.plan() is None
    assert world.engine.snapshot().queues["joining"].tolist() == [1]
    world.drain()
    assert world.tokens == {0: [1, 2], 1: [EOS_TOKEN]}
    assert world.count("joined", 1) == 0
    assert is_pristine(world.engine)


def test_seed_20_nothing_to_do_plans_nothing():
    engine = make_engine()
    assert engine.plan() is None
    assert is_pristine(engine)


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("steps", range(14))
def test_seed_22_a_request_can_be_cancelled_in_every_state_and_frees_once(lag: int, steps: int):
    world = World(make_engine(lag=lag, prefill_chunk=2))
    world.submit(make_request(0, prompt=5, max_tokens=4), make_request(1, prompt=5, max_tokens=4))
    for _ in range(steps):
        world.plan()
        if len(world.flights) > lag:
            world.apply()
    queued = {request for queue in world.engine.snapshot().queues.values() for request in queue.tolist()}
    world.cancel(1)
    assert world.count("cancelled", 1) == (1 in queued)
    world.cancel(1)
    world.cancel(99)
    world.drain()
    assert world.tokens[0] == expected_tokens(make_request(0, 5, 4), 16)
    assert world.count("freed", 1) <= 1
    assert is_pristine(world.engine)


def test_seed_03_a_slot_given_back_has_no_position_and_no_pages_and_is_the_last_to_be_handed_out():
    batch = make_engine().batch
    slot = batch.available_slots.get_nowait()
    task = GenerationStepTask(7, slot, 5, [4, 5, 6], np.int32(1), SamplingParams())
    batch.insert_from_task(slot, task)
    batch.active_slot_requests_map[slot] = task
    release_slot(batch, slot)
    assert batch.positions.tolist() == [-1] * 3
    assert not batch.page_table.any()
    assert list(batch.available_slots) == [1, 2, 0]
    assert not batch.active_slot_requests_map


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_seed_05_pages_that_a_step_in_flight_may_touch_wait_behind_the_fence(steps: int):
    world = World(make_engine(lag=2))
    world.submit(make_request(0, prompt=3, max_tokens=8))
    for _ in range(steps):
        world.plan()
    held = tuple(page for e in world.effects if e.kind == "allocated" for page in e.pages)
    world.cancel(0)
    for _ in range(steps - 1):
        assert world.engine.snapshot().fenced.tolist() == list(held)
        assert not set(world.engine.snapshot().free.tolist()) & set(held)
        assert world.apply() == ()
    assert [(e.kind, e.pages) for e in world.apply()] == [("unfenced", held)]
    assert is_pristine(world.engine)


def test_seed_21_shutting_down_gives_every_page_and_slot_back():
    world = World(make_engine(lag=1))
    world.submit(*(make_request(i, 5, 4) for i in range(6)))
    for _ in range(4):
        world.step()
    world.effects += world.engine.shutdown()
    assert not world.engine.pending()
    assert {e.request for e in world.effects if e.kind in ("ended", "cancelled")} == set(range(6))
    assert world.plan() is None
    with pytest.raises(ValueError, match="shut down"):
        world.engine.submit(make_request(9))
    world.drain()
    assert is_pristine(world.engine)


def test_seed_04_an_outcome_belongs_to_who_ran_and_not_to_who_sits_in_the_slot_now():
    world = World(make_engine(batch_size=1, lag=1))
    world.submit(make_request(0, prompt=1, max_tokens=9), make_request(1, prompt=1, max_tokens=3))
    for _ in range(3):
        world.step()
    world.cancel(0)
    world.drain()
    assert world.tokens[1] == expected_tokens(make_request(1, 1, 3), 16)


@pytest.mark.parametrize("eos_at", [None, 2, 3])
def test_seed_04_tokens_and_an_eos_of_a_cancelled_request_pass_over_the_next_one_in_its_slot(eos_at: int | None):
    world = World(make_engine(batch_size=1, lag=2), eos_at={0: eos_at})
    world.submit(make_request(0, prompt=1, max_tokens=9), make_request(1, prompt=1, max_tokens=5))
    for _ in range(3):
        world.plan()
    world.apply()
    world.cancel(0)
    while world.step():
        for plan in list(world.plans):
            decodes = (plan.slot >= 0) & (plan.request == 1) & (plan.tokens[-plan.num_rows :] != -1)
            assert plan.tokens[-plan.num_rows :][decodes].tolist() == (1000 + plan.start[decodes]).tolist()
    assert world.tokens[1] == expected_tokens(make_request(1, 1, 5), 16)
    assert [(e.request, e.reason) for e in world.effects if e.kind == "ended"] == [(1, "max_tokens")]
    assert is_pristine(world.engine)


def outcome_of(plan, eos: bool) -> StepOutcome:
    return StepOutcome(plan.step, np.full(plan.num_rows, 7, np.int32), np.full(plan.num_rows, eos, np.int32))


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_seed_04_an_end_in_flight_is_not_that_of_a_new_request_with_the_same_id(max_tokens: int):
    engine = make_engine(batch_size=1, lag=2)
    engine.submit(make_request(0, prompt=1, max_tokens=max_tokens))
    flights = [plan for plan in (engine.plan(), engine.plan()) if plan is not None]
    engine.cancel(0)
    engine.submit(make_request(0, prompt=2, max_tokens=3))
    for plan in flights:
        assert not [e for e in engine.apply(outcome_of(plan, eos=True)) if e.kind == "ended"]
    assert dict(engine.pending()) == {0: "waits for a slot and for the pages of its prompt"}
    ended = []
    while (plan := engine.plan()) is not None:
        ended += [
            (plan.start + plan.count).tolist() for _ in engine.apply(outcome_of(plan, eos=False)) if _.kind == "ended"
        ]
    assert ended == [[4]]


@pytest.mark.parametrize("step", [1, 5])
def test_an_outcome_out_of_order_or_of_the_wrong_size_is_refused(step: int):
    world = World(make_engine(lag=1))
    world.submit(make_request(0))
    world.plan()
    with pytest.raises(ValueError, match="the oldest step in flight is 0"):
        world.engine.apply(StepOutcome(step, np.zeros(1, np.int32), np.zeros(1, np.int32)))
    with pytest.raises(ValueError, match="1 rows were planned, found 2 tokens"):
        world.engine.apply(StepOutcome(0, np.zeros(2, np.int32), np.zeros(2, np.int32)))


@pytest.mark.parametrize("lost_plans", [0, 1, 2])
@pytest.mark.parametrize(("mix", "max_wait"), [("prefill_first", 0), ("prefill_first", 2), ("decode_first", 2)])
def test_seed_23_neither_side_waits_longer_than_the_bound(mix: str, max_wait: int, lost_plans: int):
    engine = make_engine(
        batch_size=4, num_pages=60, mix=mix, max_decode_wait=max_wait, max_prefill_wait=max_wait, prefill_chunk=2
    )
    world = World(engine)
    world.submit(*(make_request(i, prompt=9, max_tokens=8) for i in range(8)))
    waited, most = 0, 0
    for _ in range(400):
        had_decodes = bool((engine.batch.positions >= 0).any())
        for _ in range(lost_plans):
            if (lost := engine.plan()) is not None:
                engine.abandon(lost.step)
        plan = world.plan()
        if plan is None:
            break
        ran = plan.slot != -1 if mix == "prefill_first" else plan.slot == -1
        could = had_decodes if mix == "prefill_first" else bool(len(world.engine.snapshot().queues["prefill"]))
        waited = waited + 1 if could and not ran.any() else 0
        most = max(most, waited)
        world.apply()
    assert most == max_wait
    assert not engine.pending()


@pytest.mark.parametrize("bound", ["max_decode_wait", "max_prefill_wait"])
def test_seed_23_a_bound_below_zero_is_refused(bound: str):
    with pytest.raises(ValueError, match=f"{bound}=-1"):
        make_engine(**{bound: -1})


@pytest.mark.parametrize("forked", [False, True])
def test_seed_27_an_engine_works_on_while_another_is_locked_and_sees_nothing_of_it(forked: bool):
    first = make_engine()
    second = first.fork() if forked else make_engine()
    done: list[object] = []

    def work() -> None:
        second.submit(make_request(0))
        done.append(second.plan())

    thread = threading.Thread(target=work, daemon=True)
    with first._lock, first.batch.context_lock:
        thread.start()
        thread.join(timeout=30)
    assert len(done) == 1
    assert is_pristine(first)
    assert not first.pending()


def test_seed_27_two_engines_do_not_share_a_lock():
    first, second = make_engine(), make_engine()
    assert first.batch.context_lock is not second.batch.context_lock
    with first.batch.context_lock:
        second.submit(make_request(0))
        assert second.plan() is not None


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_seed_32_the_queue_between_prefill_and_decode_never_outgrows_the_slots(lag: int):
    world = World(make_engine(batch_size=2, num_pages=60, lag=lag))
    world.submit(*(make_request(i, prompt=2, max_tokens=6) for i in range(12)))
    for _ in range(200):
        if not world.step():
            break
        snapshot = world.engine.snapshot()
        assert len(snapshot.queues["joining"]) + len(snapshot.slot_of) <= 2
        unfinished = set(range(12)) - {e.request for e in world.effects if e.kind == "ended"}
        assert set(world.engine.pending()) == unfinished
    assert len(world.tokens) == 12


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_seed_32_no_more_than_lag_and_one_steps_are_in_flight(lag: int):
    world = World(make_engine(lag=lag))
    world.submit(make_request(0, prompt=2, max_tokens=9))
    assert [world.plan() is not None for _ in range(lag + 2)] == [True] * (lag + 1) + [False]


@pytest.mark.parametrize("num_pages", [7, 30])
def test_seed_30_pages_are_handed_out_in_the_order_in_which_they_came_back_and_none_in_vain(num_pages: int):
    world = World(make_engine(num_pages=num_pages, prefill_chunk=3))
    world.submit(*(make_request(i, prompt=1 + i % 6, max_tokens=1 + 5 * i % 7) for i in range(20)))
    world.drain()
    free = deque(range(1, num_pages))
    for effect in world.effects:
        if effect.kind == "allocated":
            assert effect.pages == tuple(free.popleft() for _ in effect.pages)
        elif effect.kind == "freed":
            free.extend(effect.pages)
    assert world.engine.snapshot().free.tolist() == list(free)
    assert (world.count("preempted") > 0) == (num_pages == 7)


def told(plan) -> list[object]:
    """The page lists that a plan hands to the device, copied."""
    native = plan.native
    return [
        [list(task.page_indices) for task in native.new_decodes_requests],
        (native.prefill_request.chunk_idx, native.prefill_request.page_indices.tolist()),
    ]


def test_seed_28_a_sequences_pages_are_no_list_that_plans_and_snapshots_share():
    world = World(make_engine(num_pages=30, prefill_chunk=2))
    world.submit(*(make_request(i, prompt=5, max_tokens=7) for i in range(3)))
    kept = []
    while world.step():
        snapshot = world.engine.snapshot()
        kept.append((snapshot, snapshot.rows.tolist(), world.plans[-1], told(world.plans[-1])))
        for request, slot in snapshot.slot_of.items():
            row = snapshot.rows[slot]
            assert row[row != 0].tolist() == snapshot.pages[request, 1].tolist()
    for snapshot, rows, plan, then in kept:
        assert snapshot.rows.tolist() == rows
        assert told(plan) == then


def test_admission_is_first_come_first_served():
    world = World(make_engine(num_pages=8))
    world.submit(*(make_request(i, prompt=2 + i % 5, max_tokens=5) for i in range(10)))
    world.drain()
    first = [e.request for e in world.effects if e.kind == "admitted" and e.admission == 1]
    assert first == sorted(first)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_an_abandoned_step_is_planned_again_with_the_same_rows(lag: int):
    world = World(make_engine(lag=lag, prefill_chunk=3))
    world.submit(*(make_request(i, prompt=5, max_tokens=4) for i in range(3)))
    for _ in range(30):
        plan = world.engine.plan()
        if plan is not None:
            world.effects += plan.effects
            world.effects += world.engine.abandon(plan.step)
            again = world.plan()
            assert again is not None
            for name in ("request", "start", "count", "samples", "tokens", "table"):
                assert getattr(again, name).tolist() == getattr(plan, name).tolist(), name
            told = {t.id for t in plan.native.new_decodes_requests}
            assert told <= {t.id for t in again.native.new_decodes_requests}
        if len(world.flights) > lag or plan is None:
            if not world.flights:
                break
            world.apply()
    for request in range(3):
        assert world.tokens[request] == expected_tokens(make_request(request, 5, 4), 16)
    assert is_pristine(world.engine)


def test_only_the_newest_plan_can_be_abandoned():
    world = World(make_engine(lag=1))
    world.submit(make_request(0))
    world.plan()
    world.plan()
    with pytest.raises(ValueError, match="step 0 cannot be abandoned"):
        world.engine.abandon(0)
    world.apply()
    with pytest.raises(ValueError, match="step 1 cannot be abandoned"):
        world.engine.abandon(1)


def test_a_fork_goes_its_own_way():
    world = World(make_engine(lag=1))
    world.submit(*(make_request(i, 5, 4) for i in range(3)))
    world.step()
    fork = world.engine.fork()
    expected, found = world.engine.plan(), fork.plan()
    assert found is not None
    assert expected is not None
    assert found.table.tolist() == expected.table.tolist()
    fork.shutdown()
    assert set(world.engine.pending()) == {0, 1, 2}


def test_submit_and_cancel_from_other_threads_while_the_loop_runs():
    world = World(make_engine(batch_size=4, num_pages=40, lag=1))
    done = threading.Event()

    def client(base: int) -> None:
        for i in range(40):
            world.engine.submit(make_request(base + i, prompt=3, max_tokens=3))
            if i % 3 == 0:
                world.engine.cancel(base + i)

    threads = [threading.Thread(target=client, args=(base,)) for base in (0, 100, 200)]
    for thread in threads:
        thread.start()
    waiter = threading.Thread(target=lambda: ([t.join() for t in threads], done.set()))
    waiter.start()
    while not done.is_set() or world.engine.pending():
        world.step()
    waiter.join()
    world.drain()
    assert is_pristine(world.engine)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, list[Request]]:
    page_size = draw(st.sampled_from([1, 2, 3, 4]))
    num_pages = draw(st.integers(2, 12))
    longest = draw(st.integers(1, 14))
    engine = make_engine(
        batch_size=draw(st.integers(1, 4)),
        page_size=page_size,
        num_pages=num_pages,
        max_sequences=longest,
        prefill_chunk=draw(st.integers(1, 6)),
        lag=draw(st.integers(0, 2)),
        mix=draw(st.sampled_from(["mixed", "prefill_first", "decode_first"])),
        max_decode_wait=draw(st.integers(0, 2)),
        max_prefill_wait=draw(st.integers(0, 2)),
    )
    requests = [
        make_request(i, draw(st.integers(1, 9)), draw(st.integers(1, 9))) for i in range(draw(st.integers(1, 6)))
    ]
    fitting = [
        r
        for r in requests
        if len(r.prompt) <= longest and min(len(r.prompt) + r.max_tokens - 1, longest) <= (num_pages - 1) * page_size
    ]
    eos_at = {r.id: draw(st.integers(len(r.prompt), len(r.prompt) + 8)) for r in fitting if draw(st.booleans())}
    return World(engine, eos_at), fitting


@given(worlds(), st.data())
@settings(max_examples=150, deadline=None)
def test_every_request_yields_its_own_tokens_whatever_happens_to_the_others(
    made: tuple[World, list[Request]], data: st.DataObject
):
    world, requests = made
    engine = world.engine
    to_come, cancelled = list(requests), set()
    for op in data.draw(st.lists(st.sampled_from("spppaaaxcf"), max_size=60)):
        if op == "s" and to_come:
            world.submit(to_come.pop(0))
        elif op == "p":
            world.plan()
        elif op == "a" and world.flights:
            world.apply()
        elif op == "c" and requests:
            victim = data.draw(st.sampled_from(requests)).id
            if victim in engine.pending():
                cancelled.add(victim)
            world.cancel(victim)
        elif op == "x":
            plan = engine.plan()
            if plan is not None:
                world.effects += [*plan.effects, *engine.abandon(plan.step)]
        elif op == "f":
            world.engine = engine = engine.fork()
    world.submit(*to_come)
    world.drain()
    for request in requests:
        expected = expected_tokens(request, engine.metadata.max_sequences, world.eos_at.get(request.id))
        found = world.tokens.get(request.id, [])
        assert found == (expected if request.id not in cancelled else expected[: len(found)])
    assert is_pristine(engine)
