"""Page usage over time: who holds the pool, and how much of what is held is empty."""

# pyright: reportUnknownMemberType=false
# (Matplotlib leaves the keyword arguments of its methods untyped.)

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from reports import curves
from reports.plots import style
from reports.record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def fragmentation(series: Series) -> Float64[np.ndarray, " steps"]:
    """1 - live tokens / (owned pages x page size) at each step; 0 where nothing is owned."""
    room = series.pages_owned * series.page_size
    return np.where(room > 0, 1.0 - series.live_tokens / np.maximum(room, 1), 0.0)


def figure(record: RunRecord) -> Figure:
    """Owned, fenced and free pages stacked to 100 %, above internal fragmentation."""
    series = record.series
    figure, (top, bottom) = style.sheet(record, "Page usage over time", rows=2, height=5.2, ratios=(2.2, 1))
    time = style.whole_run(record)
    top.set_ylabel(f"share of {series.allocatable_pages:,} allocatable pages [%]")
    bottom.set_ylabel("internal fragmentation\n[% of owned places]")
    top.set_ylim(0, 100)
    time.label(bottom)
    if not len(series.step):
        style.say(top, "no step was run")
        return figure
    stack(top, series, time)
    style.legend(top)
    wasted = curves.while_running(series, 100.0 * fragmentation(series))
    style.curve(bottom, wasted, time, color=style.GREEN, label="fragmentation")
    style.legend(bottom, title=style.bin_note(series, time))
    bottom.set_ylim(0, None)
    style.mark_violations([top, bottom], record, time)
    return figure


def stack(axes: Axes, series: Series, time: style.TimeAxis) -> None:
    """Stack the shares of owned, fenced and free pages; where they are binned, with the peak of owned pages."""
    whole = max(series.allocatable_pages, 1)
    owned, fenced = curves.page_states(series)
    free = curves.Stairs(owned.edges_ns, whole - owned.values - fenced.values)
    below: Float64[np.ndarray, " values"] | float = 0.0
    for name, pages, colour, hatch in (
        ("owned", owned, style.BLUE, ""),
        ("fenced", fenced, style.YELLOW, "xxxx"),
        ("free", free, "#EDEDED", ""),
    ):
        share = style.drawable(curves.Stairs(pages.edges_ns, 100.0 * pages.values / whole), time)
        level = below + share.mean
        edges = share.edges_ns / time.unit.ns
        style.area(axes, edges, below, level, facecolor=colour, edgecolor="black", hatch=hatch, label=name)
        below = level
        if name == "owned" and (share.high > share.mean).any():
            style.line(axes, edges, share.high, color="black", linewidth=0.8, zorder=3, label="owned, peak")
