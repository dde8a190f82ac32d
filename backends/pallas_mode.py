"""How Pallas kernels for TPU run on a CPU: interpreted, copy by copy."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from jax.experimental.pallas import tpu


@contextmanager
def interpreted() -> Generator[None]:
    """Kernels that are traced within are interpreted, which is slow and raises where a copy leaves its array."""
    with tpu.force_tpu_interpret_mode():
        yield


def forget_raised() -> None:
    """Drop the simulated memory that a kernel leaves behind when it raises; the next one would run into it."""
    tpu.reset_tpu_interpret_mode_state()
