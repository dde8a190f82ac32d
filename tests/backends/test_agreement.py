"""Two roads and three backends, one answer: the same tokens, and the same bits outside the dummy page."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.protocol import ModelSpec
from tests.backends.harness import (
    EngineRun,
    JaxBackend,
    NoneBackend,
    NumpyBackend,
    assert_same_step,
    cache_spec,
    opened,
    run_planner,
)

ROOT = Path(__file__).parents[2]


def close(backends):
    for backend in backends:
        backend.close()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), max_prefills=st.integers(1, 3))
def test_neutral_rows_give_the_same_tokens_slots_and_bits_on_numpy_and_jax(seed, max_prefills):
    cache = cache_spec()
    backends = [opened(make(), cache) for make in (NumpyBackend, JaxBackend)]
    planner = run_planner(cache, seed, 25, backends, max_prefills)
    assert planner.next_request > 1
    close(backends)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), max_prefills=st.integers(1, 3))
def test_an_error_free_run_yields_what_the_script_says(seed, max_prefills):
    cache = cache_spec()
    backends = [opened(NumpyBackend(), cache), opened(NoneBackend(), cache)]
    run_planner(cache, seed, 25, backends, max_prefills)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lag=st.integers(0, 2),
    mix=st.sampled_from(["mixed", "prefill_first", "decode_first"]),
)
def test_the_cores_own_road_gives_the_same_as_the_neutral_rows_of_its_plans(seed, lag, mix):
    cache = cache_spec(lag=lag)
    backends = [opened(backend, cache) for backend in (NumpyBackend(), JaxBackend(), NoneBackend())]
    run = EngineRun(cache, seed, lag, mix)
    run.run(lambda plan, rows: assert_same_step(plan, rows, backends)[1])
    assert run.steps > 12
    close(backends)


def test_the_cores_own_road_holds_through_preemptions():
    cache = cache_spec()
    preemptions = 0
    for seed in range(3):
        backends = [opened(backend, cache) for backend in (NumpyBackend(), JaxBackend())]
        run = EngineRun(cache, seed, lag=1, lengths=(5, 18))
        run.run(lambda plan, rows, to=backends: assert_same_step(plan, rows, to)[1])
        preemptions += run.preemptions
        close(backends)
    assert preemptions


DTYPES = [
    {"dtype": "bfloat16", "quantize": True},
    pytest.param({"dtype": "float32", "head_dim": 3, "page_size": 5}, marks=pytest.mark.slow),
    pytest.param({"dtype": "float16", "kv_heads": 1}, marks=pytest.mark.slow),
    pytest.param({"dtype": "float8_e4m3fn"}, marks=pytest.mark.slow),
    pytest.param({"dtype": "float8_e5m2"}, marks=pytest.mark.slow),
    pytest.param({"dtype": "int8", "head_dim": 5}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", DTYPES, ids=lambda changes: "-".join(str(value) for value in changes.values()))
def test_every_dtype_and_odd_sizes_agree_bit_for_bit(changes):
    cache = cache_spec(layers=1, **changes)
    backends = [opened(backend, cache, ModelSpec(lanes=2)) for backend in (NumpyBackend(), JaxBackend())]
    run_planner(cache, 5, 20, backends)
    close(backends)


def mesh_run(body: str) -> str:
    """What a process of its own with 8 CPU devices prints; JAX's device count is fixed once it has started."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    head = "import warnings\nwarnings.simplefilter('error')\nfrom tests.backends.harness import *\n"
    done = subprocess.run(
        [sys.executable, "-c", head + body],
        cwd=ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_heads_sharded_over_8_devices_agree_with_the_oracle():
    printed = mesh_run("""
cache = cache_spec(kv_heads=8, layers=1)
backends = [opened(NumpyBackend(), cache), opened(JaxBackend(), cache, devices=DeviceSpec(mesh={"heads": 8}))]
run_planner(cache, 3, 8, backends)
pool = backends[1]._pools[0]
print(len(pool.sharding.device_set), sorted({shard.data.shape for shard in pool.addressable_shards}))
""")
    assert printed == "8 [(1, 12, 4, 8)]\n"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_the_cores_own_road_on_a_mesh_agrees_with_the_oracle(devices):
    printed = mesh_run(f"""
cache = cache_spec(kv_heads=8)
backends = [opened(NumpyBackend(), cache), opened(JaxBackend(), cache, devices=DeviceSpec(mesh={{"tp": {devices}}}))]
run = EngineRun(cache, 3, 1)
run.run(lambda plan, rows: assert_same_step(plan, rows, backends)[1])
print(len(backends[1]._pools[0].sharding.device_set), run.steps > 10)
""")
    assert printed == f"{devices} True\n"


def test_a_wrong_word_changes_the_token_of_exactly_the_rows_that_read_it():
    cache = cache_spec()
    backends = [opened(backend, cache) for backend in (NumpyBackend(), JaxBackend())]
    planner = run_planner(cache, 11, 9, backends, eos=False)
    plan, rows = planner.plan()
    victim = int(np.flatnonzero((plan.samples == 1) & (plan.start > 4))[0])
    page = plan.table[victim, :1]
    for backend in backends:
        backend.poison(page, "big")
    outcomes = assert_same_step(plan, rows, backends)
    honest = opened(NoneBackend(), cache).execute(plan, rows).result()
    changed = np.flatnonzero(outcomes[1].token != honest.token)
    assert changed.tolist() == [victim]
    # One word at each of four positions.
    assert outcomes[1].token[victim] - honest.token[victim] == 4
    close(backends)
