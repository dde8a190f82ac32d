"""What each backend promises beside agreeing: rules, errors, and no compiling once warm."""

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.protocol import BackendUnavailableError, CacheSpec, DeviceSpec, ModelSpec
from backends.registry import backend_entry_points, make_backend
from backends.scripted import TokenScript
from backends.words import WORD_MASK, lane_words, poison_word, read_lane
from paged_attention.fingerprint import kv_base, kv_id, salts, token, words
from paged_attention.plan import EOS_TOKEN, UNKNOWN_TOKEN, ModelRows, StepPlan
from tests.backends.harness import EngineRun, JaxBackend, NoneBackend, NumpyBackend, cache_spec, opened, run_planner
from tests.device import PLATFORM

pytestmark = pytest.mark.device

WITH_A_CACHE = pytest.mark.parametrize("make", [NumpyBackend, JaxBackend], ids=["numpy", "jax"])


def ints(*values):
    return np.array(values, np.int32)


def one_row(start, count, pages, *, step=0, slot=0, samples=1, eos=-1):
    plan = StepPlan(
        step=step,
        request=ints(5),
        admission=ints(1),
        slot=ints(slot),
        start=ints(start),
        count=ints(count),
        samples=ints(samples),
        tokens=np.ones(count, np.int32),
        num_pages=ints(len(pages)),
        table=ints(*pages)[None],
        effects=(),
    )
    return plan, ModelRows(kv_base(ints(5), ints(1)), np.array([99], np.uint32), ints(eos))


def expected_places(positions, pages, page_size=4):
    positions = np.asarray(positions)
    ids = kv_id(kv_base(np.full(len(positions), 5), np.full(len(positions), 1)), positions)
    return ints(*pages)[positions // page_size], (positions % page_size).astype(np.int32), ids


@WITH_A_CACHE
@pytest.mark.parametrize("page", [-1, 12, 4096])
def test_seed_25_a_page_outside_the_pool_is_refused_and_nothing_is_written(make, page):
    backend = opened(make(), cache_spec())
    with pytest.raises(ValueError, match=rf"step 0, request 5: page ids must lie in 0\.\.11, found \[{page}\]"):
        backend.execute(*one_row(0, 6, [3, page], slot=-1))
    evidence = backend.evidence(ints(), np.arange(12, dtype=np.int32))
    assert not evidence.keys.any()
    assert not evidence.values.any()


@WITH_A_CACHE
def test_seed_06_a_row_beyond_the_longest_sequence_is_refused(make):
    backend = opened(make(), cache_spec())
    with pytest.raises(ValueError, match="positions 22 to 22 are to be written, but max_sequence_length is 22"):
        backend.execute(*one_row(22, 1, [1, 2, 3, 4, 5, 6]))


@WITH_A_CACHE
def test_seed_01_a_second_chunk_in_the_middle_of_a_page_keeps_the_first(make):
    backend = opened(make(), cache_spec())
    backend.execute(*one_row(0, 6, [7, 2], slot=-1, samples=0))
    backend.execute(*one_row(6, 5, [7, 2, 9], slot=-1, step=1))
    assert backend.verify(*expected_places(range(11), [7, 2, 9])) == ()
    untouched = np.array([page for page in range(12) if page not in (7, 2, 9)], np.int32)
    assert not backend.evidence(ints(), untouched).keys.any()


@pytest.mark.parametrize("chunk", [6, 3])
def test_seed_11_prefill_rows_of_several_sizes_in_one_process_are_each_written_whole(chunk):
    backend = opened(JaxBackend(), cache_spec(prefill_chunk=chunk))
    for step, (count, pages) in enumerate([(3, [7]), (13, [2, 9, 4, 1]), (6, [5, 3])]):
        backend.execute(*one_row(0, count, pages, slot=-1, step=step))
        assert backend.verify(*expected_places(range(count), pages)) == ()


@WITH_A_CACHE
def test_seed_05_after_an_eos_on_the_device_later_rows_write_and_yield_nothing(make):
    backend = opened(make(), cache_spec(lag=2))
    ended = backend.execute(*one_row(0, 4, [7], slot=-1, eos=4)).result()
    assert (ended.token.tolist(), ended.eos.tolist()) == ([EOS_TOKEN], [1])
    for step in (1, 2):
        dead = backend.execute(*one_row(3 + step, 1, [7, 8], step=step, eos=4)).result()
        assert (dead.token.tolist(), dead.eos.tolist()) == ([UNKNOWN_TOKEN], [0])
    evidence = backend.evidence(ints(0), ints(8))
    assert not evidence.keys.any()
    assert evidence.positions.tolist() == [-1]


@WITH_A_CACHE
def test_seed_29_nan_in_the_dummy_page_changes_no_token(make):
    cache = cache_spec()
    # What is wrong counts the same whether it is NaN or zero, so the tokens must be those of the script.
    script, poisoned = opened(NoneBackend(), cache), opened(make(), cache)
    run = EngineRun(cache, 8, 0)

    def execute(plan, rows):
        poisoned.poison(ints(0), "nan")
        outcome = script.execute(plan, rows).result()
        assert poisoned.execute(plan, rows).result().token.tolist() == outcome.token.tolist()
        return outcome

    run.run(execute)
    assert run.steps > 10


def test_seed_03_the_dummy_page_is_not_even_written_by_padding():
    cache = cache_spec()
    backend = opened(JaxBackend(), cache)
    EngineRun(cache, 4, 1).run(lambda plan, rows: backend.execute(plan, rows).result())
    evidence = backend.evidence(ints(), ints(0))
    assert not evidence.keys.any()
    assert not evidence.values.any()


@WITH_A_CACHE
def test_verify_names_the_first_wrong_places_with_what_was_found(make):
    backend = opened(make(), cache_spec())
    backend.execute(*one_row(0, 6, [7, 2], slot=-1))
    pages, offsets, ids = expected_places(range(6), [7, 2])
    swapped = ids.copy()
    swapped[4], swapped[5] = ids[5], ids[4]
    wrong = backend.verify(pages, offsets, swapped, limit=9)
    # Two layers, K and V, two heads: eight wrong vectors at the first wrong place, then on to the next.
    assert [(place.page, place.offset) for place in wrong] == [(2, 0)] * 8 + [(2, 1)]
    first, ninth = wrong[0], wrong[8]
    assert (first.layer, first.kind, first.head) == (0, "K", 0)
    salt = salts(2, 2, 8)
    assert first.found == tuple(words(ids[4:5], salt[0, 0, 0], "bfloat16").tolist())
    assert first.expected == tuple(words(ids[5:6], salt[0, 0, 0], "bfloat16").tolist())
    assert ninth.found == first.expected
    assert len(backend.verify(pages, offsets, swapped, limit=1)) == 1


@WITH_A_CACHE
def test_a_place_never_written_holds_zeros_until_it_is_poisoned(make):
    backend = opened(make(), cache_spec())
    place = ints(4), ints(3), np.zeros(1, np.uint32)
    assert backend.verify(*place) == ()
    backend.poison(ints(4), "nan")
    assert backend.verify(*place)[0].found == (poison_word("bfloat16", "nan"),) * 8
    assert backend.verify(ints(5), ints(3), np.zeros(1, np.uint32)) == ()


@WITH_A_CACHE
def test_asking_for_a_place_outside_the_cache_is_an_error(make):
    backend = opened(make(), cache_spec())
    with pytest.raises(ValueError, match=r"pages 0\.\.11 at offsets 0\.\.3: found page 12, offset 1"):
        backend.verify(ints(1, 12), ints(0, 1), np.ones(2, np.uint32))


def test_nothing_is_compiled_once_every_program_has_run():
    cache = cache_spec()
    backend = opened(JaxBackend(), cache)
    for seed in (1, 2):
        EngineRun(cache, seed, 1).run(lambda plan, rows: backend.execute(plan, rows).result())
        run_planner(cache, seed, 15, [backend := opened(JaxBackend(), cache)], max_prefills=3)
    warm = backend.num_compiled
    assert warm
    for seed in (3, 4, 5):
        backend = opened(JaxBackend(), cache)
        EngineRun(cache, seed, 1).run(lambda plan, rows, to=backend: to.execute(plan, rows).result())
        run_planner(cache, seed, 15, [opened(JaxBackend(), cache)], max_prefills=2)
    assert backend.num_compiled == warm


def test_a_step_needs_no_room_of_the_size_of_the_pool():
    cache = cache_spec(num_pages=2048, layers=1)
    backend = opened(JaxBackend(), cache)
    program = backend._programs.rows_step(6, 4)
    packed = np.zeros((5, 6 + 6), np.int32)
    memory = program.lower(backend._pools, packed).compile().memory_analysis()
    pool_bytes = backend._pools[0].nbytes
    assert memory.alias_size_in_bytes == 2 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 4


def off_by_one(view, key, value, attn_meta):
    """A user's writer that writes decodes one position too far."""
    if attn_meta.is_decode_mode():
        attn_meta = attn_meta.replace(decodes_position=attn_meta.decodes_position + 1)
        return view.write_decodes_to_cache(key, value, attn_meta)
    return view.write_prefill_to_cache(key, value, attn_meta)


def test_a_users_writer_is_called_in_place_of_the_views_own(monkeypatch):
    module = ModuleType("a_users_kernel")
    module.off_by_one = off_by_one
    monkeypatch.setitem(sys.modules, "a_users_kernel", module)
    backend = opened(JaxBackend(), cache_spec(layers=1, writer="a_users_kernel:off_by_one"))
    backend.execute(*one_row(0, 3, [7], slot=-1))
    assert backend.verify(*expected_places(range(3), [7])) == ()
    outcome = backend.execute(*one_row(2, 1, [7], step=1)).result()
    assert [place.offset for place in backend.verify(*expected_places(range(4), [7]))] == [3] * 4
    assert outcome.token[0] == token(np.array([99], np.uint32), np.array([3]), 100)[0]


@pytest.mark.parametrize(
    "writer", ["nowhere_at_all:f", "backends.words:nothing", "backends.words", "backends.words:KINDS"]
)
def test_a_writer_that_is_not_there_is_named(writer):
    with pytest.raises(ValueError, match=f"writer '{writer}'"):
        opened(JaxBackend(), cache_spec(writer=writer))


def test_devices_that_are_not_there_are_named_with_those_that_are():
    other = "gpu" if PLATFORM == "tpu" else "tpu"
    with pytest.raises(BackendUnavailableError, match=rf"platform '{other}' is not there: JAX .* finds .*cpu"):
        opened(JaxBackend(), cache_spec(), devices=DeviceSpec(other))
    with pytest.raises(BackendUnavailableError, match=r"needs 2 cpu devices, found 1; start with XLA_FLAGS=\S+=2"):
        opened(JaxBackend(), cache_spec(), devices=DeviceSpec(mesh={"heads": 2}))
    with pytest.raises(ValueError, match="2 kv_heads cannot be spread over 3 devices"):
        opened(JaxBackend(), cache_spec(), devices=DeviceSpec(mesh={"tp": 3}))


@WITH_A_CACHE
def test_dtypes_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="unknown cache dtype 'int4'"):
        opened(make(), cache_spec(dtype="int4"))
    with pytest.raises(ValueError, match="quantised cache takes bfloat16"):
        opened(make(), cache_spec(dtype="float8_e4m3fn", quantize=True))


def test_the_registry_knows_the_three_backends_and_names_them_when_asked_for_another():
    assert {"none", "numpy", "jax"} <= set(backend_entry_points())
    assert isinstance(make_backend("none"), NoneBackend)
    with pytest.raises(BackendUnavailableError, match=r"no backend is named 'abacus'; installed are .*jax"):
        make_backend("abacus")


def test_every_backend_describes_itself():
    for backend in (NoneBackend(), NumpyBackend(), JaxBackend()):
        opened(backend, cache_spec())
        assert {"name", "platform", "device_kind", "numpy"} <= set(backend.describe())
        backend.close()


@given(seed=st.integers(0, 2**32 - 1), position=st.integers(0, 500), vocab=st.integers(2, 70_000))
def test_the_fast_token_script_is_the_fingerprint_modules_token(seed, position, vocab):
    seeds, positions = np.array([seed], np.uint32), ints(position)
    assert TokenScript(500, vocab).tokens(seeds, positions) == token(seeds, positions, vocab)


@settings(deadline=None)
@given(
    dtype=st.sampled_from(sorted(WORD_MASK)),
    head_dim=st.integers(1, 9),
    position=st.integers(0, 1000),
    nth=st.integers(0, 3),
)
def test_a_lanes_word_is_that_lane_of_the_whole_fingerprint(dtype, head_dim, position, nth):
    salt, identity = salts(1, 1, head_dim), kv_id(np.array([77], np.uint32), np.array([position]))
    lane = read_lane(np.array([position]), nth, head_dim, dtype)
    whole = words(identity[:, None], salt[0, 0, 0], dtype)
    assert lane_words(identity, salt[0, 0, 0, lane], lane, dtype) == whole[0, lane[0]]
    # What tells tokens apart is what is read.
    assert lane[0] > 0 or dtype != "int8" or head_dim == 1


def test_the_echo_model_reads_nothing():
    cache: CacheSpec = cache_spec(layers=1)
    backends = [opened(make(), cache, ModelSpec("echo", 100)) for make in (NumpyBackend, JaxBackend)]
    for backend in backends:
        backend.execute(*one_row(0, 3, [7], slot=-1))
        backend.poison(ints(7), "big")
        outcome = backend.execute(*one_row(3, 1, [7], step=1)).result()
        assert outcome.token[0] == token(np.array([99], np.uint32), np.array([4]), 100)[0]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not name a process's threads")
def test_the_one_thread_of_a_small_cpu_client_leaves_every_thread_all_cpus():
    opened(JaxBackend(), cache_spec()).close()
    allowed = {frozenset(os.sched_getaffinity(int(thread.name))) for thread in Path("/proc/self/task").iterdir()}
    assert allowed == {frozenset(os.sched_getaffinity(0))}
