"""Arrival times as whole nanoseconds, drawn in fixed chunks so that time i never depends on how many are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from jaxtyping import Float64

from sim.scenario.workload_models import ConstantArrivals, GammaArrivals, PoissonArrivals, StagedArrivals
from sim.streams import stream

CHUNK = 4096
"""Draws made at once."""


def arrival_times(
    arrivals: ConstantArrivals | PoissonArrivals | GammaArrivals | StagedArrivals, seed: int
) -> Iterator[int]:
    """Times in ns from the start of the run, in order; endless but for stages."""
    if isinstance(arrivals, ConstantArrivals):
        return _evenly_spaced(Fraction(str(arrivals.request_rate)))
    random = stream(seed, "arrivals")
    if isinstance(arrivals, StagedArrivals):
        return _staged(arrivals, random)
    shape = arrivals.burstiness if isinstance(arrivals, GammaArrivals) else 1.0
    return _spaced(random, shape, 1e9 / arrivals.request_rate)


def _evenly_spaced(rate: Fraction) -> Iterator[int]:
    number = 0
    while True:
        yield number * 10**9 * rate.denominator // rate.numerator
        number += 1


def _spaced(random: np.random.Generator, shape: float, mean_ns: float) -> Iterator[int]:
    """Gamma gaps; summed as integers, so that no rounding adds up."""
    now = 0
    while True:
        if shape == 1.0:
            gaps = random.standard_exponential(CHUNK) * mean_ns
        else:
            gaps = random.standard_gamma(shape, CHUNK) * (mean_ns / shape)
        for gap in np.rint(gaps).astype(np.int64).tolist():
            now += gap
            yield now


def _staged(arrivals: StagedArrivals, random: np.random.Generator) -> Iterator[int]:
    """A Poisson process of rate 1, its time stretched to the stages.

    Inversion of the integrated rate: Cinlar, Introduction to Stochastic Processes, 1975, section 4.7.
    """
    rates = np.array([stage.request_rate for stage in arrivals.stages])
    spans = np.array([stage.duration_seconds for stage in arrivals.stages])
    ends: Float64[np.ndarray, " bounds"] = np.concatenate([[0.0], np.cumsum(spans)])
    expected: Float64[np.ndarray, " bounds"] = np.concatenate([[0.0], np.cumsum(rates * spans)])
    position = 0.0
    while True:
        marks = position + np.cumsum(random.standard_exponential(CHUNK))
        position = float(marks[-1])
        inside = marks[marks < expected[-1]]
        yield from np.rint(np.interp(inside, expected, ends) * 1e9).astype(np.int64).tolist()
        if len(inside) < CHUNK:
            return
