"""Curves of a run as numbers: what a figure draws, before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from reports.record import FENCED, FREE, Requests, Series


@dataclass(frozen=True, slots=True)
class Stairs:
    """A quantity that is constant between edges: `values[i]` holds from edges_ns[i] to edges_ns[i + 1]."""

    edges_ns: Int64[np.ndarray, " values+1"]
    values: Float64[np.ndarray, " values"]


@dataclass(frozen=True, slots=True)
class Binned:
    """A quantity per time bin: time-weighted mean, least and greatest value in the bin."""

    edges_ns: Float64[np.ndarray, " bins+1"]
    mean: Float64[np.ndarray, " bins"]
    low: Float64[np.ndarray, " bins"]
    high: Float64[np.ndarray, " bins"]


def span_ns(series: Series) -> tuple[int, int]:
    """When the first step started and the last one ended; one ns apart at least, (0, 1) without steps."""
    if not len(series.step):
        return 0, 1
    start = int(series.start_ns[0])
    return start, max(int(series.end_ns.max()), start + 1)


def held(series: Series, values: np.ndarray) -> Stairs:
    """A state taken when each step was planned, which lasts until the next step starts."""
    end = span_ns(series)[1]
    return Stairs(np.append(series.start_ns, end), np.asarray(values, np.float64))


def page_states(series: Series) -> tuple[Stairs, Stairs]:
    """Number of owned and of fenced pages over the run, counted from the page events alone (all pages start free)."""
    by_page = np.argsort(series.page_id, kind="stable")
    owner = series.page_owner[by_page]
    before = np.append(FREE, owner[:-1])
    before[np.diff(series.page_id[by_page], prepend=-1) != 0] = FREE
    first, last = span_ns(series)
    times = np.clip(series.page_time_ns, first, last)
    # Of several events at one moment the last one shows the state that stays.
    final = np.flatnonzero(np.diff(times, append=last + 1) > 0)
    edges = np.concatenate([[first], times[final], [last]])

    def counted(now: np.ndarray, was: np.ndarray) -> Stairs:
        change = np.zeros(len(times), np.int64)
        change[by_page] = now.astype(np.int64) - was
        return Stairs(edges, np.append(0, np.cumsum(change)[final]).astype(np.float64))

    return counted(owner >= 0, before >= 0), counted(owner == FENCED, before == FENCED)


def while_running(series: Series, values: np.ndarray) -> Stairs:
    """A quantity that belongs to the steps themselves: zero in pauses longer than the step before them."""
    if not len(series.step):
        return held(series, values)
    last = span_ns(series)[1]
    following = np.append(series.start_ns[1:], last)
    pause = following - series.end_ns > series.end_ns - series.start_ns
    edges = np.stack([series.start_ns, np.where(pause, series.end_ns, following)], axis=1)
    both = np.stack([np.asarray(values, np.float64), np.zeros(len(values))], axis=1)
    shown = np.stack([np.ones(len(pause), bool), pause], axis=1)
    return Stairs(np.append(edges[shown], last), both[shown])


def binned(stairs: Stairs, edges_ns: Float64[np.ndarray, " bins+1"]) -> Binned:
    """Mean, least and greatest value of `stairs` in each bin; the bins must lie within its edges."""
    knots = stairs.edges_ns.astype(np.float64)
    integral = np.append(0.0, np.cumsum(stairs.values * np.diff(knots)))
    mean = np.diff(np.interp(edges_ns, knots, integral)) / np.diff(edges_ns)
    last = len(stairs.values) - 1
    first = np.clip(np.searchsorted(knots, edges_ns[:-1], "right") - 1, 0, last)
    stop = np.clip(np.searchsorted(knots, edges_ns[1:], "left"), first + 1, last + 1)
    # reduceat takes index pairs; the value appended makes last + 1 a legal index.
    pairs = np.stack([first, stop], axis=1).ravel()
    low = np.minimum.reduceat(np.append(stairs.values, np.inf), pairs)[::2]
    high = np.maximum.reduceat(np.append(stairs.values, -np.inf), pairs)[::2]
    return Binned(edges_ns, np.clip(mean, low, high), low, high)


def nice_width_ns(span: int, max_bins: int) -> int:
    """The smallest 1, 2 or 5 times a power of ten (in ns) that cuts `span` into at most `max_bins` bins."""
    width = 1
    while True:
        for factor in (1, 2, 5):
            if width * factor * max_bins >= span:
                return width * factor
        width *= 10


def tokens_per_second(
    series: Series, tokens: np.ndarray, edges_ns: Float64[np.ndarray, " bins+1"]
) -> Float64[np.ndarray, " bins"]:
    """Rate in each bin; the tokens of a step are spread evenly over its duration (1 ns at least)."""
    start = series.start_ns.astype(np.float64)
    end = np.maximum(series.end_ns, series.start_ns + 1).astype(np.float64)
    slope = tokens / (end - start)
    at = np.concatenate([start, end])
    order = np.argsort(at, kind="stable")
    rate = np.cumsum(np.concatenate([slope, -slope])[order])
    done = np.append(0.0, np.cumsum(rate[:-1] * np.diff(at[order])))
    return np.diff(np.interp(edges_ns, at[order], done)) / (np.diff(edges_ns) * 1e-9)


@dataclass(frozen=True, slots=True)
class Sample:
    """Distinct values in ascending order, each with how often it was seen."""

    values: Int64[np.ndarray, " distinct"]
    counts: Int64[np.ndarray, " distinct"]

    @property
    def total(self) -> int:
        """Number of observations."""
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """The q-quantile of the observations, interpolated linearly (NumPy's default; Hyndman and Fan type 7)."""
        rank = q * (self.total - 1)
        below = int(np.floor(rank))
        ends = np.cumsum(self.counts)
        low = int(self.values[np.searchsorted(ends, below, "right")])
        high = int(self.values[np.searchsorted(ends, min(below + 1, self.total - 1), "right")])
        return low + (high - low) * (rank - below)


def first_token_waits(requests: Requests) -> Sample:
    """Time from arrival to first token, in ns, of every request that got one."""
    got = requests.first_token_ns >= 0
    values, counts = np.unique(requests.first_token_ns[got] - requests.arrival_ns[got], return_counts=True)
    return Sample(values, counts.astype(np.int64))


def token_gaps(series: Series) -> Sample:
    """Gaps between the tokens of a request, in ns."""
    values, where = np.unique(series.itl_gap_ns, return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, where, series.itl_count)
    return Sample(values[counts > 0], counts[counts > 0])
