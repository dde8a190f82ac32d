"""Scenarios out of bytes: what Hypothesis draws fast, and shrinks well.

A rule of a state machine costs some hundred microseconds to draw, a byte next to nothing. Every choice of the search
takes bytes off the tape; past its end every choice is the first and nothing out of the ordinary happens: a shorter tape
is a smaller scenario.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from hypothesis import strategies as st

from sim.scenario import Scenario
from sim.search.swarm import DEFAULT_LIMITS, Limits, scenario_from

T = TypeVar("T")
SIZES: Final = (0, 16, 48, 96, 192, 384)
"""Tapes come in few lengths, so that most of them are used up."""


class Tape:
    """A source of choices that reads bytes."""

    def __init__(self, tape: bytes) -> None:
        self._bytes = iter(tape)

    def random(self) -> float:
        """A number in [0, 1): one byte; past the end a large one."""
        return next(self._bytes, 255) / 256

    def randint(self, a: int, b: int) -> int:
        """A whole number from a to b: as many bytes as the range takes."""
        value, room = 0, b - a
        while room > 0:
            value = value * 256 + next(self._bytes, 0)
            room //= 256
        return a + value % (b - a + 1)

    def choice(self, seq: Sequence[T]) -> T:
        """One of them: one byte."""
        return seq[next(self._bytes, 0) % len(seq)]


def scenario_of_tape(tape: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Scenario:
    """The scenario that a tape stands for."""
    return scenario_from(Tape(tape), "tape", limits=limits)


def scenarios(limits: Limits = DEFAULT_LIMITS) -> st.SearchStrategy[Scenario]:
    """Whole scenarios without a device, for `hypothesis.given`."""
    tapes = st.sampled_from(SIZES).flatmap(lambda size: st.binary(min_size=size, max_size=size))
    return tapes.map(lambda tape: scenario_of_tape(tape, limits=limits))
