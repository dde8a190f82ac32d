"""Throughput over time: tokens per second of the run's clock."""

# pyright: reportUnknownMemberType=false
# (Matplotlib leaves the keyword arguments of its methods untyped.)

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reports import curves
from reports.plots import style
from reports.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BINS = 160
STEPS_PER_BIN = 4
"""Fewer steps in a bin than this, and the curve shows where single steps fall rather than a rate."""


def figure(record: RunRecord) -> Figure:
    """Prefill tokens per second above decode tokens per second, in bins of a round width."""
    series = record.series
    figure, axes = style.sheet(record, "Throughput over time", rows=2, height=4.6)
    first, last = curves.span_ns(series)
    time = style.whole_run(record)
    bins = max(1, min(MAX_BINS, len(series.step) // STEPS_PER_BIN))
    width = curves.nice_width_ns(last - first, bins)
    # The last bin is cut where the run ends, so that an idle rest does not lower its rate.
    edges = np.append(np.arange(first, last, width, dtype=np.float64), float(last))
    time.label(axes[1])
    bin_unit = style.time_unit(width)
    for one, name, tokens, colour in (
        (axes[0], "prefill", series.prefill_tokens, style.ORANGE),
        (axes[1], "decode", series.decode_tokens, style.BLUE),
    ):
        one.set_ylabel(f"{name} tokens / s")
        if not tokens.any():
            style.say(one, f"no {name} tokens" if len(series.step) else "no step was run")
            continue
        rate = curves.tokens_per_second(series, tokens, edges)
        mean = float(tokens.sum()) / ((last - first) * 1e-9)
        style.area(one, edges / time.unit.ns, 0.0, rate, color=colour, alpha=0.3)
        label = f"{name}, bins of {width / bin_unit.ns:g} {bin_unit.name}"
        style.line(one, edges / time.unit.ns, rate, color=colour, linewidth=1.4, label=label)
        one.axhline(mean, color="black", linestyle="--", linewidth=1.1, label=f"mean {mean:,.4g} / s")
        one.set_ylim(0, None)
        style.plain_ticks(one)
        style.legend(one)
    style.mark_violations(axes, record, time)
    return figure
