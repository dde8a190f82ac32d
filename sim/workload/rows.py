"""Rows of trace files: CSV cells and JSON fields turned into whole numbers, with errors that say where.

Times never pass through a binary float: the digits of the file become whole nanoseconds.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO, Any, NoReturn

from sim.scenario.errors import ScenarioError

MAX_TOKENS = 2**31 - 1
MAX_TIME = Decimal(10**9) * 10**9
"""Nanoseconds: 10**9 s."""

DAY_NS = 86_400 * 10**9
_CLOCK = re.compile(r"(\d{4}-\d\d-\d\d)[ T]([01]\d|2[0-3]):([0-5]\d):([0-5]\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?", re.ASCII)


class TraceError(ScenarioError):
    """A trace file is missing, corrupt or not in the format named."""

    def __init__(self, problem: str) -> None:
        super().__init__((problem,))


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a file something stands; `line` counts from 1 with the header, `row` from 1 without it."""

    path: str
    line: int
    row: int

    def fail(self, column: str, expected: str, found: object) -> NoReturn:
        """Raise the TraceError for one cell."""
        text = str(found) if isinstance(found, Decimal) else repr(found)
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise TraceError(
            f"{self.path}:{self.line}: row {self.row}, column {column}: expected {expected}, found {shown}"
        )

    def broken(self, what: str) -> TraceError:
        """The TraceError for a whole row."""
        return TraceError(f"{self.path}:{self.line}: row {self.row}: {what}")


def decimal_ns(text: str | int | Decimal, digits: int) -> int:
    """Nanoseconds (half to even) from a number in units of 10**digits ns. ValueError: no such time."""
    if isinstance(text, int):
        value = Decimal(text)
    else:
        try:
            value = Decimal(text)
        except InvalidOperation:
            raise ValueError(text) from None
    if not value.is_finite() or value < 0 or value > MAX_TIME.scaleb(-digits):
        raise ValueError(text)
    return int(value.scaleb(digits).to_integral_value())


def clock_ns(text: str) -> int:
    """Nanoseconds since the first day of year 1 from "2023-11-16 18:17:03.9799600". ValueError: no such time."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise ValueError(text)
    day, hours, minutes, seconds, fraction = match.groups()
    whole = (int(hours) * 60 + int(minutes)) * 60 + int(seconds)
    return date.fromisoformat(day).toordinal() * DAY_NS + whole * 10**9 + int((fraction or "").ljust(9, "0"))


def token_count(place: Place, column: str, value: str | int) -> int:
    """A number of tokens, 0 included, from a CSV cell or a JSON number."""
    if isinstance(value, str):
        if not (value.isascii() and value.isdigit() and len(value) <= 10):
            place.fail(column, "a whole number of tokens", value)
        value = int(value)
    elif type(value) is not int:
        place.fail(column, "a whole number of tokens", value)
    if not 0 <= value <= MAX_TOKENS:
        place.fail(column, f"a whole number of tokens up to {MAX_TOKENS}", value)
    return value


@contextmanager
def opened(path: str | Path) -> Generator[IO[str]]:
    """Open a trace for reading; TraceError: it cannot be opened or is not UTF-8 text."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}:{_undecodable_line(path)}: the trace is not UTF-8 text: {error.reason}") from None


def _undecodable_line(path: str | Path) -> int:
    """The first line that is not UTF-8; the reader itself is a buffer ahead."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def csv_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[Place, list[str]]]:
    """The cells of `columns`, row by row; other columns are ignored, blank lines skipped."""
    with opened(path) as file:
        reader = csv.reader(file)
        row, nothing = 0, list[str]()
        try:
            header = [name.strip() for name in next(reader, nothing)]
            if missing := [name for name in columns if name not in header]:
                raise TraceError(
                    f"{path}:1: the header lacks {' and '.join(missing)}: expected {', '.join(columns)}, "
                    f"found {', '.join(header) or 'nothing'}"
                )
            picked = [header.index(name) for name in columns]
            for cells in reader:
                if not cells:
                    continue
                row += 1
                place = Place(str(path), reader.line_num, row)
                if len(cells) != len(header):
                    raise place.broken(f"expected {len(header)} cells, found {len(cells)}")
                yield place, [cells[index] for index in picked]
        except csv.Error as error:
            raise Place(str(path), reader.line_num, row + 1).broken(f"not CSV: {error}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def json_rows(path: str | Path) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The object of each line, fractions kept as Decimal; blank lines skipped."""
    decode = json.JSONDecoder(parse_float=Decimal, parse_constant=_no_constant).decode
    with opened(path) as file:
        row = 0
        for number, line in enumerate(file, start=1):
            text = line.strip()
            if not text:
                continue
            row += 1
            place = Place(str(path), number, row)
            try:
                value = decode(text)
            except json.JSONDecodeError as error:
                raise place.broken(f"not JSON: {error.msg} at column {error.colno}") from None
            except (ValueError, RecursionError) as error:
                raise place.broken(f"not JSON: {error}") from None
            if not isinstance(value, dict):
                place.fail("all", "a JSON object", value)
            yield place, value
