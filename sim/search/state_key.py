"""When two worlds are the same: everything that the future depends on, with names of pages and requests taken off.

Pages are named by where they are first met (free list, fence, page lists, steps in flight), requests by age. Slots keep
their numbers: decode rows run in their order. Token values are left out: a scheduler never looks at them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from sim.search.small_world import Flight, World


def state_key(world: World, *, symmetry: bool) -> bytes:
    """16 bytes that are equal for equal worlds."""
    names = _Names(symmetry)
    snapshot = world.core.snapshot()
    in_flight = [r for flight in world.flights for r in flight.plan.request.tolist()]
    for request in sorted({*world.asked, *in_flight}):
        names.request(request)
    # Of each request the admission that holds pages now; an older one in flight is another's past.
    newest = dict(snapshot.pages.keys())
    parts: list[Any] = [
        world.submitted,
        names.pages(snapshot.free.tolist()),
        names.pages(snapshot.fenced.tolist()),
        [(names.request(r), asked.kind, asked.tokens) for r, asked in sorted(world.asked.items())],
        [
            (names.request(r), names.pages(pages.tolist()))
            for (r, _), pages in sorted(snapshot.pages.items(), key=lambda item: item[0])
        ],
        [(state, [names.request(r) for r in queue.tolist()]) for state, queue in sorted(snapshot.queues.items())],
        sorted((names.request(r), slot) for r, slot in snapshot.slot_of.items()),
        snapshot.positions.tolist(),
        [_flight(flight, world, newest, names) for flight in world.flights],
        _hidden(world, names),
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _flight(flight: Flight, world: World, newest: dict[int, int], names: _Names) -> list[Any]:
    plan, outcome = flight.plan, flight.outcome
    return [
        (
            names.request(request),
            newest.get(request) == admission,
            slot,
            start,
            count,
            samples,
            eos,
            (request, admission) in world.dead,
            names.pages(plan.table[row, : plan.num_pages[row]].tolist()),
        )
        for row, (request, admission, slot, start, count, samples, eos) in enumerate(
            zip(
                plan.request.tolist(),
                plan.admission.tolist(),
                plan.slot.tolist(),
                plan.start.tolist(),
                plan.count.tolist(),
                plan.samples.tolist(),
                outcome.eos.tolist(),
                strict=True,
            )
        )
    ]


def _hidden(world: World, names: _Names) -> Any:
    """What the core says that planning depends on beside its snapshot; () for a core that has no more to say."""
    hidden = getattr(world.core, "hidden_state", None)
    if hidden is None:
        return ()
    return [
        (name, [names.request(v) for v in values] if name.endswith("_requests") else list(values))
        for name, values in hidden().items()
    ]


class _Names:
    """Hands out names in the order of first meeting; without symmetry everything keeps its own."""

    def __init__(self, symmetry: bool) -> None:
        self._symmetry = symmetry
        self._requests: dict[int, int] = {}
        self._pages: dict[int, int] = {0: 0}

    def request(self, request: int) -> int:
        return self._requests.setdefault(request, len(self._requests)) if self._symmetry else request

    def pages(self, pages: Iterable[int]) -> list[int]:
        if not self._symmetry:
            return list(pages)
        return [self._pages.setdefault(page, len(self._pages)) for page in pages]
