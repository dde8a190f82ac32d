"""The report of a run as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from invariants.catalogue import CATALOGUE
from reports.diff import LATENCIES, figure
from reports.record import RunRecord, Violation

LATENCY_FIGURES = ("count", "mean", "std", "min", "p50", "p90", "p95", "p99", "p99_9", "max")
EVENTS_SHOWN = 40
"""Last lines of failure/events.txt in the report."""


def write(run_folder: Path) -> Path:
    """Write run_folder/report.html and return its path; plots that are not there yet are drawn first.

    The same record and plots give the same bytes. RecordError: the record cannot be read. OSError: a file
    cannot be written; it is named.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    record = RunRecord.load(run_folder)
    environment = Environment(
        loader=PackageLoader("reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    page = environment.get_template("report.html.j2").render(**_contents(record))
    path = record.folder / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


def _contents(record: RunRecord) -> dict[str, Any]:
    summary = record.summary
    failure = record.folder / "failure"
    invariants = _table(summary.get("invariants"))
    return {
        "record": record,
        "summary": summary,
        "held": summary["verdict"] == "held",
        "origin": _origin(summary),
        "overview": _overview(record),
        "latencies": _latencies(record),
        "latency_figures": LATENCY_FIGURES,
        "invariants": invariants,
        "statements": {name: CATALOGUE[name].statement for name in invariants if name in CATALOGUE},
        "num_checked": sum(bool(counts["checked"]) for counts in invariants.values()),
        "expectations": summary.get("expectations") or [],
        "reasons": {
            **_table(summary.get("rejected_reasons")),
            **_table(summary.get("skipped_reasons")),
        },
        "violations": [(violation, _evidence(violation)) for violation in record.violations],
        "events": _last_lines(failure / "events.txt"),
        "replay": _last_lines(failure / "replay.txt") or f"kvproof replay {shlex.quote(str(record.folder))}",
        "plots": _plots(record),
    }


def _table(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def _origin(summary: Mapping[str, Any]) -> dict[str, str]:
    """What was run, on what, as key and text."""
    told = {key: summary[key] for key in ("clock", "seed", "scenario_hash", "trace_hash", "backend") if key in summary}
    device = summary.get("device")
    told.update(
        {f"device {key}": value for key, value in _table(device).items()}
        if isinstance(device, dict)
        else {"device": device}
    )
    told.update({f"version of {key}": value for key, value in _table(summary.get("versions")).items()})
    return {key: str(value) for key, value in told.items() if value is not None}


def _overview(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, figure and unit of the run's totals; what the summary does not have is left out."""
    rows = [
        ("steps", "steps", ""),
        *((f"requests {state}", f"requests.{state}", "") for state in record.summary["requests"]),
        *((f"tokens {kind}", f"tokens.{kind}", "") for kind in _table(record.summary.get("tokens"))),
        ("preemptions", "num_preemptions", ""),
        ("page usage, mean", "kv_cache_usage_perc.mean", "%"),
        ("page usage, greatest", "kv_cache_usage_perc.max", "%"),
        ("internal fragmentation, mean", "internal_fragmentation.mean", "%"),
        ("request throughput", "request_throughput", "requests / s"),
        ("output throughput", "output_throughput", "tokens / s"),
        (f"duration, {record.clock}", "duration_simulated_seconds", "s"),
        ("duration, wall clock", "duration_wall_seconds", "s"),
        ("duration, CPU", "duration_cpu_seconds", "s"),
    ]
    shown: list[tuple[str, str, str]] = []
    for name, path, unit in rows:
        value = record.number(path)
        if value is not None:
            shown.append((name, figure(value * 100.0 if unit == "%" else value), unit))
    return shown


def _latencies(record: RunRecord) -> list[tuple[str, list[str]]]:
    """Each latency's count and its figures in ms."""
    rows: list[tuple[str, list[str]]] = []
    for latency in LATENCIES:
        values = [record.number(f"{latency}.{name}") for name in LATENCY_FIGURES]
        cells = [figure(values[0]), *(figure(None if v is None else v * 1e3) for v in values[1:])]
        rows.append((latency.removesuffix("_seconds").replace("_", " "), cells))
    return rows


def _evidence(violation: Violation) -> list[tuple[str, str]]:
    """What the summary says of a violation beyond id, step, time and message; empty entries are left out."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value))
        for key, value in violation.evidence.items()
        if value not in ("", None, [], {})
    ]


def _last_lines(path: Path) -> str:
    """The last lines of a text file; empty where there is none."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-EVENTS_SHOWN:])
    except OSError:
        return ""


def _plots(record: RunRecord) -> list[tuple[str, str, str]]:
    """Title, caption and SVG (base64) of every plot."""
    from reports.plots import PLOTS, draw

    files = {plot.stem: record.folder / "plots" / f"{plot.stem}.svg" for plot in PLOTS}
    if not all(path.is_file() for path in files.values()):
        draw(record.folder, ("svg",))
    return [
        (plot.title, plot.caption, base64.b64encode(files[plot.stem].read_bytes()).decode("ascii")) for plot in PLOTS
    ]
