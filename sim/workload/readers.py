"""Trace readers: five public formats, streamed row by row into arrivals.

format     file    time column, unit                       prompt, output tokens                   starts at 0
azure      CSV     TIMESTAMP, UTC with up to 9 digits      ContextTokens, GeneratedTokens          no: first row is 0
burstgpt   CSV     Timestamp, s                            Request tokens, Response tokens         no: first row is 0
vidur      CSV     arrived_at, s                           num_prefill_tokens, num_decode_tokens   yes
mooncake   JSONL   timestamp, ms                           input_length, output_length (hash_ids)  yes
jsonl      JSONL   the names in JSONL_TIMES                the names in JSONL_PROMPT, JSONL_OUTPUT yes

Rows with 0 prompt or output tokens are failed calls: skipped and counted. Rows must be in order of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int32

from sim.scenario.workload_models import TraceFormat
from sim.workload.arrival import Arrival
from sim.workload.rows import Place, TraceError, clock_ns, csv_rows, decimal_ns, json_rows, token_count

ZERO_TOKENS = "0 prompt or output tokens"

JSONL_TIMES = {"arrival_time_ns": 0, "arrival_time_ms": 6, "arrival_time": 9, "arrived_at": 9, "timestamp": 9}
"""Accepted names of a JSONL line's arrival time, each with its unit as a power of ten in ns."""
JSONL_PROMPT = ("prompt_tokens", "input_tokens", "input_toks", "input_length", "prompt_len", "num_prefill_tokens")
JSONL_OUTPUT = ("output_tokens", "output_toks", "output_length", "output_len", "max_tokens", "num_decode_tokens")


class Row(NamedTuple):
    """One request as a file has it; `time_ns` is None where it was not asked for."""

    place: Place
    time_ns: int | None
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CsvFormat:
    """Columns of a CSV trace, and how its time reads."""

    time: str
    prompt: str
    output: str
    parse_time: Callable[[str], int]
    expected: str
    rebased: bool


def _seconds(text: str) -> int:
    return decimal_ns(text, 9)


AZURE = CsvFormat(
    "TIMESTAMP", "ContextTokens", "GeneratedTokens", clock_ns, "a time like 2023-11-16 18:17:03.9799600", rebased=True
)
BURSTGPT = CsvFormat("Timestamp", "Request tokens", "Response tokens", _seconds, "a number of seconds", rebased=True)
VIDUR = CsvFormat(
    "arrived_at", "num_prefill_tokens", "num_decode_tokens", _seconds, "a number of seconds", rebased=False
)
CSV_FORMATS: dict[str, CsvFormat] = {"azure": AZURE, "burstgpt": BURSTGPT, "vidur": VIDUR}


def _csv(form: CsvFormat, path: str | Path, timed: bool) -> Iterator[Row]:
    columns = [form.prompt, form.output, *([form.time] if timed else [])]
    for place, cells in csv_rows(path, columns):
        time_ns = None
        if timed:
            try:
                time_ns = form.parse_time(cells[2])
            except ValueError:
                place.fail(form.time, form.expected, cells[2])
        prompt = token_count(place, form.prompt, cells[0])
        yield Row(place, time_ns, prompt, token_count(place, form.output, cells[1]))


def _field(place: Place, item: Mapping[str, Any], names: tuple[str, ...], what: str) -> str:
    for name in names:
        if name in item:
            return name
    raise place.broken(f"no {what}: expected one of the fields {', '.join(names)}, found {', '.join(item) or 'none'}")


def _jsonl(
    path: str | Path, times: Mapping[str, int], prompt: tuple[str, ...], output: tuple[str, ...], timed: bool
) -> Iterator[Row]:
    for place, item in json_rows(path):
        time_ns = None
        if timed:
            name = _field(place, item, tuple(times), "arrival time")
            try:
                time_ns = decimal_ns(_number(item[name]), times[name])
            except ValueError:
                place.fail(name, "a number, 0 or more", item[name])
        prompt_name = _field(place, item, prompt, "prompt length")
        output_name = _field(place, item, output, "output length")
        yield Row(
            place,
            time_ns,
            token_count(place, prompt_name, item[prompt_name]),
            token_count(place, output_name, item[output_name]),
            _hashes(place, item.get("hash_ids", [])),
        )


def _number(value: object) -> int | Decimal:
    if type(value) is not int and not isinstance(value, Decimal):
        raise ValueError("not a number")
    return value


def _hashes(place: Place, ids: object) -> tuple[int, ...]:
    items = cast("Sequence[object]", ids) if isinstance(ids, list) else (ids,)
    whole = [item for item in items if type(item) is int]
    if len(whole) != len(items) or not isinstance(items, list):
        place.fail("hash_ids", "a list of whole numbers", items)
    return tuple(whole)


def rows_of(form: TraceFormat, path: str | Path, *, timed: bool = True) -> Iterator[Row]:
    """Every row of a trace as the file has it; `timed` False reads no times."""
    if form in CSV_FORMATS:
        return _csv(CSV_FORMATS[form], path, timed)
    if form == "mooncake":
        return _jsonl(path, {"timestamp": 6}, ("input_length",), ("output_length",), timed)
    return _jsonl(path, JSONL_TIMES, JSONL_PROMPT, JSONL_OUTPUT, timed)


def read_trace(
    form: TraceFormat,
    path: str | Path,
    *,
    time_scale: float = 1.0,
    limit: int | None = None,
    skipped: dict[str, int] | None = None,
) -> Iterator[Arrival]:
    """Stream the arrivals of a trace in bounded memory; TraceError names file, row and column.

    `limit` counts the arrivals yielded; `skipped` gathers how many rows were left out and why.
    """
    scale = Fraction(str(time_scale))
    origin = None if form in CSV_FORMATS and CSV_FORMATS[form].rebased else 0
    previous = request = 0
    for row in rows_of(form, path):
        assert row.time_ns is not None
        if origin is None:
            origin = previous = row.time_ns
        if row.time_ns < previous:
            raise row.place.broken(
                f"it arrives {(previous - row.time_ns) / 1e9:,.9g} s before the row above: sort the file by time"
            )
        previous = row.time_ns
        if row.prompt_tokens == 0 or row.output_tokens == 0:
            if skipped is not None:
                skipped[ZERO_TOKENS] = skipped.get(ZERO_TOKENS, 0) + 1
            continue
        time_ns = (row.time_ns - origin) * scale.numerator // scale.denominator
        yield Arrival(time_ns, request, row.prompt_tokens, row.output_tokens, row.prefix_hashes)
        request += 1
        if request == limit:
            return


def read_lengths(form: TraceFormat, path: str | Path) -> tuple[Int32[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]:
    """Prompt and output tokens of every row that has both; arrival times are not needed."""
    pairs = [
        (row.prompt_tokens, row.output_tokens)
        for row in rows_of(form, path, timed=False)
        if row.prompt_tokens and row.output_tokens
    ]
    if not pairs:
        raise TraceError(f"{path}: no row has both a prompt and an output length")
    both = np.asarray(pairs, np.int32)
    return both[:, 0], both[:, 1]
