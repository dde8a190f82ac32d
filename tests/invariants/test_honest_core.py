"""An honest core is never accused, whatever it goes through."""

from hypothesis import given, settings
from hypothesis import strategies as st

from invariants.auditor import AuditConfig
from invariants.catalogue import select
from tests.invariants.reference import World, small_policy


@st.composite
def worlds(draw):
    lag = draw(st.integers(0, 2))
    page_size = draw(st.integers(1, 4))
    pages = draw(st.integers(3, 10))
    policy = small_policy(
        batch_size=draw(st.integers(1, 3)),
        page_size=page_size,
        num_pages=pages + 1,
        max_sequence_length=draw(st.integers(1, page_size * pages + 2)),
        prefill_chunk=draw(st.integers(1, 7)),
        lag=lag,
    )
    requests = draw(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 10)), min_size=1, max_size=7))
    eos = {
        i: prompt + draw(st.integers(0, 6)) for i, (prompt, _) in enumerate(requests) if prompt and draw(st.booleans())
    }
    ops = draw(
        st.lists(
            st.one_of(
                st.just(("submit", 0)),
                st.tuples(st.just("step"), st.integers(1, 4)),
                st.tuples(st.just("abandon"), st.just(0)),
                st.tuples(st.just("cancel"), st.integers(0, 7)),
            ),
            max_size=16,
        )
    )
    return policy, requests, eos, ops


@settings(max_examples=120, deadline=None)
@given(worlds(), st.sampled_from([1, 3]))
def test_an_honest_core_is_never_accused(made, full_every):
    policy, requests, eos, ops = made
    world = World(policy, eos=eos, config=AuditConfig(full_every=full_every))
    todo = list(enumerate(requests))
    for kind, n in ops:
        if kind == "submit" and todo:
            request, (prompt, max_tokens) = todo.pop(0)
            world.submit(request, prompt, max_tokens)
        elif kind == "step":
            for _ in range(n):
                world.step()
        elif kind == "abandon":
            world.step(abandon=True)
        elif kind == "cancel":
            world.cancel(n)
    for request, (prompt, max_tokens) in todo:
        world.submit(request, prompt, max_tokens)
    world.drain()
    assert [str(v) for v in world.auditor.violations] == []


@settings(max_examples=20, deadline=None)
@given(worlds())
def test_a_foreign_log_without_a_vocabulary_and_device_is_judged_alike(made):
    policy, requests, eos, _ = made
    world = World(policy, eos=eos, device=False, vocab=None)
    for request, (prompt, max_tokens) in enumerate(requests):
        world.submit(request, prompt, max_tokens)
    world.drain()
    assert [str(v) for v in world.auditor.violations] == []
    assert "O1" not in world.auditor.counters()


def busy_world(**changes):
    """A run that meets everything: preemption, lag, EOS, cancels, a failed step, a refusal."""
    world = World(small_policy(num_pages=10, lag=1, **changes), eos={2: 14})
    for request, (prompt, max_tokens) in enumerate([(7, 12), (9, 20), (11, 8), (5, 5), (0, 3), (8, 30)]):
        world.submit(request, prompt, max_tokens)
    for _ in range(3):
        world.step()
    world.step(abandon=True)
    world.step()
    world.cancel(3)
    world.cancel(77)
    return world


def test_every_active_invariant_is_really_tested_in_a_busy_run():
    world = busy_world()
    world.drain()
    counters = world.auditor.counters()
    assert world.found == []
    assert set(counters) == select(None, "always") - {"O2"}  # which needs a decoder
    assert [name for name, c in counters.items() if not c["nontrivial"]] == []
    assert all(c["violated"] == 0 <= c["nontrivial"] <= c["checked"] for c in counters.values())


def test_what_is_switched_off_is_neither_counted_nor_found():
    world = World(small_policy(), config=AuditConfig(full_every=1, only=frozenset({"P1", "K2"})))
    world.submit(0, 5, 3)
    world.drain()
    assert set(world.auditor.counters()) == {"P1", "K2"}
