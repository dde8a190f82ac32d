"""Load over time: slots, decode rows, waiting requests, preemptions."""

# pyright: reportUnknownMemberType=false
# (Matplotlib leaves the keyword arguments of its methods untyped.)

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import curves
from reports.plots import style
from reports.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(record: RunRecord) -> Figure:
    """Slots and decode rows, above waiting requests, above preemptions where there were any."""
    series = record.series
    preempts = bool(series.preemptions.any())
    rows, ratios = (3, (2.2, 1.4, 0.8)) if preempts else (2, (2.2, 1.4))
    figure, axes = style.sheet(
        record, "Running and waiting requests over time", rows=rows, height=1.7 * rows + 1.2, ratios=ratios
    )
    time = style.whole_run(record)
    axes[0].set_ylabel("requests running")
    axes[1].set_ylabel("requests waiting")
    time.label(axes[-1])
    if not len(series.step):
        style.say(axes[0], "no step was run")
        return figure
    running = curves.while_running(series, series.running)
    style.curve(axes[0], running, time, color=style.SKY, linewidth=2.4, label="running")
    slots = curves.while_running(series, series.slots_used)
    style.curve(axes[0], slots, time, color=style.BLUE, linestyle=(0, (3, 1.5)), linewidth=1.2, label="slots in use")
    axes[0].axhline(series.batch_size, color="black", linestyle=":", label=f"batch size ({series.batch_size:,})")
    style.curve(axes[1], curves.held(series, series.waiting), time, color=style.GREEN, label="waiting")
    style.legend(axes[0], title=style.bin_note(series, time))
    style.legend(axes[1])
    if preempts:
        hit = series.preemptions > 0
        axes[2].vlines(series.start_ns[hit] / time.unit.ns, 0, series.preemptions[hit], color="black", linewidth=1.2)
        axes[2].set_ylabel("preemptions\nin step")
    for one in axes:
        top = max(1.0, one.get_ylim()[1] * 1.05)
        one.set_ylim(-0.02 * top, top)
        style.whole_numbers(one)
    style.mark_violations(axes, record, time)
    return figure
