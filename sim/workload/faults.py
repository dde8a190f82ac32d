"""Faults as concrete operations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sim.scenario.models import CancelFault, CancelStorm, ConcreteFault, Scenario
from sim.streams import stream
from sim.workload.generate import generate
from sim.workload.times import CHUNK


def concrete_faults(scenario: Scenario) -> tuple[ConcreteFault, ...]:
    """The scenario's faults, each storm replaced by the cancels that it stands for, in order of arrival."""
    concrete: list[ConcreteFault] = []
    for index, fault in enumerate(scenario.faults):
        if isinstance(fault, CancelStorm):
            concrete.extend(_cancels(scenario, fault, "cancels" if index == 0 else f"cancels {index}"))
        else:
            concrete.append(fault)
    return tuple(concrete)


def _cancels(scenario: Scenario, storm: CancelStorm, name: str) -> list[CancelFault]:
    """Two draws for each request, chosen or not, so that a choice shifts no other."""
    chosen: list[CancelFault] = []
    draws = _pairs(stream(scenario.seed, name))
    for arrival, (chance, delay) in zip(generate(scenario), draws, strict=False):
        if chance < storm.fraction:
            at_ns = arrival.time_ns + round(delay * storm.max_delay_seconds * 1e9)
            chosen.append(CancelFault(kind="cancel", request=arrival.request, at_seconds=at_ns / 1e9))
    return chosen


def _pairs(random: np.random.Generator) -> Iterator[tuple[float, float]]:
    while True:
        first, second = random.random(CHUNK), random.random(CHUNK)
        yield from zip(first.tolist(), second.tolist(), strict=True)
