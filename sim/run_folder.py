"""The folder of a run on disk: its files, its name, and how they are written and read back."""

from __future__ import annotations

import json
import secrets
import shlex
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from sim.record import Recorder
from sim.request_table import NEVER, STATE_NAMES, RequestTable
from sim.scenario import Scenario, dump_scenario
from sim.trace_hash import DIGEST_BYTES

SCENARIO: Final = "scenario.yaml"
SUMMARY: Final = "summary.json"
REQUESTS: Final = "requests.jsonl"
SERIES: Final = "series.npz"
FAILURE: Final = "failure"
VIOLATIONS: Final = "violations.json"
EVENTS: Final = "events.txt"
REPLAY: Final = "replay.txt"
SUMMARY_SCHEMA: Final = "kvproof/summary-v1"
_LINES_PER_WRITE: Final = 4096


def new_folder(parent: Path, name: str) -> Path:
    """Make `<name>-<utc>-<id>` below `parent`. OSError: it cannot be made."""
    utc = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = parent / f"{name}-{utc}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder


@contextmanager
def unless_unused(folder: Path) -> Generator[None]:
    """Removes the folder where what happens inside ends in an error before there is more to keep than a scenario."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [SCENARIO]:
                (folder / SCENARIO).unlink()
            folder.rmdir()
        raise


def write_scenario(folder: Path, scenario: Scenario) -> None:
    """Write the resolved scenario. OSError: the folder does not take it."""
    dump_scenario(scenario, folder / SCENARIO)


def write_failure(
    folder: Path,
    scenario: Scenario,
    summary: Mapping[str, Any],
    events: Sequence[str],
    recorder: Recorder,
) -> None:
    """Write `failure/`: the scenario, what broke, the last events, and the command that replays it."""
    failure = folder / FAILURE
    failure.mkdir(exist_ok=True)
    write_scenario(failure, scenario)
    write_json(
        failure / VIOLATIONS,
        {
            **{key: summary[key] for key in ("violations", "crash", "crash_id", "crash_cause")},
            "steps": recorder.steps,
            "trace_hash": recorder.hash.hexdigest,
            "step_hashes": recorder.hash.step_digests.hex(),
        },
    )
    (failure / EVENTS).write_text("\n".join(events) + "\n", encoding="utf-8")
    (failure / REPLAY).write_text(replay_command(failure) + "\n", encoding="utf-8")


def replay_command(folder: Path) -> str:
    """What a shell runs to replay a run folder or its failure folder."""
    return f"kvproof replay {shlex.quote(str(folder))}"


def write_record(folder: Path, recorder: Recorder, summary: dict[str, Any]) -> None:
    """Write requests, series and, last of all, the summary. OSError: the disk does not take them."""
    with (folder / REQUESTS).open("w", encoding="utf-8") as file:
        for lines in request_lines(recorder):
            file.write(lines)
    with (folder / SERIES).open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **series_arrays(recorder))
    write_json(folder / SUMMARY, summary)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read one JSON value. OSError; ValueError: it is none, with file and line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: no JSON at line {error.lineno}: {error.msg}") from None


def request_lines(recorder: Recorder) -> Iterator[str]:
    """requests.jsonl in pieces: one object per request, null for a time that never came."""
    table = recorder.requests
    for first in range(0, table.num_requests, _LINES_PER_WRITE):
        rows = range(first, min(first + _LINES_PER_WRITE, table.num_requests))
        yield "".join(json.dumps(_request(table, row)) + "\n" for row in rows)


def _request(table: RequestTable, row: int) -> dict[str, Any]:
    request = table.first_id + row
    times = {
        name: None if (value := int(getattr(table, name)[row])) == NEVER else value
        for name in ("arrival_ns", "admitted_ns", "first_token_ns", "finish_ns")
    }
    return {
        "id": request,
        **times,
        "prompt_tokens": int(table.prompt_tokens[row]),
        "output_tokens": int(table.output_tokens[row]),
        "state": STATE_NAMES[table.state[row]],
        "reason": table.reason.get(request) or None,
        "preemptions": int(table.preemptions[row]),
    }


def series_arrays(recorder: Recorder) -> dict[str, Any]:
    """The arrays of series.npz; `step_hash` is the rolling hash after each completed step, as uint64."""
    gaps = sorted(recorder.itl_gaps.items())
    policy = recorder.policy
    return {
        **recorder.series,
        "itl_gap_ns": np.array([gap for gap, _ in gaps], np.int64),
        "itl_count": np.array([count for _, count in gaps], np.int64),
        **recorder.page_events(),
        **recorder.segments(),
        "step_hash": np.frombuffer(bytes(recorder.hash.step_digests), f"<u{DIGEST_BYTES}"),
        "num_pages": np.int64(policy.num_pages),
        "page_size": np.int64(policy.page_size),
        "batch_size": np.int64(policy.batch_size),
    }


def read_step_hashes(folder: Path) -> bytes:
    """The digests of every completed step of a recorded run. OSError; ValueError: there is no such record."""
    try:
        with np.load(folder / SERIES, allow_pickle=False) as archive:
            return archive["step_hash"].tobytes()
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{SERIES}: no readable NumPy archive with step_hash") from None
