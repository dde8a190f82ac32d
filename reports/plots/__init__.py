"""The figures of a run: one file per family, every one of them drawn from the run folder alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reports.plots import latency, load, page_map, pages, style, throughput, timeline
from reports.record import RecordError, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure that every run gets: file stem, title, what it tells, and how it is drawn."""

    stem: str
    title: str
    caption: str
    figure: Callable[[RunRecord], Figure]


PLOTS = (
    Plot(
        "page_usage",
        "Page usage",
        "Owned, fenced and free pages as shares of the allocatable pages, and the part of the owned pages that holds "
        "no token (internal fragmentation).",
        pages.figure,
    ),
    Plot(
        "load",
        "Load",
        "Requests that run and the slots that they take, requests that wait, and preemptions.",
        load.figure,
    ),
    Plot(
        "latency",
        "Latency",
        "Distribution of the time to first token and of the gaps between tokens, with the median and the 90th and "
        "99th percentiles.",
        latency.figure,
    ),
    Plot(
        "throughput",
        "Throughput",
        "Tokens scheduled per second of the run, prefill and decode apart, per time bin.",
        throughput.figure,
    ),
    Plot(
        "page_map",
        "Page map",
        "Who owns which page when: each colour is a request, white is free, black is fenced.",
        page_map.figure,
    ),
    Plot(
        "timeline",
        "Request timeline",
        "What each request does when: it waits, is prefilled, decodes, or waits again after a preemption.",
        timeline.figure,
    ),
)

FORMATS = ("png", "svg")


def draw(run_folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw every plot of a run into run_folder/plots and return the files, in order.

    The same record gives the same bytes. RecordError: the record cannot be read. OSError: a file cannot be
    written; it is named.
    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise RecordError(f"unknown plot format {unknown[0]!r}; choose among {', '.join(FORMATS)}")
    record = RunRecord.load(run_folder)
    folder = record.folder / "plots"
    written: list[Path] = []
    with style.applied():
        for plot in PLOTS:
            figure = plot.figure(record)
            style.settle(figure)
            for form in formats:
                path = folder / f"{plot.stem}.{form}"
                try:
                    folder.mkdir(exist_ok=True)
                    path.write_bytes(style.rendered(figure, form))
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(path)) from None
                written.append(path)
    return written
