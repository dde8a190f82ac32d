"""D: two runs of one scenario take the same steps."""

from __future__ import annotations

from collections.abc import Sequence

from invariants.catalogue import CATALOGUE
from invariants.violation import Violation


def first_divergence(first: Sequence[str], second: Sequence[str], time_ns: int = 0) -> Violation | None:
    """D1: the first step at which two runs' rolling hashes differ (or at which one of them ended), or None."""
    for step, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return _diverged(step, time_ns, f"at step {step} one run has the hash {a} and the other {b}", a, b)
    if len(first) != len(second):
        step = min(len(first), len(second))
        message = f"one run has {len(first)} steps and the other {len(second)}"
        return _diverged(step, time_ns, message, str(len(first)), str(len(second)))
    return None


def _diverged(step: int, time_ns: int, message: str, expected: str, found: str) -> Violation:
    return Violation("D1", CATALOGUE["D1"].statement, step, time_ns, message, expected=expected, found=found)
