"""Coefficients of a linear model of times: none below 0, and no slave to outliers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Float

MAX_ROUNDS = 40
SMALLEST_GAIN = 1e-6
"""A round that lowers the sum of residuals by a smaller share is the last one."""
SMALLEST_RESIDUAL = 1e-4
"""As a share of the time: below it, a residual counts no more than this."""


def fit_times(
    x: Float[np.ndarray, "samples features"], times: Float[np.ndarray, " samples"]
) -> Float[np.ndarray, " features"]:
    """Coefficients >= 0 with the least sum of |x @ c - t| / t: half of all samples may be outliers.

    Least absolute deviations by iteratively reweighted least squares (Schlossmacher, JASA 68, 1973). Of features that
    explain the same, the first is taken.
    """
    shares = x / times[:, None]
    scale = np.sqrt((shares * shares).sum(axis=0))
    scale[scale == 0] = 1.0
    shares = shares / scale
    weights = np.ones(len(times))
    best, least = np.zeros(x.shape[1]), np.inf
    for _ in range(MAX_ROUNDS):
        found = _nonnegative(shares, weights)
        residuals = np.abs(shares @ found - 1)
        if residuals.sum() >= least * (1 - SMALLEST_GAIN):
            break
        best, least = found, residuals.sum()
        weights = 1 / np.maximum(residuals, SMALLEST_RESIDUAL)
    return best / scale


def _nonnegative(
    shares: Float[np.ndarray, "samples features"], weights: Float[np.ndarray, " samples"]
) -> Float[np.ndarray, " features"]:
    """The exact non-negative least squares solution of shares @ c = 1: the best of those over each set of features.

    With five features there are 32 sets; on the right one, least squares without bounds is the solution with them.
    """
    gram = shares.T @ (shares * weights[:, None])
    right = shares.T @ weights
    num_features = shares.shape[1]
    best, least = np.zeros(num_features), 0.0
    for size in range(1, num_features + 1):
        for chosen in combinations(range(num_features), size):
            index = list(chosen)
            part = np.linalg.lstsq(gram[np.ix_(index, index)], right[index])[0]
            # The loss, less the constant sum of weights; more features have to earn their place.
            loss = -float(right[index] @ part)
            if part.min() >= 0 and loss < least - 1e-9 * weights.sum():
                best, least = np.zeros(num_features), loss
                best[index] = part
    return best
