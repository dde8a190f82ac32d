"""Small runs for tests: without a device, with a plan log read back as plain JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from sim.run import Report, run
from sim.scenario import Scenario
from tests.sim.page_parts import ROOT
from tests.sim.scenario_parts import small


def planned_only(**keys: Any) -> Scenario:
    """A small scenario on the backend `none`."""
    return small(**{"backend__kind": "none", **keys})


def logged(scenario: Scenario, **options: Any) -> tuple[Report, list[dict[str, Any]]]:
    """A run and the lines of its plan log, header first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        report = run(scenario, plan_log=path, **options)
        return report, [json.loads(line) for line in path.read_text().splitlines()]


def replayed_elsewhere(path: Path, hash_seed: int = 0) -> tuple[int, dict[str, Any]]:
    """Exit status and result of a replay in another process that hashes text with this seed."""
    done = subprocess.run(
        [sys.executable, "-m", "sim.cli", "replay", str(path), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Small worlds with everything on: lag, preemption, EOS, cancels, failed steps, open and closed loops."""
    count = draw(st.integers(1, 12))
    arrivals = draw(
        st.sampled_from(
            [
                {"kind": "poisson", "request_rate": 2e5},
                {"kind": "constant", "request_rate": 1e6},
                {"kind": "concurrent", "concurrency": 3},
            ]
        )
    )
    faults: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.integers(0, 30))
        if draw(st.booleans()):
            faults.append({"kind": "cancel", "request": draw(st.integers(0, count - 1)), "at_step": step})
        else:
            faults.append({"kind": "fail", "at_step": step})
    return planned_only(
        seed=draw(st.integers(0, 1000)),
        core__lag=draw(st.integers(0, 2)),
        core__batch_size=draw(st.integers(1, 5)),
        core__prefill_chunk=draw(st.sampled_from([1, 3, 8])),
        core__mix=draw(st.sampled_from(["mixed", "prefill_first", "decode_first"])),
        cache__page_size=draw(st.sampled_from([1, 3, 4])),
        cache__num_pages=draw(st.sampled_from([12, 33])),
        workload__arrivals=arrivals,
        workload__num_requests=count,
        workload__end_by=draw(st.sampled_from(["max_tokens", "eos"])),
        workload__too_long=draw(st.sampled_from(["reject", "clip"])),
        invariants={"stop": "never"},
        expect={"rejected": {"min": 0}},
        faults=faults,
    )
