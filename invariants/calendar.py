"""When something is due for a slot of the decode batch: in which turn it reaches its end, or has filled its pages."""

from __future__ import annotations

from collections.abc import Collection

_NOBODY: frozenset[int] = frozenset()


class Calendar:
    """At most one turn for each slot, and the slots of each turn: nothing is touched while nothing is due."""

    def __init__(self) -> None:
        self._turn_of: dict[int, int] = {}
        self._slots: dict[int, set[int]] = {}

    def note(self, slot: int, turn: int) -> None:
        """A slot is due at `turn`, and at no other."""
        self.drop(slot)
        self._turn_of[slot] = turn
        slots = self._slots.get(turn)
        if slots is None:
            self._slots[turn] = {slot}
        else:
            slots.add(slot)

    def drop(self, slot: int) -> None:
        """A slot is not due."""
        turn = self._turn_of.pop(slot, None)
        if turn is None:
            return
        slots = self._slots[turn]
        slots.discard(slot)
        if not slots:
            del self._slots[turn]

    def turn_of(self, slot: int) -> int | None:
        """When the slot is due; None: not at all."""
        return self._turn_of.get(slot)

    def due(self, turn: int) -> Collection[int]:
        """The slots that are due at `turn`."""
        return self._slots.get(turn, _NOBODY)
