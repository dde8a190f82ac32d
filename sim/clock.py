"""The simulated clock: whole nanoseconds, and one documented order for everything that happens at the same instant."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import simpy
from simpy.events import EventPriority


class Order(IntEnum):
    """What comes first at one instant. Events of one order happen in the order in which they were scheduled.

    A step that ends at the instant of an arrival ends after it, so that the next plan can see the newcomer; a sleeping
    engine wakes last, when everything else of that instant has happened.
    """

    ARRIVAL = 1
    CANCEL = 2
    STEP_END = 3
    WAKE = 4


class Moment(simpy.Event):
    """What happens again and again at whole nanoseconds, once at a time: each `after` lets it happen once more."""

    def __init__(self, env: simpy.Environment, order: Order, happens: Callable[[simpy.Event], None]) -> None:
        super().__init__(env)
        self.order = order
        self._priority = EventPriority(int(order))
        self._happens = [happens]
        self._ok = True
        self._value = None

    def after(self, delay_ns: int) -> None:
        """Let it happen `delay_ns` from now. ValueError: the delay is negative."""
        if delay_ns < 0:
            raise ValueError(f"time cannot run backwards: found a delay of {delay_ns} ns")
        self.callbacks = self._happens
        self.env.schedule(self, self._priority, delay_ns)
