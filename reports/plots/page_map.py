"""The page x time map: which request owns which page when."""

# pyright: reportUnknownMemberType=false
# (Matplotlib leaves the keyword arguments of its methods untyped.)

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64

from reports.plots import style
from reports.record import FENCED, FREE, RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID_PAGES, GRID_TIMES = 256, 900
"""Cells of the map: what the printed figure can resolve."""

MANY_REQUESTS = 200
ENLARGED = 24
"""A run of so many requests gets a second map, of 1/ENLARGED of its time."""

HUES = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE, style.SKY, style.VERMILLION, style.YELLOW)
TINTS = (1.0, 0.55)
"""Strength of a hue on white; each hue in each tint is one request's colour."""

MAX_LABELS = 40
"""Up to so many owners, each is labelled with its request id."""


def grid(series: Series, time: style.TimeAxis) -> tuple[Float64[np.ndarray, " times"], Int64[np.ndarray, " pages"]]:
    """The moments (ns, centres of the columns) and page ids that a map shows; every page where there is room."""
    times = time.first_ns + (np.arange(GRID_TIMES) + 0.5) * ((time.last_ns - time.first_ns) / GRID_TIMES)
    rows = min(max(series.allocatable_pages, 1), GRID_PAGES)
    pages = 1 + np.floor((np.arange(rows) + 0.5) * (series.allocatable_pages / rows)).astype(np.int64)
    return times, pages


def owners(
    series: Series, times_ns: Float64[np.ndarray, " times"], pages: Int64[np.ndarray, " pages"]
) -> Int64[np.ndarray, "pages times"]:
    """Owner of each page (request id, FREE or FENCED) after all events up to each moment; both ascending."""
    row_of = np.full(series.num_pages, -1, np.int64)
    row_of[pages] = np.arange(len(pages))
    row = row_of[series.page_id]
    column = np.searchsorted(times_ns, series.page_time_ns, "left")
    shown = np.flatnonzero((row >= 0) & (column < len(times_ns)))
    # Each cell holds the number of the latest event up to it: written where it happens (of several in one cell the
    # last one stays, as they ascend), then carried to the right.
    latest = np.full((len(pages), len(times_ns)), -1, np.int64)
    latest[row[shown], column[shown]] = shown
    latest = np.maximum.accumulate(latest, axis=1)
    return np.append(series.page_owner, FREE)[latest]


def colours() -> Float64[np.ndarray, "colours 3"]:
    """The colours that requests take in turn, by id."""
    from matplotlib.colors import to_rgb

    hues = np.array([to_rgb(hue) for hue in HUES])
    return np.concatenate([1.0 - tint * (1.0 - hues) for tint in TINTS])


def figure(record: RunRecord) -> Figure:
    """One cell per page (or sampled page) and moment, coloured by owner; below it a part of a long run, enlarged."""
    series = record.series
    whole = style.whole_run(record)
    closer = enlarged(record, whole)
    rows = 1 if closer is None else 2
    figure, axes = style.sheet(record, "Page map: owners over time", rows=rows, height=0.8 + 3.6 * rows, share=False)
    for one, time in zip(axes, (whole, closer or whole), strict=False):
        one.set_ylabel("page id")
        one.grid(visible=False)
        time.label(one)
        if len(series.step):
            panel(one, series, time)
            style.mark_violations([one], record, time)
        else:
            style.say(one, "no step was run")
    if len(series.step):
        legend(axes[0], series)
    if closer:
        for edge in (closer.first, closer.last):
            axes[0].axvline(edge, color="black", linewidth=1.2)
        axes[1].text(
            1.01,
            1.0,
            "enlarged: the stretch between\nthe black lines above",
            transform=axes[1].transAxes,
            va="top",
            fontsize=8,
        )
    return figure


def enlarged(record: RunRecord, whole: style.TimeAxis) -> style.TimeAxis | None:
    """The stretch around the first violation, or else around the peak of page usage; None where the run is short."""
    series = record.series
    if len(record.requests) < MANY_REQUESTS or not len(series.step):
        return None
    hit = [v.time_ns for v in record.violations if v.time_ns is not None]
    centre = min(hit) if hit else int(series.start_ns[np.argmax(series.pages_owned)])
    width = (whole.last_ns - whole.first_ns) / ENLARGED
    start = float(np.clip(centre - width / 2, whole.first_ns, whole.last_ns - width))
    return style.TimeAxis(start, start + width, whole.unit, whole.clock)


def panel(axes: Axes, series: Series, time: style.TimeAxis) -> None:
    """Draw the map of a time span."""
    owner = owners(series, *grid(series, time))
    palette = colours()
    image = palette[np.maximum(owner, 0) % len(palette)]
    image[owner == FREE] = 1.0
    image[owner == FENCED] = 0.0
    axes.imshow(
        (image * 255).round().astype(np.uint8),
        extent=(time.first, time.last, series.num_pages - 0.5, 0.5),
        aspect="auto",
        interpolation="nearest",
        origin="upper",
    )
    style.whole_numbers(axes)
    label_owners(axes, owner, time, series.num_pages)


def legend(axes: Axes, series: Series) -> None:
    """What the colours mean, and how the pages were chosen."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    palette = colours()
    shown = min(series.allocatable_pages, GRID_PAGES)
    style.legend(
        axes,
        handles=[
            tuple(Patch(facecolor=c, edgecolor="black", linewidth=0.5) for c in palette[:3]),
            Patch(facecolor="black"),
            Patch(facecolor="white", edgecolor="black", linewidth=0.5),
        ],
        labels=[f"owned (colour: request id\nmodulo {len(palette)})", "fenced", "free"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.0)},
        title=None
        if shown == series.allocatable_pages
        else f"{shown:,} of {series.allocatable_pages:,} pages,\nevenly sampled",
    )


def label_owners(axes: Axes, owner: Int64[np.ndarray, "pages times"], time: style.TimeAxis, num_pages: int) -> None:
    """Write each request's id into the middle of its pages, where the map is small enough to read it."""
    ids = np.unique(owner[owner >= 0])
    if len(ids) > MAX_LABELS:
        return
    rows, columns = owner.shape
    for request in ids.tolist():
        row, column = np.nonzero(owner == request)
        widths = np.bincount(row)
        widest = np.flatnonzero(widths == widths.max())
        middle = int(widest[len(widest) // 2])
        own = column[row == middle]
        centre = int(own[len(own) // 2])
        if len(own) < columns * 0.02:
            continue
        axes.text(
            time.first + (centre + 0.5) * (time.last - time.first) / columns,
            0.5 + (middle + 0.5) * (num_pages - 1) / rows,
            str(request),
            ha="center",
            va="center",
            fontsize=7,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
