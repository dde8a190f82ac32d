"""The scenario library and real traces, end to end: minutes, not seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.device import PLATFORM

pytestmark = pytest.mark.slow

# The audit's examples are as large as what is deployed, and are compiled, not run.
SCENARIOS = sorted(path for path in Path("scenarios").glob("*.yaml") if not path.stem.startswith("audit-"))


def run_json(scenario: Path, hash_seed: int, *options: str) -> dict[str, Any]:
    """One run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "sim.cli", "run", str(scenario), "--json", "--no-plots", "-q", *options],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.device
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.stem)
def test_numpy_and_jax_plan_the_same_trace_and_leave_the_same_cache_bits(scenario: Path, tmp_path: Path) -> None:
    one_device = ("--set", "backend.mesh={}")
    options = {
        "numpy": ("--set", "backend.kind=numpy", *one_device),
        "jax": () if PLATFORM == "cpu" else (*one_device, "--set", f"backend.platform={PLATFORM}"),
    }
    with ThreadPoolExecutor(2) as pool:
        numpy, jax = pool.map(
            lambda case: run_json(scenario, case[0], "--out", str(tmp_path / case[1]), *options[case[1]]),
            [(1, "numpy"), (2, "jax")],
        )
    assert numpy["trace_hash"] == jax["trace_hash"]
    assert numpy["cache_hash"] == jax["cache_hash"] is not None


TRACES = os.environ.get("KVPROOF_TRACES")

REAL = """\
schema: kvproof/v1
name: {name}
core: {{batch_size: 64, prefill_chunk: 512}}
cache: {{page_size: 16, num_pages: 8192, max_sequence_length: 16384, layers: 2, kv_heads: 2, head_dim: 16}}
backend: {{kind: jax}}
workload:
  arrivals: {{kind: trace, format: azure, path: {path}}}
cost: {{kind: linear, base_ns: 30e6, per_token_ns: 15e3}}
expect: {{violations: 0}}
"""


@pytest.mark.skipif(TRACES is None, reason="KVPROOF_TRACES names no folder of real traces")
@pytest.mark.parametrize(
    ("file", "requests"), [("azure2023_code_first3000.csv", 3000), ("azure2023_conv_first6000.csv", 6000)]
)
def test_every_request_of_a_real_trace_finishes_or_is_rejected_with_a_reason(
    file: str, requests: int, tmp_path: Path
) -> None:
    scenario = tmp_path / "real.yaml"
    scenario.write_text(REAL.format(name=file.split("_")[1], path=Path(str(TRACES)) / file))
    summary = run_json(scenario, 0, "--out", str(tmp_path / "run"))
    counts = summary["requests"]
    assert counts["submitted"] == requests
    assert counts["finished"] + counts["rejected"] == requests
    assert sum(summary["rejected_reasons"].values()) == counts["rejected"]
    assert summary["violations"] == []
