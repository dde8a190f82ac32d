"""Prompt and output lengths, drawn in fixed chunks so that length i never depends on how many are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from jaxtyping import Float64, Int64

from sim.scenario.base import MAX_COUNT
from sim.scenario.workload_models import (
    EmpiricalTokens,
    FixedTokens,
    LognormalTokens,
    Tokens,
    UniformTokens,
    ZipfTokens,
)
from sim.streams import stream
from sim.workload.readers import read_lengths
from sim.workload.times import CHUNK

Lengths = Int64[np.ndarray, " requests"]
Draw = Callable[[np.random.Generator, int], Lengths]


def lengths(tokens: Tokens, seed: int, name: str, column: int) -> Iterator[int]:
    """Endless lengths in tokens from the stream `name`; `column` picks the prompts (0) or outputs (1) of a file.

    Empirical lengths take their rows from a stream named after the file, so that prompt and output of one file come
    from one row.
    """
    if isinstance(tokens, EmpiricalTokens):
        name = f"rows of {tokens.format} {tokens.path.replace(chr(92), '/').rpartition('/')[2]}"
    draw = _draw(tokens, column)
    return _endless(draw, stream(seed, name))


def _endless(draw: Draw, random: np.random.Generator) -> Iterator[int]:
    while True:
        yield from draw(random, CHUNK).tolist()


def _draw(tokens: Tokens, column: int) -> Draw:
    match tokens:
        case FixedTokens():
            return partial(_fixed, tokens.value)
        case UniformTokens():
            return partial(_uniform, tokens.min, tokens.max)
        case LognormalTokens():
            return partial(_lognormal, tokens)
        case ZipfTokens():
            weights = np.arange(1, tokens.max - tokens.min + 2, dtype=np.float64) ** -tokens.exponent
            return partial(_zipf, tokens.min, np.cumsum(weights))
        case EmpiricalTokens():
            found = read_lengths(tokens.format, tokens.path)[column].astype(np.int64)
            return partial(_rows, np.clip(found, tokens.min, tokens.max))


def _fixed(value: int, _: np.random.Generator, count: int) -> Lengths:
    return np.full(count, value, np.int64)


def _uniform(low: int, high: int, random: np.random.Generator, count: int) -> Lengths:
    return random.integers(low, high, count, endpoint=True)


def _lognormal(tokens: LognormalTokens, random: np.random.Generator, count: int) -> Lengths:
    """The logarithm's mean is ln(mean) - sigma**2 / 2, so that `mean` is the mean of the lengths themselves."""
    centre = math.log(tokens.mean) - tokens.sigma**2 / 2
    drawn = np.exp(centre + tokens.sigma * random.standard_normal(count))
    return np.clip(np.rint(drawn), tokens.min, tokens.max or MAX_COUNT).astype(np.int64)


def _zipf(low: int, cumulative: Float64[np.ndarray, " lengths"], random: np.random.Generator, count: int) -> Lengths:
    """Inversion of the cumulative weights."""
    marks = random.random(count) * float(cumulative[-1])
    return low + cumulative.searchsorted(marks, side="right")


def _rows(found: Lengths, random: np.random.Generator, count: int) -> Lengths:
    return found[random.integers(0, len(found), count)]
