"""A calendar knows one turn for each slot, the newest that was noted."""

from invariants.calendar import Calendar


def test_slots_of_a_turn_come_ascending_and_once():
    calendar = Calendar()
    for slot in (3, 1, 3):
        calendar.note(slot, 7)
    assert calendar.due(7)
    assert calendar.take(7) == [1, 3]
    assert not calendar.due(7)
    assert calendar.take(7) == []


def test_what_is_noted_anew_or_dropped_is_due_no_more():
    calendar = Calendar()
    calendar.note(1, 7)
    calendar.note(2, 7)
    calendar.note(1, 8)
    calendar.drop(2)
    assert not calendar.due(7)
    assert calendar.take(8) == [1]


def test_a_turn_that_lies_behind_does_not_matter_to_later_ones():
    calendar = Calendar()
    calendar.note(1, 7)
    assert calendar.take(7) == [1]
    calendar.note(1, 9)
    calendar.drop(4)
    assert calendar.take(9) == [1]
