"""Latency distributions: time to first token and gaps between tokens."""

# pyright: reportUnknownMemberType=false
# (Matplotlib leaves the keyword arguments of its methods untyped.)

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reports import curves
from reports.plots import style
from reports.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = ((0.50, "p50", "-"), (0.90, "p90", "--"), (0.99, "p99", ":"))
SKEWED = 10.0
"""From this ratio of the greatest to the least value on, the axis is logarithmic."""
MAX_HISTOGRAM_BINS = 60
MARGIN = 0.03
"""Of the axis, left free beyond the least and the greatest value."""


def figure(record: RunRecord) -> Figure:
    """Histogram above cumulative share, for TTFT (left) and ITL (right)."""
    figure, axes = style.sheet(record, "Latency distributions", rows=2, columns=2, height=5.4)
    for column, (sample, name, what, colour) in enumerate(
        (
            (curves.first_token_waits(record.requests), "time to first token", "requests", style.ORANGE),
            (curves.token_gaps(record.series), "inter-token latency", "gaps", style.BLUE),
        )
    ):
        top, bottom = axes[column], axes[2 + column]
        unit = style.time_unit(sample.quantile(0.5) if sample.total else 1e9)
        top.set_ylabel(f"share of {sample.total:,} {what.removesuffix('s') if sample.total == 1 else what} [%]")
        bottom.set_ylabel(f"{what} at most this long [%]")
        bottom.set_xlabel(f"{name}, {record.clock} time [{unit.name}]")
        if not sample.total:
            for one in (top, bottom):
                style.say(one, f"no {what} to show")
                one.set_xticks([])
            continue
        distribution(top, bottom, sample, unit, colour)
    return figure


def distribution(top: Axes, bottom: Axes, sample: curves.Sample, unit: style.TimeUnit, colour: str) -> None:
    """Draw a sample as histogram (top) and cumulative share (bottom) on the same time axis, with its percentiles."""
    least, greatest = float(sample.values[0]), float(sample.values[-1])
    skewed = greatest > SKEWED * least > 0
    if least == greatest:
        least, greatest = least * 0.9 - 0.5, greatest * 1.1 + 0.5
    # Rice's rule, so that few observations do not make a comb.
    count = int(np.clip(np.ceil(2 * np.cbrt(sample.total)), 8, MAX_HISTOGRAM_BINS))
    between = np.geomspace if skewed else np.linspace
    bins = between(least, greatest, count + 1)
    bins[0], bins[-1] = least, greatest
    if skewed:
        room = (greatest / least) ** MARGIN
        low, high = least / room, greatest * room
    else:
        room = (greatest - least) * MARGIN
        low, high = least - room, greatest + room
    counts, _ = np.histogram(sample.values, bins, weights=sample.counts)
    top.stairs(100.0 * counts / sample.total, bins / unit.ns, fill=True, color=colour, alpha=0.55)
    share = 100.0 * np.cumsum(sample.counts) / sample.total
    bottom.step(
        np.append(low, np.append(sample.values, high)) / unit.ns,
        np.append(0, np.append(share, 100)),
        where="post",
        color=colour,
        linewidth=1.8,
    )
    bottom.set_ylim(0, 103)
    for one in (top, bottom):
        if skewed:
            one.set_xscale("log")
            style.plain_log_ticks(one)
        one.set_xlim(low / unit.ns, high / unit.ns)
    for q, name, line in MARKS:
        value = sample.quantile(q) / unit.ns
        for one in (top, bottom):
            one.axvline(value, color="black", linestyle=line, linewidth=1.1, label=f"{name} {value:,.4g} {unit.name}")
    style.legend_above(top)
