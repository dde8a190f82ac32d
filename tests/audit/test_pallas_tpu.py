"""The Pallas page writer compiled for TPUs that are not there, its heads spread over all devices of the target."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.tpu_targets import FUNCTIONS, find_target
from sim.audit import FOR_TPU, audit
from sim.scenario import load_scenario

pytestmark = pytest.mark.tpu

EXAMPLE = Path("scenarios/audit-llama3-8b.yaml")
PALLAS = ("cache.layers=1", "backend.writer=backends.pallas_writer:write")
TARGETS = ("tpu-v5e:2x2", "tpu-v6e:2x2", "tpu7x:2x2x1")


def why(target: str, *overrides: str, only: tuple[str, ...] = FUNCTIONS[:2]) -> dict[str, str]:
    """What the audit has against each function."""
    report = audit(load_scenario(EXAMPLE, [*FOR_TPU, *PALLAS, *overrides]), find_target(target), only=only)
    return {each.compiled.name: "; ".join(each.why) for each in report.functions}


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_writes_in_place_in_every_function_of_a_run(target: str) -> None:
    assert why(target, only=FUNCTIONS) == dict.fromkeys(FUNCTIONS, "")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sizes", [("cache.page_size=64", "cache.dtype=float32"), ("cache.layout=pages_first",)])
def test_so_it_does_in_tall_pages_of_float32_and_pages_first(target: str, sizes: tuple[str, ...]) -> None:
    assert why(target, "cache.kv_heads=16", "cache.num_pages=4096", *sizes) == dict.fromkeys(FUNCTIONS[:2], "")


def test_a_single_bfloat16_head_a_device_makes_pages_first_copy_the_pool() -> None:
    found = why("tpu-v5e:2x2", "cache.layout=pages_first", "cache.kv_heads=4")
    assert all("of a whole pool" in text for text in found.values())
