"""Two runs side by side: the same figures of both, and their ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reports.record import number, read_summary

LATENCIES = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
)

METRICS = (
    "steps",
    "requests.submitted",
    "requests.finished",
    "requests.cancelled",
    "requests.rejected",
    "requests.live",
    "tokens.prompt",
    "tokens.output",
    "tokens.scheduled",
    "tokens.recomputed",
    "num_preemptions",
    "duration_simulated_seconds",
    "request_throughput",
    "output_throughput",
    *(f"{latency}.{figure}" for latency in LATENCIES for figure in ("mean", "p50", "p90", "p99")),
    "kv_cache_usage_perc.mean",
    "kv_cache_usage_perc.max",
    "internal_fragmentation.mean",
    "duration_cpu_seconds",
)
"""Dotted paths into summary.json, in the order of the table."""

IDENTITIES = ("clock", "seed", "scenario_hash", "backend", "trace_hash", "verdict")
"""Keys of a summary that say what was run and whether it went the same way."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of both runs; `ratio` is b / a, None where a is zero or either is absent."""

    metric: str
    a: float | None
    b: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of two runs, and what differs in what was run."""

    name_a: str
    name_b: str
    rows: tuple[Row, ...]
    differing: tuple[tuple[str, str, str], ...]
    """(key, value of a, value of b) of every identity that is not the same."""

    @property
    def same_trace(self) -> bool:
        """Whether both runs planned, moved and yielded the same, step by step."""
        return all(key != "trace_hash" for key, _, _ in self.differing)

    def lines(self) -> list[str]:
        """The comparison as the lines of a table in plain text."""
        head = ("metric", self.name_a, self.name_b, "b / a")
        body = [(row.metric, figure(row.a), figure(row.b), ratio(row.ratio)) for row in self.rows]
        body += [(key, a, b, "") for key, a, b in self.differing]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(4)]
        rule = tuple("-" * width for width in widths)
        return [
            "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip()
            for line in (head, rule, *body)
        ]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return asdict(self)


def compare(a: Path, b: Path) -> Comparison:
    """Compare the summaries of two run folders. RecordError: one of them cannot be read."""
    first, second = read_summary(Path(a)), read_summary(Path(b))
    rows = tuple(_row(first, second, metric) for metric in METRICS)
    return Comparison(
        name_a=str(first["name"]),
        name_b=str(second["name"]),
        rows=tuple(row for row in rows if row.a is not None or row.b is not None),
        differing=tuple(
            (key, str(first.get(key)), str(second.get(key))) for key in IDENTITIES if first.get(key) != second.get(key)
        ),
    )


def _row(first: Mapping[str, Any], second: Mapping[str, Any], metric: str) -> Row:
    a, b = number(first, metric), number(second, metric)
    return Row(metric, a, b, b / a if a and b is not None else None)


def figure(value: float | None) -> str:
    """A figure with thousands separators: whole numbers whole, others with four significant digits."""
    if value is None:
        return "-"
    if float(value).is_integer() or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:,.4g}"


def ratio(value: float | None) -> str:
    """A ratio with three decimals; "-" where there is none."""
    return "-" if value is None else f"{value:,.3f}"
