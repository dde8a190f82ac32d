"""The request timeline: what each request does when."""

# pyright: reportUnknownMemberType=false
# (Matplotlib leaves the keyword arguments of its methods untyped.)

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from reports import curves
from reports.plots import style
from reports.record import DECODE, NEVER, PREEMPTED, PREFILL, WAITING, Requests, RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 40
"""Requests in one panel: as many as can be told apart and named."""

KINDS = (
    (WAITING, "waiting", "#D9D9D9", "...."),
    (PREFILL, "prefill", style.ORANGE, "////"),
    (DECODE, "decode", style.BLUE, ""),
    (PREEMPTED, "preempted, waiting", style.PURPLE, "xxxx"),
)
ENDS = (("cancelled", "X"), ("rejected", "s"), ("live", ">"))
"""States other than finished, each with the marker at the request's last moment."""


def spread(count: int, most: int) -> Int64[np.ndarray, " chosen"]:
    """At most `most` indices below `count`, evenly spaced, first and last among them."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
        if count
        else np.zeros(0, np.int64)
    )


def busiest(record: RunRecord, order: Int64[np.ndarray, " requests"]) -> tuple[Int64[np.ndarray, " chosen"], str]:
    """MAX_ROWS neighbours (by arrival) around the first violation, or around the moment with most unfinished requests.

    Returns indices into the requests, and which moment it is.
    """
    requests = record.requests
    arrival, end = requests.arrival_ns[order], last_moment(record)[order]
    hit = [v.time_ns for v in record.violations if v.time_ns is not None]
    if hit:
        moment, why = min(hit), "around the first violation"
    else:
        at = np.concatenate([end, arrival])
        change = np.concatenate([np.full(len(end), -1), np.full(len(arrival), 1)])
        by_time = np.argsort(at, kind="stable")
        moment, why = int(at[by_time][np.argmax(np.cumsum(change[by_time]))]), "at the busiest moment"
    present = np.flatnonzero((arrival <= moment) & (end >= moment))
    centre = int(np.median(present)) if len(present) else int(np.searchsorted(arrival, moment))
    first = int(np.clip(centre - MAX_ROWS // 2, 0, max(len(order) - MAX_ROWS, 0)))
    return order[first : first + MAX_ROWS], why


def last_moment(record: RunRecord) -> Int64[np.ndarray, " requests"]:
    """When each request was last heard of, in ns: its end, or the end of the run while it lives."""
    requests = record.requests
    run_end = max(curves.span_ns(record.series)[1], int(requests.arrival_ns.max(initial=0)))
    live = np.array([s == "live" for s in requests.state], bool)
    ended = np.where(requests.finish_ns == NEVER, requests.arrival_ns, requests.finish_ns)
    return np.where(live, run_end, ended)


def figure(record: RunRecord) -> Figure:
    """All requests in one panel; where they are too many, a dense stretch of them above an even sample."""
    requests = record.requests
    order = np.lexsort((requests.id, requests.arrival_ns))
    many = len(order) > MAX_ROWS
    rows = 2 if many else 1
    shown = min(len(order), MAX_ROWS)
    figure, axes = style.sheet(
        record, "Request timeline", rows=rows, height=rows * (1.4 + 0.115 * max(shown, 10)), share=False
    )
    if not len(order):
        style.whole_run(record).label(axes[0])
        axes[0].set_ylabel("request id")
        style.say(axes[0], "no request was submitted")
        return figure
    chosen, why = busiest(record, order) if many else (order, "")
    time = panel(axes[0], record, chosen, since_arrival=False)
    time.label(axes[0])
    note = f"{shown} of {len(order):,} requests,\nneighbours by arrival,\n{why}" if many else None
    style.legend(axes[0], title=note)
    style.mark_violations(axes[:1], record, time)
    if many:
        sample = order[spread(len(order), MAX_ROWS)]
        panel(axes[1], record, sample, since_arrival=True).label(axes[1], "time since the request arrived")
        note = f"{len(sample)} of {len(order):,} requests,\nevenly spread over the run,\neach from its arrival on"
        style.legend(axes[1], title=note)
    return figure


def panel(axes: Axes, record: RunRecord, chosen: Int64[np.ndarray, " rows"], *, since_arrival: bool) -> style.TimeAxis:
    """Draw one bar per chosen request, first on top; returns the time that they cover."""
    requests, series = record.requests, record.series
    zero = requests.arrival_ns[chosen] if since_arrival else np.zeros(len(chosen), np.int64)
    row, segment = rows_of_segments(requests, series, chosen)
    left, right = series.seg_start_ns[segment] - zero[row], series.seg_end_ns[segment] - zero[row]
    last = last_moment(record)[chosen] - zero
    first = float((requests.arrival_ns[chosen] - zero).min())
    end = max(float(last.max()), float(right.max(initial=0)), first + 1.0)
    unit = style.time_unit(end)
    for kind, name, colour, hatch in KINDS:
        mine = series.seg_kind[segment] == kind
        if mine.any():
            bars(axes, row[mine], left[mine] / unit.ns, right[mine] / unit.ns, name=name, colour=colour, hatch=hatch)
    states = np.array(requests.state)
    for state, marker in ENDS:
        where = np.flatnonzero(states[chosen] == state)
        if len(where):
            axes.plot(
                last[where] / unit.ns,
                where,
                linestyle="",
                marker=marker,
                color="black",
                markersize=5,
                markerfacecolor="white",
                label=state,
                clip_on=False,
                zorder=4,
            )
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.set_yticks(np.arange(len(chosen)), [str(i) for i in requests.id[chosen].tolist()], fontsize=6.5)
    axes.set_ylabel("request id, by arrival")
    axes.grid(visible=False, axis="y")
    return style.TimeAxis(first, end + 0.01 * (end - first), unit, record.clock)


def rows_of_segments(
    requests: Requests, series: Series, chosen: Int64[np.ndarray, " rows"]
) -> tuple[Int64[np.ndarray, " bars"], Int64[np.ndarray, " bars"]]:
    """The segments that belong to the chosen requests: the row of each, and its index."""
    ids = requests.id[chosen]
    by_id = np.argsort(ids)
    place = np.minimum(np.searchsorted(ids[by_id], series.seg_request), len(ids) - 1)
    segment = np.flatnonzero(ids[by_id][place] == series.seg_request)
    return by_id[place[segment]], segment


def bars(
    axes: Axes, row: np.ndarray, left: np.ndarray, right: np.ndarray, *, name: str, colour: str, hatch: str
) -> None:
    """Horizontal bars from left to right, one in each row given."""
    from matplotlib.collections import PolyCollection

    x = np.stack([left, right, right, left], axis=1)
    y = row[:, None] + np.array([-0.4, -0.4, 0.4, 0.4])
    corners = np.stack([x, y], axis=2)
    axes.add_collection(
        PolyCollection(list(corners), edgecolors="black", linewidths=0.4, facecolors=colour, hatch=hatch, label=name)
    )
