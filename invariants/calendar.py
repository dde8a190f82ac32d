"""When something is due for a slot of the decode batch: in which turn it reaches its end, or has filled its pages."""

from __future__ import annotations


class Calendar:
    """At most one turn for each slot, and the slots of each turn: nothing is touched while nothing is due."""

    def __init__(self) -> None:
        self._turn_of: dict[int, int] = {}
        self._slots: dict[int, list[int]] = {}
        """By turn, in ascending order of noting; who was noted anew or dropped since stays until the turn is over."""

    def note(self, slot: int, turn: int) -> None:
        """A slot is due at `turn`, and at no other."""
        self._turn_of[slot] = turn
        if turn in self._slots:
            self._slots[turn].append(slot)
        else:
            self._slots[turn] = [slot]

    def drop(self, slot: int) -> None:
        """A slot is not due."""
        self._turn_of.pop(slot, None)

    def due(self, turn: int) -> list[int]:
        """The slots that are due at `turn`, ascending."""
        if turn not in self._slots:
            return []
        turn_of = self._turn_of
        return sorted({slot for slot in self._slots[turn] if turn_of.get(slot) == turn})

    def over(self, turn: int) -> None:
        """The turn lies behind: nobody asks for it again."""
        self._slots.pop(turn, None)
