"""When something is due for a slot of the decode batch: in which turn it reaches its end, or has filled its pages."""

from __future__ import annotations


class Calendar:
    """At most one turn for each slot, and the slots of each turn: nothing is touched while nothing is due."""

    def __init__(self) -> None:
        self._turn_of: dict[int, int] = {}
        self._slots: dict[int, set[int]] = {}

    def note(self, slot: int, turn: int) -> None:
        """A slot is due at `turn`, and at no other."""
        before, slots = self._turn_of.get(slot), self._slots
        if before in slots:
            slots[before].discard(slot)
        self._turn_of[slot] = turn
        if turn in slots:
            slots[turn].add(slot)
        else:
            slots[turn] = {slot}

    def drop(self, slot: int) -> None:
        """A slot is not due."""
        turn = self._turn_of.pop(slot, None)
        if turn in self._slots:
            self._slots[turn].discard(slot)

    def due(self, turn: int) -> bool:
        """Whether any slot is due at `turn`."""
        return bool(self._slots.get(turn))

    def take(self, turn: int) -> list[int]:
        """The slots that are due at `turn`, ascending; the turn lies behind then, and nobody asks for it again."""
        slots = self._slots.pop(turn, None)
        return sorted(slots) if slots else []
