"""Two roads and three backends, one answer: the same tokens, and the same bits outside the dummy page."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.protocol import ModelSpec
from paged_attention.layout import LAYOUTS
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

pytestmark = pytest.mark.device


def close(backends):
    for backend in backends:
        backend.close()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), max_prefills=st.integers(1, 3))
def test_neutral_rows_give_the_same_tokens_slots_and_bits_on_numpy_and_jax(seed, max_prefills):
    cache = cache_spec()
    backends = [opened(make(), cache) for make in (NumpyBackend, JaxBackend)]
    planner = run_planner(cache, seed, 25, backends, max_prefills)
    assert planner.next_request > 1
    close(backends)


def both_layouts(cache, *before):
    """Opened backends with the same cache: the given ones, then JAX with each layout."""
    layouts = (replace(cache, layout=name) for name in ("heads_first", "pages_first"))
    return [*(opened(make(), cache) for make in before), *(opened(JaxBackend(), cache) for cache in layouts)]


def test_both_layouts_give_the_oracles_tokens_slots_and_bits_from_neutral_rows():
    backends = both_layouts(cache_spec(), NumpyBackend)
    for seed in range(4):
        planner = run_planner(cache_spec(), seed, 12, backends, max_prefills=2)
        assert planner.next_request > 1
        # The next run begins with a cache of zeros again.
        backends = both_layouts(cache_spec(), NumpyBackend)
    close(backends)


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 2])
def test_both_layouts_give_the_oracles_tokens_slots_and_bits_on_the_cores_own_road(lag):
    backends = both_layouts(cache_spec(lag=lag), NumpyBackend)
    run = EngineRun(cache_spec(lag=lag), 5, lag)
    run.run(lambda plan, rows: assert_same_step(plan, rows, backends)[1])
    assert run.steps > 12
    close(backends)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), max_prefills=st.integers(1, 3))
def test_an_error_free_run_yields_what_the_script_says(seed, max_prefills):
    cache = cache_spec()
    backends = [opened(NumpyBackend(), cache), opened(NoneBackend(), cache)]
    run_planner(cache, seed, 25, backends, max_prefills)


@settings(max_examples=8, deadline=None)
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
    {"dtype": "float32", "head_dim": 3, "page_size": 5},
    {"dtype": "float16", "kv_heads": 1},
    {"dtype": "float8_e4m3fn"},
    {"dtype": "float8_e5m2"},
    {"dtype": "int8", "head_dim": 5},
]
CASES = [
    pytest.param(
        layout,
        changes,
        id="-".join([layout, *map(str, changes.values())]),
        marks=() if (layout, changes) == ("heads_first", DTYPES[0]) else pytest.mark.slow,
    )
    for layout in LAYOUTS
    for changes in DTYPES
]


@pytest.mark.parametrize(("layout", "changes"), CASES)
def test_every_layout_dtype_and_odd_sizes_agree_bit_for_bit(layout, changes):
    cache = cache_spec(layers=1, layout=layout, **changes)
    backends = [opened(backend, cache, ModelSpec(lanes=2)) for backend in (NumpyBackend(), JaxBackend())]
    run_planner(cache, 5, 20, backends)
    close(backends)


def mesh_run(body: str) -> str:
    """What a process of its own with 8 CPU devices prints; JAX's device count is fixed once it has started."""
    quick = os.environ.get("XLA_FLAGS", "")
    flags = {"XLA_FLAGS": f"{quick} --xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    head = "import warnings\nwarnings.simplefilter('error')\nfrom tests.backends.harness import *\nimport numpy as np\n"
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


@pytest.mark.slow
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
def test_pages_first_with_heads_sharded_agrees_with_the_oracle_and_gathers_nothing(devices):
    printed = mesh_run(f"""
cache = cache_spec(kv_heads=8, layers=1, layout="pages_first")
backends = [opened(NumpyBackend(), cache), opened(JaxBackend(), cache, devices=DeviceSpec(mesh={{"heads": {devices}}}))]
run_planner(cache, 3, 8, backends)
pool = backends[1]._pools[0]
print(len(pool.sharding.device_set), sorted({{shard.data.shape for shard in pool.addressable_shards}}))
text = backends[1]._programs.rows_step(6, 5).lower(backends[1]._pools, np.zeros((5, 15), np.int32)).compile().as_text()
# What the heads found wrong is added up: a number for each row.
print({{line.split(" = ")[1].split("(")[0] for line in text.splitlines() if "all-" in line.split("(")[0]}})
""")
    assert printed == f"{devices} [(12, 4, {8 // devices}, 8)]\n{{'s32[5]{{0}} all-reduce'}}\n"


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
