"""The benchmark: one workload, measured in spins, so that figures travel between machines.

A spin is the median CPU time of five runs of a fixed loop of bytecode; a figure is CPU time of a run over the mean of
the spins directly before and after it, and of several such ratios the lowest counts. DEVICE_CHECKS compares runs with
each other, in pairs, and needs no spin.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Int64

from sim.run import Audit, Report, run_whole
from sim.scenario import Scenario
from sim.workload import Arrival, Workload

NUM_REQUESTS: Final = 4000
BASE_NS: Final = 85_000_000
LIGHT_BASE_NS: Final = 40_000_000
"""Under this cost the load is light and what a step costs by itself dominates."""
TARGETS: Final[dict[str, float | None]] = {
    "plan_only": 1.3,
    "plan_only_light": 2.0,
    "jax_cpu_rows": 10.0,
    "jax_cpu": 13.0,
    "jax_cpu_reader": None,
}
"""In spins. jax_cpu goes through build_input (both halves), jax_cpu_rows from the neutral rows of the plan; both write
and have the placement checked in every step. jax_cpu_reader also reads every live token in every step: no target."""
DEVICE_CHECKS: Final = "device_checks"
"""The case that tells what looking at the device adds to jax_cpu_rows."""
CASES: Final = (*TARGETS, DEVICE_CHECKS)
MAX_CHECKS_SHARE: Final = 0.4
"""What it may add, as a part of the same run with the device left alone."""
CHECKS_REQUESTS: Final = 1000
CHECKS_PAIRS: Final = 4
"""Pairs of such runs for each of `repeats`."""
CHECKS: Final[tuple[Audit, Audit]] = (True, "host")


def spin() -> float:
    """The unit: median CPU seconds of five runs of a loop over a list sum and a dict."""
    return statistics.median(_spin_once() for _ in range(5))


def _spin_once() -> float:
    start = time.process_time()
    d: dict[int, int] = {}
    s = 0
    for i in range(3_000_000):
        s += i & 7
        d[i & 1023] = s
    return time.process_time() - start


@dataclass(frozen=True, slots=True)
class Measured:
    """The best of several runs of one case."""

    report: Report
    cpu_seconds: float
    spin_seconds: float
    """Mean of the spins directly before and after it."""
    compile_seconds: float = 0.0
    """CPU seconds that the first run took beyond this one: compiling, or reading programs from JAX's cache on disk."""

    @property
    def spins(self) -> float:
        """CPU time in spins."""
        return self.cpu_seconds / self.spin_seconds


def workload(num_requests: int = NUM_REQUESTS) -> Workload:
    """`num_requests`, 3 per second: lognormal prompts of about 512 and outputs of about 128 tokens, from seed 0."""
    random = np.random.default_rng(0)
    seconds = np.cumsum(random.exponential(1 / 3, num_requests))
    prompts = _lengths(random, 512, 16, 2048, num_requests)
    outputs = _lengths(random, 128, 4, 1024, num_requests)
    times = np.rint(seconds * 1e9).astype(np.int64)
    rows = zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    arrivals = (Arrival(time_ns, request, prompt, output) for request, (time_ns, prompt, output) in enumerate(rows))
    return Workload(arrivals, total=num_requests)


def _lengths(random: np.random.Generator, mean: int, low: int, high: int, count: int) -> Int64[np.ndarray, " requests"]:
    drawn = random.lognormal(np.log(mean) - 0.18, 0.6, count)
    return np.clip(np.round(drawn), low, high).astype(np.int64)


def scenario(
    base_ns: int,
    backend: Literal["none", "jax"],
    road: Literal["native", "rows"] = "native",
    model: Literal["echo", "reader"] = "echo",
) -> Scenario:
    """The benchmark's scenario; its workload section stands for `workload`, which takes its place."""
    return Scenario.model_validate(
        {
            "name": "bench",
            "core": {"batch_size": 128, "prefill_chunk": 512},
            "cache": {
                "page_size": 16,
                "num_pages": 4096,
                "max_sequence_length": 4096,
                "layers": 2,
                "kv_heads": 2,
                "head_dim": 16,
            },
            "backend": {"kind": backend, "road": road},
            "workload": {
                "arrivals": {"kind": "poisson", "request_rate": 3.0},
                "prompt_tokens": {"kind": "lognormal", "mean": 512.0, "sigma": 0.6, "min": 16, "max": 2048},
                "output_tokens": {"kind": "lognormal", "mean": 128.0, "sigma": 0.6, "min": 4, "max": 1024},
                "num_requests": NUM_REQUESTS,
            },
            "model": {"kind": model},
            "cost": {"kind": "linear", "base_ns": base_ns, "per_token_ns": 150_000},
        }
    )


def cases() -> dict[str, Scenario]:
    """Every row of the benchmark."""
    return {
        "plan_only": scenario(BASE_NS, "none"),
        "plan_only_light": scenario(LIGHT_BASE_NS, "none"),
        "jax_cpu": scenario(BASE_NS, "jax"),
        "jax_cpu_rows": scenario(BASE_NS, "jax", "rows"),
        "jax_cpu_reader": scenario(BASE_NS, "jax", "native", "reader"),
    }


def bench(names: list[str], repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure the named cases; of each the lowest of `repeats` ratios, of DEVICE_CHECKS the median over its pairs.

    With JAX one more run, before them, compiles.
    """
    found: dict[str, Any] = {"spin_seconds": spin()}
    for name in names:

        def told(text: str, name: str = name) -> None:
            tell(f"{name}: {text}")

        found[name] = _device_checks(repeats, told) if name == DEVICE_CHECKS else _case(name, repeats, told)
    return found


def _case(name: str, repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    asked = cases()[name]
    compiled = _cpu_seconds(_run(asked, True, NUM_REQUESTS)) if asked.backend.kind == "jax" else 0.0
    runs: list[Measured] = []
    before = spin()
    for repeat in range(repeats):
        report, after = _run(asked, True, NUM_REQUESTS), spin()
        runs.append(Measured(report, _cpu_seconds(report), (before + after) / 2))
        tell(f"run {repeat + 1} of {repeats}: {runs[-1].spins:.2f} spins")
        before = after
    best = min(runs, key=lambda measured: measured.spins)
    best = replace(best, compile_seconds=max(0.0, compiled - best.cpu_seconds))
    return _figures(best, TARGETS[name])


def _device_checks(repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Short runs with and without the checks in turns: each pair shares the state of the machine."""
    asked, pairs = cases()["jax_cpu_rows"], CHECKS_PAIRS * repeats
    for audit in CHECKS:
        _run(asked, audit, CHECKS_REQUESTS)
    turns: list[tuple[float, float]] = []
    violations = steps = 0
    for pair in range(pairs):
        reports = [_run(asked, audit, CHECKS_REQUESTS) for audit in CHECKS]
        checked, unchecked = map(_us_per_step, reports)
        turns.append((checked, unchecked))
        violations, steps = violations + len(reports[0].violations), reports[0].recorder.steps
        tell(f"pair {pair + 1} of {pairs}: {checked:.0f} us a step, {unchecked:.0f} without")
    return {
        "steps": steps,
        "us_per_step": statistics.median(checked for checked, _ in turns),
        "unchecked_us_per_step": statistics.median(unchecked for _, unchecked in turns),
        "checks_share": statistics.median(checked / unchecked - 1 for checked, unchecked in turns),
        "max_checks_share": MAX_CHECKS_SHARE,
        "violations": violations,
    }


def _run(asked: Scenario, audit: Audit, num_requests: int) -> Report:
    return run_whole(asked, workload=workload(num_requests), audit=audit)


def _cpu_seconds(report: Report) -> float:
    return float(report.summary["duration_cpu_seconds"])


def _us_per_step(report: Report) -> float:
    return _cpu_seconds(report) / report.recorder.steps * 1e6


def _figures(best: Measured, target: float | None) -> dict[str, Any]:
    recorder, summary = best.report.recorder, best.report.summary
    steps = recorder.steps
    decodes = sum(recorder.series["decode_tokens"])
    return {
        "requests": summary["requests"]["finished"],
        "steps": steps,
        "mean_running": decodes / steps,
        "cpu_seconds": best.cpu_seconds,
        "compile_seconds": best.compile_seconds,
        "spin_seconds": best.spin_seconds,
        "spins": best.spins,
        "target": target,
        "us_per_step": _us_per_step(best.report),
        "us_per_request_step": best.cpu_seconds / decodes * 1e6,
        "violations": len(best.report.violations),
    }
