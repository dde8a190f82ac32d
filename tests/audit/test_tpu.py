"""Real compilations for TPUs that are not there: these need libtpu (`-m tpu`, see .ci/run)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from backends.jax_programs import Programs
from backends.tpu_targets import FUNCTIONS, find_target
from sim.audit import FOR_TPU, TargetReport, audit
from sim.mutants.edit import Edit, applied
from sim.scenario import load_scenario

pytestmark = pytest.mark.tpu

EXAMPLE = Path("scenarios/audit-llama3-8b.yaml")
# Every layer is compiled alike: one at the real pool size shows what 32 do, in a thirtieth of the time.
ONE_LAYER = "cache.layers=1"
WRITES = FUNCTIONS[:2]


@pytest.fixture(scope="module")
def audited() -> Callable[..., TargetReport]:
    def run(target: str, *overrides: str, only: Collection[str] = WRITES) -> TargetReport:
        return audit(load_scenario(EXAMPLE, [*FOR_TPU, ONE_LAYER, *overrides]), find_target(target), only=only)

    return run


@pytest.fixture(autouse=True)
def no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes a cache fails: nothing of its size may be allocated."""

    def refuse(programs: Programs) -> Any:
        raise AssertionError(f"the audit makes the pools of {programs}")

    monkeypatch.setattr(Programs, "new_pools", refuse)
    monkeypatch.setattr(Programs, "new_state", refuse)


def why(report: TargetReport) -> dict[str, str]:
    return {each.compiled.name: "; ".join(each.why) for each in report.functions}


@pytest.mark.parametrize(
    "target", ["tpu-v4:2x2x1", "tpu-v5e:2x2", "tpu-v5e:2x4", "tpu-v5p:2x2x1", "tpu-v6e:2x2", "tpu7x:2x2x1"]
)
def test_the_default_path_writes_in_place(target: str, audited: Callable[..., TargetReport]) -> None:
    report = audited(target, only=FUNCTIONS)
    assert why(report) == dict.fromkeys(FUNCTIONS, "")
    assert report.mesh == {"heads": 8 if target in {"tpu-v5e:2x4", "tpu7x:2x2x1"} else 4}
    for each in report.functions:
        assert each.compiled.alias_bytes >= each.compiled.pool_bytes > 2**26


@pytest.mark.parametrize("target", ["tpu-v5e:2x2", "tpu-v5p:2x2x1", "tpu-v6e:2x2", "tpu7x:2x2x1"])
def test_quantised_pages_and_their_scales_are_written_in_place(
    target: str, audited: Callable[..., TargetReport]
) -> None:
    report = audited(target, "cache.quantize=true", only=FUNCTIONS)
    assert why(report) == dict.fromkeys(FUNCTIONS, "")
    # The values, and float32 scales of a 32nd of their size.
    assert all(each.compiled.pool_bytes % 33 == 0 for each in report.functions)


@pytest.mark.parametrize("num_pages", [16384, 16001])
def test_quantised_pages_first_are_written_in_place_with_four_heads_a_device(
    num_pages: int, audited: Callable[..., TargetReport]
) -> None:
    found = why(
        audited(
            "tpu-v5e:2x2",
            "cache.quantize=true",
            "cache.layout=pages_first",
            "backend.mesh={heads: 2}",
            f"cache.num_pages={num_pages}",
        )
    )
    assert found == dict.fromkeys(WRITES, "")


def test_scales_that_are_written_without_reading_their_neighbours_fail(audited: Callable[..., TargetReport]) -> None:
    narrow = Edit("paged_attention.tiles:put", "tpu=in_lines", "tpu=at_once")
    with applied([narrow]):
        found = why(audited("tpu-v5e:2x2", "cache.quantize=true"))
    assert all("of a whole pool" in text for text in found.values())


def test_a_flat_view_of_the_pool_fails(audited: Callable[..., TargetReport]) -> None:
    found = why(audited("tpu-v5e:2x2", "backend.writer=tests.audit.bad_writers:flat"))
    assert all("of a whole pool" in text for text in found.values())


def test_a_conversion_of_the_pool_fails(audited: Callable[..., TargetReport]) -> None:
    found = why(audited("tpu-v5e:2x2", "backend.writer=tests.audit.bad_writers:converted"))
    assert all("of a whole pool" in text for text in found.values())


def test_lost_donation_fails(audited: Callable[..., TargetReport]) -> None:
    found = why(audited("tpu-v5e:2x2", "plant=MK24"))
    assert all("donation is lost" in text for text in found.values())


def test_pages_spread_over_the_devices_fail(audited: Callable[..., TargetReport]) -> None:
    by_page = Edit("backends.jax_devices:HeadsOverMesh.partition_spec", "== PAGE_AXES[0]", "== PAGE_AXES[1]")
    with applied([by_page]):
        found = why(audited("tpu-v5e:2x2"))
    assert all("in a function that only writes" in text for text in found.values())


def test_a_chunk_written_before_the_decodes_fails_where_they_share_a_step(
    audited: Callable[..., TargetReport],
) -> None:
    late = Edit(
        "backends.jax_step:ScriptedModel.step", "if decodes is not None:", "if prefill is None and decodes is not None:"
    )
    written = "        views = self._write(views, identity, prefill)\n"
    again = (
        "    if prefill is not None and decodes is not None:\n"
        "        identity = kv_id(base[first_decode:], decodes.decodes_position, jnp)\n"
        "        views = self._write(views, identity, decodes)\n"
    )
    after = Edit("backends.jax_step:ScriptedModel.step", written, written + again)
    with applied([late, after]):
        found = why(audited("tpu-v5e:2x2", "model.kind=echo", only=["native_step"]))
    assert "of a whole pool" in found["native_step"]


def test_a_head_dim_of_64_fails_with_advice(audited: Callable[..., TargetReport]) -> None:
    report = audited("tpu-v5e:2x2", "cache.head_dim=64")
    assert all("pad it to 128" in text for text in why(report).values())


def test_a_kernel_that_raises_is_a_failure_with_its_words(audited: Callable[..., TargetReport]) -> None:
    found = why(audited("tpu-v5e:2x2", "backend.writer=tests.audit.bad_writers:raising"))
    assert all("TypeError: this kernel knows no such view" in text for text in found.values())


def test_a_cache_too_large_for_the_chip_fails(audited: Callable[..., TargetReport]) -> None:
    found = why(audited("tpu-v5e:2x2", "cache.num_pages=4000000"))
    assert all("HBM" in text or "hbm" in text for text in found.values())


def test_the_command_line_prints_one_json_object_and_its_progress_elsewhere() -> None:
    command = f"-m sim.cli audit {EXAMPLE} --target v5e:1x1 --json --set {ONE_LAYER} --set cache.num_pages=4096"
    command += "".join(f" --only {name}" for name in WRITES)
    done = subprocess.run(
        [sys.executable, *command.split()],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["passed"], found["target"], found["mesh"]) == (True, "v5e:1x1", {"heads": 1})
    keys = "name passed alias_bytes pool_bytes temp_bytes pool_copies collectives hbm_bytes seconds"
    assert all(set(keys.split()) <= set(each) for each in found["functions"])
    assert [each["name"] for each in found["functions"]] == list(WRITES)
    assert "compiling write_decodes (2 of 2)" in done.stderr
