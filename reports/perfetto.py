"""A run as a Chrome trace (the JSON event format), which Perfetto and chrome://tracing open."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports.record import RunRecord, Series

ENGINE, REQUESTS = 1, 2
"""Process ids of the two groups of tracks."""

SEGMENTS = ("waiting", "prefill", "decode", "preempted")

Event = dict[str, Any]


def write(run_folder: Path) -> Path:
    """Write run_folder/trace.json.gz and return its path. The same record gives the same bytes.

    RecordError: the record cannot be read. OSError: the file cannot be written; it is named.
    """
    record = RunRecord.load(run_folder)
    path = record.folder / "trace.json.gz"
    out = io.BytesIO()
    # No name and no time in the gzip header.
    with gzip.GzipFile(filename="", mode="wb", fileobj=out, compresslevel=5, mtime=0) as file:
        file.write(json.dumps(trace(record), separators=(",", ":")).encode())
    try:
        path.write_bytes(out.getvalue())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


def trace(record: RunRecord) -> dict[str, Any]:
    """The trace as one JSON object; times (ts, dur) are microseconds of the record's clock."""
    return {
        "displayTimeUnit": "ms",
        "otherData": {"scenario": record.name, "clock": record.clock},
        "traceEvents": [*_names(record), *_steps(record.series), *_violations(record), *_requests(record)],
    }


def _us(ns: int) -> float | int:
    return ns // 1000 if ns % 1000 == 0 else ns / 1000


def _names(record: RunRecord) -> Iterator[Event]:
    for pid, name in ((ENGINE, f"engine ({record.clock} time)"), (REQUESTS, f"requests ({record.clock} time)")):
        yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    yield {"ph": "M", "pid": ENGINE, "tid": 0, "name": "thread_name", "args": {"name": "steps"}}
    requests = record.requests
    for request, state in zip(requests.id.tolist(), requests.state, strict=True):
        name = f"request {request}" if state == "finished" else f"request {request} ({state})"
        yield {"ph": "M", "pid": REQUESTS, "tid": request, "name": "thread_name", "args": {"name": name}}
        yield {
            "ph": "M", "pid": REQUESTS, "tid": request, "name": "thread_sort_index", "args": {"sort_index": request},
        }  # fmt: skip


def _steps(series: Series) -> Iterator[Event]:
    """A slice for each step, and the counters as they stood when it was planned."""
    columns = (
        series.step, series.start_ns, series.end_ns, series.prefill_tokens, series.decode_tokens, series.running,
        series.waiting, series.slots_used, series.pages_owned, series.pages_fenced, series.pages_free,
        series.preemptions,
    )  # fmt: skip
    for step, start, end, prefill, decode, running, waiting, slots, owned, fenced, free, preempted in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        ts = _us(start)
        args = {"prefill_tokens": prefill, "decode_tokens": decode, "preemptions": preempted}
        yield {
            "ph": "X", "pid": ENGINE, "tid": 0, "name": f"step {step}", "cat": "step", "ts": ts,
            "dur": _us(end - start), "args": args,
        }  # fmt: skip
        for name, values in (
            ("pages", {"owned": owned, "fenced": fenced, "free": free}),
            ("running", {"requests": running}),
            ("waiting", {"requests": waiting}),
            ("slots", {"used": slots}),
        ):
            yield {"ph": "C", "pid": ENGINE, "name": name, "ts": ts, "args": values}


def _requests(record: RunRecord) -> Iterator[Event]:
    series = record.series
    for request, kind, start, end in zip(
        series.seg_request.tolist(),
        series.seg_kind.tolist(),
        series.seg_start_ns.tolist(),
        series.seg_end_ns.tolist(),
        strict=True,
    ):
        yield {
            "ph": "X", "pid": REQUESTS, "tid": request, "name": SEGMENTS[kind], "cat": "request", "ts": _us(start),
            "dur": _us(end - start),
        }  # fmt: skip
    requests = record.requests
    for request, first in zip(requests.id.tolist(), requests.first_token_ns.tolist(), strict=True):
        if first >= 0:
            yield {
                "ph": "i", "s": "t", "pid": REQUESTS, "tid": request, "name": "first token", "cat": "request",
                "ts": _us(first),
            }  # fmt: skip


def _violations(record: RunRecord) -> Iterator[Event]:
    for violation in record.violations:
        if violation.time_ns is not None:
            yield {
                "ph": "i", "s": "g", "pid": ENGINE, "tid": 0, "name": f"{violation.id} violated", "cat": "violation",
                "ts": _us(violation.time_ns), "args": {"message": violation.message, "step": violation.step},
            }  # fmt: skip
