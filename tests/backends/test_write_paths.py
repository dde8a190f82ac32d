"""The real step programs on the CPU: no copy of a pool, one call a step, and nothing compiled once they are warm."""

import re

import jax
import numpy as np
import pytest

from paged_attention.layout import LAYOUTS
from tests.backends.harness import EngineRun, JaxBackend, cache_spec, opened, run_planner

CHANGES = (
    {"dtype": "bfloat16"},
    {"dtype": "float32"},
    {"dtype": "float16"},
    {"dtype": "float8_e4m3fn"},
    {"dtype": "float8_e5m2"},
    {"dtype": "bfloat16", "quantize": True},
)
CASES = [
    pytest.param(
        road,
        layout,
        changes,
        id="-".join([road, layout, *map(str, changes.values())]),
        marks=() if (road, layout, changes) == ("rows_step", "heads_first", CHANGES[0]) else pytest.mark.slow,
    )
    for road in ("native_step", "rows_step")
    for layout in LAYOUTS
    for changes in CHANGES
]


def recorded(backend, road, calls):
    """Have the backend note each step program that it calls in `calls`, with the shapes of its arguments."""
    find = getattr(backend._programs, road)

    def noting(*key):
        program = find(*key)

        def call(*args):
            calls.append((key, program, jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), args)))
            return program(*args)

        return call

    return noting


def steps_of(backend, road, monkeypatch):
    """(calls of programs, number of steps) of a short run on one road."""
    calls, steps = [], []
    monkeypatch.setattr(backend._programs, road, recorded(backend, road, calls))
    if road == "rows_step":
        backend._road = "rows"

    def execute(plan, rows):
        steps.append(plan.step)
        return backend.execute(plan, rows).result()

    EngineRun(backend._cache, 5, 0, num_requests=3).run(execute)
    return calls, len(steps)


def copies(text, pools):
    """Instructions of an HLO text that make another array of a pool's size."""
    sizes = "|".join(sorted({",".join(map(str, pool.shape)) for pool in pools}))
    return re.findall(rf"= \w+\[(?:{sizes})\]\S* (?:copy|convert|transpose|select|bitcast-convert|pad)\(.*", text)


@pytest.mark.parametrize(("road", "layout", "changes"), CASES)
def test_no_step_copies_a_pool_by_its_memory_and_by_its_hlo_text(road, layout, changes, monkeypatch):
    cache = cache_spec(layers=1, num_pages=2048, layout=layout, **changes)
    backend = opened(JaxBackend(), cache)
    pool_bytes = [pool.nbytes for pool in backend._pools]
    calls, _ = steps_of(backend, road, monkeypatch)
    mixed = {key: (program, args) for key, program, args in calls}
    assert len(mixed) > 1
    for program, args in mixed.values():
        compiled = program.lower(*args).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(pool_bytes)
        assert memory.temp_size_in_bytes < max(pool_bytes) / 4
        text = compiled.as_text()
        assert "dynamic-update-slice" in text or "scatter" in text
        assert copies(text, backend._pools) == []
    backend.close()


def test_a_whole_pool_copy_is_seen_in_the_hlo_text():
    pool = jax.ShapeDtypeStruct((2, 2048, 4, 8), np.float32)
    text = jax.jit(lambda pool: pool.at[0, 1, 2, 3].set(1.0)).lower(pool).compile().as_text()
    assert copies(text, [pool])


@pytest.mark.parametrize("road", [pytest.param("native_step", marks=pytest.mark.slow), "rows_step"])
def test_a_step_calls_one_program_and_compiles_nothing_beside_it(road, monkeypatch):
    cache = cache_spec(layers=1)
    # Twice: the first run compiles the programs.
    for warm in (False, True):
        backend = opened(JaxBackend(), cache)
        compiled = []
        with compilations(compiled):
            calls, steps = steps_of(backend, road, monkeypatch)
        assert len(calls) == steps
        monkeypatch.undo()
        backend.close()
        assert not (warm and compiled)


class compilations:  # noqa: N801
    """Names everything that XLA compiles in this process while it is entered, ours or not."""

    def __init__(self, names):
        self.names = names

    def _listen(self, event, duration, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(facts.get("fun_name", event))

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._listen)


@pytest.mark.slow
def test_a_long_run_of_changing_rows_compiles_the_declared_buckets_and_then_nothing():
    cache = cache_spec(layers=1, batch_size=64, num_pages=900, max_sequence_length=48, prefill_chunk=48)
    backend = opened(JaxBackend(), cache)
    assert backend._programs.decode_buckets == [16, 32, 64]
    run_planner(cache, 1, 60, [backend], max_prefills=3)
    sizes = {key for key in backend._programs._made if isinstance(key[0], int)}
    assert len({packed for _, packed in sizes}) > 2
    assert sizes <= {(chunk, int(chunk > 0) + rows) for chunk in (0, cache.prefill_chunk) for rows in (0, 16, 32, 64)}
    warm, compiled = backend.num_compiled, []
    with compilations(compiled):
        run_planner(cache, 1, 60, [opened(JaxBackend(), cache)], max_prefills=3)
    assert backend.num_compiled == warm
    assert compiled == []
