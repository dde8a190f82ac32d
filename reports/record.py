"""The record of one run, read from its folder: what `kvproof run` wrote is all that a report may know."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int64

SUMMARY_SCHEMA = "kvproof/summary-v1"

NEVER = -1
"""The time of something that did not happen to a request."""

FREE = -1
FENCED = -2
"""Page owners that are no request."""

WAITING, PREFILL, DECODE, PREEMPTED = range(4)
"""Kinds of request segments; PREEMPTED waits for its next admission."""

STATES = ("finished", "cancelled", "rejected", "live")

PER_STEP = (
    "step",
    "start_ns",
    "end_ns",
    "prefill_tokens",
    "decode_tokens",
    "running",
    "waiting",
    "slots_used",
    "pages_owned",
    "pages_free",
    "pages_fenced",
    "live_tokens",
    "preemptions",
)
GROUPS: tuple[tuple[str, ...], ...] = (
    PER_STEP,
    ("itl_gap_ns", "itl_count"),
    ("page_time_ns", "page_id", "page_owner"),
    ("seg_request", "seg_kind", "seg_start_ns", "seg_end_ns"),
)
"""Arrays of series.npz that must have equal lengths."""

SCALARS = ("num_pages", "page_size", "batch_size")


class RecordError(Exception):
    """A run folder that cannot be used; the message is one line that names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Requests:
    """One entry for each request, in the order of the file. Times are ns, NEVER where the request did not get there."""

    id: Int64[np.ndarray, " requests"]
    arrival_ns: Int64[np.ndarray, " requests"]
    admitted_ns: Int64[np.ndarray, " requests"]
    first_token_ns: Int64[np.ndarray, " requests"]
    finish_ns: Int64[np.ndarray, " requests"]
    prompt_tokens: Int64[np.ndarray, " requests"]
    output_tokens: Int64[np.ndarray, " requests"]
    preemptions: Int64[np.ndarray, " requests"]
    state: tuple[str, ...]
    reason: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True, slots=True)
class Series:
    """The arrays of series.npz: one entry per step, per distinct token gap, per page event, per request segment."""

    step: Int64[np.ndarray, " steps"]
    start_ns: Int64[np.ndarray, " steps"]
    end_ns: Int64[np.ndarray, " steps"]
    prefill_tokens: Int64[np.ndarray, " steps"]
    decode_tokens: Int64[np.ndarray, " steps"]
    running: Int64[np.ndarray, " steps"]
    """Admitted requests that have not ended."""
    waiting: Int64[np.ndarray, " steps"]
    slots_used: Int64[np.ndarray, " steps"]
    pages_owned: Int64[np.ndarray, " steps"]
    pages_free: Int64[np.ndarray, " steps"]
    pages_fenced: Int64[np.ndarray, " steps"]
    live_tokens: Int64[np.ndarray, " steps"]
    """Tokens with K/V in owned pages."""
    preemptions: Int64[np.ndarray, " steps"]
    itl_gap_ns: Int64[np.ndarray, " gaps"]
    itl_count: Int64[np.ndarray, " gaps"]
    page_time_ns: Int64[np.ndarray, " page_events"]
    page_id: Int64[np.ndarray, " page_events"]
    page_owner: Int64[np.ndarray, " page_events"]
    """Request id, FREE or FENCED, from that moment on."""
    seg_request: Int64[np.ndarray, " segments"]
    seg_kind: Int64[np.ndarray, " segments"]
    seg_start_ns: Int64[np.ndarray, " segments"]
    seg_end_ns: Int64[np.ndarray, " segments"]
    num_pages: int
    """Page 0, the dummy, included."""
    page_size: int
    batch_size: int

    @property
    def allocatable_pages(self) -> int:
        """Pages that a request can own: all but the dummy."""
        return self.num_pages - 1


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken invariant, as the summary tells it; `evidence` holds whatever else the summary says of it."""

    id: str
    step: int | None
    time_ns: int | None
    message: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run folder in memory, checked for shape and type."""

    folder: Path
    scenario: str
    """The resolved scenario, YAML."""
    summary: Mapping[str, Any]
    violations: tuple[Violation, ...]
    requests: Requests
    series: Series

    @property
    def name(self) -> str:
        """The scenario's name."""
        return str(self.summary["name"])

    @property
    def clock(self) -> str:
        """Which clock every time of the record was read from."""
        return str(self.summary["clock"])

    def number(self, path: str) -> float | None:
        """The figure at a dotted path of the summary; None where it is absent, null or no number."""
        return number(self.summary, path)

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read and check a run folder. RecordError: a file is missing, unreadable, cut short or of another format."""
        folder = Path(folder)
        summary = read_summary(folder)
        return cls(
            folder=folder,
            scenario=_read_text(folder / "scenario.yaml"),
            summary=summary,
            violations=_violations(folder / "summary.json", summary),
            requests=_read_requests(folder / "requests.jsonl"),
            series=_read_series(folder / "series.npz"),
        )


def number(summary: Mapping[str, Any], path: str) -> float | None:
    """The figure at a dotted path of a summary; None where it is absent, null or no number."""
    value: Any = summary
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = cast("Mapping[str, Any]", value).get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_summary(folder: Path) -> Mapping[str, Any]:
    """The checked summary.json of a run folder. RecordError: missing, no JSON, or of another schema."""
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such run folder; give the folder that `kvproof run` printed")
    path = folder / "summary.json"
    text = _read_text(path)
    try:
        parsed: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(path, f"no JSON at line {error.lineno}: {error.msg}") from None
    summary = cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}
    found = summary.get("schema")
    if found != SUMMARY_SCHEMA:
        raise RecordError(
            f"{path}: expected schema {SUMMARY_SCHEMA!r}, found {found!r}; run the scenario again with this version"
        )
    for key, kind in (("name", str), ("clock", str), ("steps", int), ("requests", dict), ("verdict", object)):
        if key not in summary or not isinstance(summary[key], kind):
            raise _broken(path, f"expected {key!r} ({kind.__name__}), found {summary.get(key, 'nothing')!r}")
    return summary


def _broken(path: Path, what: str) -> RecordError:
    return RecordError(f"{path}: {what}; the file was cut short or changed: run the scenario again")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecordError(f"{path}: missing; the run was not recorded whole: run the scenario again") from None
    except UnicodeDecodeError as error:
        raise _broken(path, f"no UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _violations(path: Path, summary: Mapping[str, Any]) -> tuple[Violation, ...]:
    listed = summary.get("violations", [])
    found: list[Violation] = []
    for index, entry in enumerate(cast("list[Any]", listed) if isinstance(listed, list) else [listed]):
        if not isinstance(entry, dict) or "id" not in entry:
            raise _broken(path, f"expected violations[{index}] to be an object with an id, found {entry!r}")
        rest = dict(cast("dict[str, Any]", entry))
        found.append(
            Violation(
                id=str(rest.pop("id")),
                step=rest.pop("step", None),
                time_ns=rest.pop("time_ns", None),
                message=str(rest.pop("message", "")),
                evidence=rest,
            )
        )
    return tuple(found)


_REQUEST_INTS = tuple(f.name for f in fields(Requests) if f.name not in ("state", "reason"))


def _read_requests(path: Path) -> Requests:
    columns: dict[str, list[int]] = {name: [] for name in _REQUEST_INTS}
    states: list[str] = []
    reasons: list[str] = []
    for line_number, line in enumerate(_read_text(path).splitlines(), start=1):
        where = f"line {line_number}"
        try:
            row = json.loads(line)
            for name in _REQUEST_INTS:
                value = row[name]
                columns[name].append(NEVER if value is None else value)
            states.append(row["state"])
            reasons.append(row.get("reason") or "")
        except json.JSONDecodeError as error:
            raise _broken(path, f"{where}: no JSON ({error.msg} at column {error.colno})") from None
        except KeyError as error:
            raise _broken(path, f"{where}: expected a key {error}, found none") from None
        except (TypeError, AttributeError):
            raise _broken(path, f"{where}: expected an object, found {line[:40]!r}") from None
        if states[-1] not in STATES:
            raise _broken(path, f"{where}: expected a state among {', '.join(STATES)}, found {states[-1]!r}")
    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        array = np.asarray(values) if values else np.zeros(0, np.int64)
        if array.dtype.kind != "i" or array.ndim != 1:
            raise _broken(path, f"expected whole numbers or null in {name!r}")
        arrays[name] = array.astype(np.int64)
    return Requests(**arrays, state=tuple(states), reason=tuple(reasons))


def _read_series(path: Path) -> Series:
    arrays: dict[str, Any] = {}
    name = ""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in (*SCALARS, *(name for group in GROUPS for name in group)):
                arrays[name] = archive[name]
    except FileNotFoundError:
        raise RecordError(f"{path}: missing; the run was not recorded whole: run the scenario again") from None
    except KeyError:
        raise _broken(path, f"expected an array {name!r}, found none") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, AttributeError, TypeError):
        raise _broken(path, "no readable NumPy archive") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    return _checked_series(path, arrays)


def _checked_series(path: Path, arrays: dict[str, Any]) -> Series:
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise _broken(path, f"expected whole numbers in {name!r}, found {array.dtype}")
    for name in SCALARS:
        if arrays[name].size != 1 or int(arrays[name].item()) < 1:
            raise _broken(path, f"expected one positive number in {name!r}, found {arrays[name].tolist()!r}")
        arrays[name] = int(arrays[name].item())
    for group in GROUPS:
        for name in group:
            if arrays[name].ndim != 1 or len(arrays[name]) != len(arrays[group[0]]):
                raise _broken(
                    path, f"expected {len(arrays[group[0]])} entries in {name!r}, found shape {arrays[name].shape}"
                )
            arrays[name] = arrays[name].astype(np.int64)
    series = Series(**arrays)
    for name, wrong in _out_of_range(series).items():
        if wrong.any():
            raise _broken(path, f"{name} at entry {int(np.argmax(wrong))}")
    return series


def _out_of_range(series: Series) -> dict[str, np.ndarray]:
    return {
        "a step starts before the one before it": np.diff(series.start_ns, prepend=series.start_ns[:1]) < 0,
        "a step ends before it starts": series.end_ns < series.start_ns,
        "page events are out of order": np.diff(series.page_time_ns, prepend=series.page_time_ns[:1]) < 0,
        f"a page id lies outside 0..{series.num_pages - 1}": (series.page_id < 0)
        | (series.page_id >= series.num_pages),
        "a segment ends before it starts": series.seg_end_ns < series.seg_start_ns,
        "a segment kind is unknown": (series.seg_kind < WAITING) | (series.seg_kind > PREEMPTED),
    }
