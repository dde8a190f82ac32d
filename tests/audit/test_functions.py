"""What the audit compiles is what a run compiles; on the CPU, where both can be had without libtpu."""

from __future__ import annotations

from typing import Any

import pytest

from backends.jax_programs import Programs
from backends.protocol import DeviceSpec
from backends.tpu_audit import compile_ahead, functions_of
from backends.tpu_targets import FUNCTIONS
from sim.build import cache_spec, model_spec
from sim.run import run
from tests.sim.scenario_parts import small

pytestmark = pytest.mark.slow

SCENARIO = small(
    backend__kind="jax", model__kind="echo", workload__num_requests=8, workload__arrivals__request_rate=1e6
)


def programs() -> Programs:
    return Programs(cache_spec(SCENARIO), model_spec(SCENARIO), DeviceSpec("cpu"))


@pytest.mark.parametrize("road", ["native", "rows"])
def test_the_audited_steps_are_among_those_that_a_run_dispatches(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    native, rows = Programs.native_step, Programs.rows_step

    def note_native(self: Programs, shape: Any) -> Any:
        asked.append(shape)
        return native(self, shape)

    def note_rows(self: Programs, chunk_rows: int, num_packed: int) -> Any:
        asked.append((chunk_rows, num_packed))
        return rows(self, chunk_rows, num_packed)

    monkeypatch.setattr(Programs, "native_step", note_native)
    monkeypatch.setattr(Programs, "rows_step", note_rows)
    functions_of(programs(), cache_spec(SCENARIO))
    audited = {key for key in asked if isinstance(key, tuple) == (road == "rows")}
    asked.clear()
    backend = SCENARIO.backend.model_copy(update={"road": road})
    assert run(SCENARIO.model_copy(update={"backend": backend})).exit_code == 0
    assert audited
    assert audited <= set(asked)


def test_every_function_compiles_and_takes_its_pools_over_without_making_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Programs, "new_pools", None)
    made = programs()
    functions = functions_of(made, cache_spec(SCENARIO))
    assert tuple(function.name for function in functions) == FUNCTIONS
    for function in functions:
        compiled = compile_ahead(made, function)
        assert (compiled.refused, compiled.unaliased_pools) == ("", 0)
        assert compiled.alias_bytes >= compiled.pool_bytes == 2 * 33 * 4 * 2 * 16 * 2
        assert compiled.only_writes == function.name.startswith("write")
