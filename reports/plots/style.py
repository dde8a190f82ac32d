"""How every figure looks: colours, fonts, time axes, titles, marks of violations."""

# pyright: reportUnknownMemberType=false
# (Matplotlib leaves the keyword arguments of its methods untyped.)

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reports import curves
from reports.record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

# Okabe and Ito, "Color Universal Design" (2008): told apart with every common colour vision deficiency.
BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"


WIDTH_INCHES = 9.0
HEADER_INCHES = 0.5
"""Room above the axes for the title and the line that says whose run and which clock it is."""

MAX_BINS = 400
"""Time bins of a curve: about two pixels each."""

MAX_MARKS = 12
"""Violation lines in one figure; the report lists them all."""

LABEL_ROOM = 0.15
"""Of the time shown: how far half a label of a violation reaches to the left."""

MARK_WIDTH = 0.01
"""Of the time shown: violations closer together than this share a line."""

RC: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "axes.formatter.useoffset": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.dpi": 150,
    "svg.hashsalt": "kvproof",
    "svg.fonttype": "path",
    "path.simplify": True,
}


@contextmanager
def applied() -> Generator[None]:
    """The style as a context, free of the user's own settings; figures are made and saved inside it."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        with mpl.rc_context(RC):
            yield


@dataclass(frozen=True, slots=True)
class TimeUnit:
    """The unit of a time axis: `ns` nanoseconds make one."""

    name: str
    ns: float


def time_unit(longest_ns: float) -> TimeUnit:
    """The unit in which times up to `longest_ns` are read most easily."""
    for name, ns in (("h", 3.6e12), ("s", 1e9), ("ms", 1e6), ("\N{MICRO SIGN}s", 1e3)):
        # Hours from three of them on: up to there seconds stay below five digits.
        if longest_ns >= ns * (3 if name == "h" else 1):
            return TimeUnit(name, ns)
    return TimeUnit("ns", 1.0)


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """The stretch of a run that axes show, and the unit that it is read in."""

    first_ns: float
    last_ns: float
    unit: TimeUnit
    clock: str

    @property
    def first(self) -> float:
        """Left end, in units."""
        return self.first_ns / self.unit.ns

    @property
    def last(self) -> float:
        """Right end, in units."""
        return self.last_ns / self.unit.ns

    def label(self, axes: Axes, what: str = "time") -> None:
        """Limit the axes to this stretch and name clock and unit below them."""
        axes.set_xlabel(f"{self.clock} {what} [{self.unit.name}]")
        axes.set_xlim(self.first, self.last)


def whole_run(record: RunRecord) -> TimeAxis:
    """From the first step's start to the last one's end."""
    first, last = curves.span_ns(record.series)
    return TimeAxis(first, last, time_unit(last), record.clock)


def sheet(
    record: RunRecord,
    title: str,
    rows: int = 1,
    columns: int = 1,
    *,
    height: float,
    ratios: Sequence[float] = (1,),
    share: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A titled figure of rows x columns axes (in reading order), `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - HEADER_INCHES / height))
    axes = figure.subplots(
        rows, columns, squeeze=False, sharex=share and columns == 1, height_ratios=[*ratios] * (rows // len(ratios))
    )
    summary = record.summary
    told = [f"scenario {record.name}", f"{record.clock} time"]
    told += [f"{key} {summary[key]}" for key in ("seed", "backend") if key in summary]
    figure.text(0.01, 1 - 0.08 / height, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.32 / height, "  \N{MIDDLE DOT}  ".join(told), color="#444444", va="top")
    return figure, list(axes.ravel())


def legend(axes: Axes, title: str | None = None, **options: Any) -> None:
    """A legend to the right of the axes, where it hides no data; none where there is nothing to say."""
    if "handles" not in options:
        options["handles"], options["labels"] = axes.get_legend_handles_labels()
    if options["handles"] or title:
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0, "alignment": "left"}
        axes.legend(title=title, **place, **options)


def say(axes: Axes, text: str) -> None:
    """A sentence in place of data that are not there, and no scale for them."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#444444")


def marked_moments(record: RunRecord, time: TimeAxis) -> list[tuple[int, list[str]]]:
    """Time in ns and ids of the violations that are marked, ascending.

    Those that would lie on top of one another share the first one's mark. Where even so there are too many, only
    what is violated for the first time is marked.
    """
    near = MARK_WIDTH * (time.last_ns - time.first_ns)
    marks: list[tuple[int, list[str]]] = []
    for violation in sorted((v for v in record.violations if v.time_ns is not None), key=lambda v: v.time_ns or 0):
        time_ns = violation.time_ns or 0
        if not time.first_ns <= time_ns <= time.last_ns:
            continue
        if not marks or time_ns - marks[-1][0] > near:
            marks.append((time_ns, []))
        if violation.id not in marks[-1][1]:
            marks[-1][1].append(violation.id)
    if len(marks) <= MAX_MARKS:
        return marks
    seen: set[str] = set()
    first: list[tuple[int, list[str]]] = []
    for time_ns, ids in marks:
        if new := [name for name in ids if name not in seen]:
            first.append((time_ns, new))
            seen.update(new)
    return first[:MAX_MARKS]


def mark_violations(axes: Sequence[Axes], record: RunRecord, time: TimeAxis) -> None:
    """A vertical line through all axes for each moment of a violation, its ids on top of the first."""
    right_of_label = -np.inf
    for time_ns, ids in marked_moments(record, time):
        x = time_ns / time.unit.ns
        for one in axes:
            one.axvline(x, color=VERMILLION, linestyle=(0, (4, 2, 1, 2)), linewidth=1.4, zorder=5)
        if x < right_of_label:
            continue
        label = ", ".join(ids[:3]) + (f" +{len(ids) - 3}" if len(ids) > 3 else "")
        # At the left edge it would hide the axis' topmost figure.
        side = "left" if x - time.first < LABEL_ROOM * (time.last - time.first) else "center"
        axes[0].text(
            x,
            1.005,
            f"{label} violated",
            transform=axes[0].get_xaxis_transform(),
            ha=side,
            va="bottom",
            color=VERMILLION,
            fontsize=8,
            fontweight="bold",
        )
        right_of_label = x + 0.015 * (len(label) + 10) * (time.last - time.first)


def drawable(stairs: curves.Stairs, time: TimeAxis) -> curves.Binned:
    """The stairs as they are, or in MAX_BINS equal bins where they have more edges than a figure can show."""
    if len(stairs.values) <= MAX_BINS:
        return curves.Binned(stairs.edges_ns.astype(np.float64), stairs.values, stairs.values, stairs.values)
    return curves.binned(stairs, np.linspace(time.first_ns, time.last_ns, MAX_BINS + 1))


def line(axes: Axes, edges: np.ndarray, values: np.ndarray, **look: Any) -> None:
    """A line of steps, values[i] from edges[i] to edges[i + 1]. (Axes.stairs takes 30 ms to find its own limits.)"""
    axes.plot(edges, np.append(values, values[-1:]), drawstyle="steps-post", **look)


def area(axes: Axes, edges: np.ndarray, low: np.ndarray | float, high: np.ndarray, **look: Any) -> None:
    """A filled area of steps between low and high."""
    low = np.broadcast_to(low, high.shape)
    axes.fill_between(edges, np.append(low, low[-1:]), np.append(high, high[-1:]), step="post", linewidth=0.0, **look)


def curve(axes: Axes, stairs: curves.Stairs, time: TimeAxis, *, color: str, **look: Any) -> None:
    """A line for a quantity over time; where it had to be binned, the mean, in a band from least to greatest."""
    shown = drawable(stairs, time)
    edges = shown.edges_ns / time.unit.ns
    line(axes, edges, shown.mean, color=color, **{"linewidth": 1.4, **look})
    if (shown.high > shown.low).any():
        area(axes, edges, shown.low, shown.high, color=color, alpha=0.25, zorder=0.9)


def bin_note(series: Series, time: TimeAxis) -> str | None:
    """What a legend says of curves that were binned; None where every step is shown."""
    if len(series.step) <= MAX_BINS:
        return None
    width = (time.last_ns - time.first_ns) / MAX_BINS
    unit = time_unit(width)
    return f"line: mean over {width / unit.ns:.3g} {unit.name}\nband: least to greatest"


def legend_above(axes: Axes) -> None:
    """A one-line legend on top of the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.1, columnspacing=1.0, handlelength=1.6
    )


def whole_numbers(axes: Axes) -> None:
    """Let the y axis of a count show whole numbers only."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.yaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def plain_ticks(axes: Axes) -> None:
    """Figures of the y axis written out, with thousands separators."""
    from matplotlib.ticker import StrMethodFormatter

    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def plain_log_ticks(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written out."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def settle(figure: Figure) -> None:
    """Lay the figure out once, so that drawing it in several formats does not do so again."""
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
    figure.set_layout_engine("none")


def rendered(figure: Figure, form: str) -> bytes:
    """The bytes of a settled figure as "png" or "svg", without date and program version.

    The canvas is asked directly: Figure.savefig draws everything twice to find a layout that is settled already.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.BytesIO()
    if form == "png":
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    else:
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return out.getvalue()
