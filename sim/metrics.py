"""The figures of a run, computed from its recorder: latencies in simulated seconds, usage in 0..1."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from sim.record import Recorder
from sim.request_table import CANCELLED, FINISHED, LIVE, NEVER, REJECTED

QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
NO_LATENCY: Final[dict[str, float | int | None]] = {
    "count": 0,
    **dict.fromkeys(("mean", "std", "min", *QUANTILES, "max")),
}
_NS: Final = 1e-9

Figures = dict[str, float | int | None]


def distribution(
    values_ns: Int64[np.ndarray, " values"], counts: Int64[np.ndarray, " values"] | None = None
) -> Figures:
    """count, mean, std, min, quantiles and max in seconds, of values in ns with optional multiplicities.

    A quantile q is interpolated between the order statistics around q * (count - 1), as numpy.quantile does.
    """
    if counts is None:
        counts = np.ones(len(values_ns), np.int64)
    total = int(counts.sum())
    if total == 0:
        return dict(NO_LATENCY)
    order = values_ns.argsort(kind="stable")
    values, times = values_ns[order], counts[order]
    ends = times.cumsum()
    mean = float(np.dot(values.astype(np.float64), times)) / total
    variance = float(np.dot((values - mean) ** 2, times)) / total
    figures: Figures = {"count": total, "mean": mean * _NS, "std": variance**0.5 * _NS}
    figures["min"] = int(values[0]) * _NS
    for name, q in QUANTILES.items():
        figures[name] = _quantile(values, ends, q * (total - 1)) * _NS
    figures["max"] = int(values[-1]) * _NS
    return figures


def _quantile(values: NDArray[np.int64], ends: NDArray[np.int64], rank: float) -> float:
    """The value at a fractional rank (from 0), where value i has the ranks below ends[i]."""
    low = int(rank)
    first = float(values[ends.searchsorted(low, side="right")])
    if rank == low:
        return first
    second = float(values[ends.searchsorted(low + 1, side="right")])
    return first + (second - first) * (rank - low)


def latencies(recorder: Recorder) -> dict[str, Figures]:
    """The four latencies of serving benchmarks.

    time to first token and the gaps between tokens count for every request that got there; end-to-end latency and
    time per output token ((last - first) / (tokens - 1), more than one token) for finished ones only.
    """
    requests = recorder.requests
    arrival, first = requests.arrival_ns, requests.first_token_ns
    finish, output = requests.finish_ns, requests.output_tokens.astype(np.int64)
    got_one = first != NEVER
    finished = requests.state == FINISHED
    several = finished & (output > 1)
    span = finish[several] - first[several]
    gaps = np.fromiter(recorder.itl_gaps.keys(), np.int64, len(recorder.itl_gaps))
    gap_counts = np.fromiter(recorder.itl_gaps.values(), np.int64, len(recorder.itl_gaps))
    return {
        "time_to_first_token_seconds": distribution((first - arrival)[got_one]),
        "inter_token_latency_seconds": distribution(gaps, gap_counts),
        "time_per_output_token_seconds": distribution(np.rint(span / (output[several] - 1)).astype(np.int64)),
        "e2e_request_latency_seconds": distribution((finish - arrival)[finished]),
    }


def page_figures(recorder: Recorder) -> dict[str, Figures]:
    """Usage (owned pages / allocatable pages) and internal fragmentation (1 - live tokens / owned places).

    Means are over simulated time in which a step ran; fragmentation over that in which a page was owned.
    """
    series = recorder.series
    weight = (series["end_ns"] - series["start_ns"]).astype(np.float64)
    owned = series["pages_owned"]
    usage = owned / (recorder.policy.num_pages - 1)
    some = owned > 0
    waste = 1.0 - series["live_tokens"][some] / (owned[some] * recorder.policy.page_size)
    return {
        "kv_cache_usage_perc": {"mean": _mean(usage, weight), "max": float(usage.max()) if len(usage) else None},
        "internal_fragmentation": {"mean": _mean(waste, weight[some])},
    }


def _mean(values: Float64[np.ndarray, " n"], weights: Float64[np.ndarray, " n"]) -> float | None:
    total = float(weights.sum())
    return float(np.dot(values, weights)) / total if total > 0 else None


def run_figures(recorder: Recorder, end_ns: int, skipped: dict[str, int]) -> dict[str, Any]:
    """Everything in a summary that follows from the recorder alone."""
    requests, count = recorder.requests, recorder.num_requests
    states, prompt = recorder.count_of_state, requests.prompt_tokens.astype(np.int64)
    accepted = requests.state != REJECTED
    output_tokens = int(requests.output_tokens.sum(dtype=np.int64))
    seconds = end_ns * _NS
    reasons: dict[str, int] = {}
    for request, reason in requests.reason.items():
        if requests.state[request - requests.first_id] == REJECTED:
            # Refusals name the request and its sizes; what is left tells the kind.
            kind = re.sub(r"\d+", "N", reason.removeprefix(f"request {request}: "))
            reasons[kind] = reasons.get(kind, 0) + 1
    return {
        "steps": recorder.steps,
        "failed_steps": recorder.failed_steps,
        "requests": {
            "submitted": count,
            "finished": states[FINISHED],
            "cancelled": states[CANCELLED],
            "rejected": states[REJECTED],
            "live": states[LIVE],
            "skipped": sum(skipped.values()),
        },
        "rejected_reasons": reasons,
        "skipped_reasons": dict(skipped),
        "tokens": {
            "prompt": int(prompt[accepted].sum()),
            "output": output_tokens,
            "scheduled": recorder.scheduled_tokens,
            "recomputed": recorder.recomputed_tokens,
            "discarded": recorder.discarded_tokens,
        },
        **latencies(recorder),
        **page_figures(recorder),
        "num_preemptions": recorder.num_preemptions,
        "trace_hash": recorder.hash.hexdigest,
        "duration_simulated_seconds": seconds,
        "request_throughput": states[FINISHED] / seconds if seconds else None,
        "output_throughput": output_tokens / seconds if seconds else None,
    }
