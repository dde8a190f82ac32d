"""Edits put a bug into running code and take it out again."""

from __future__ import annotations

import functools
import inspect

import pytest

from paged_attention.pages import HBMPageManager
from sim.mutants import MUTANTS, UnknownMutantError, find_mutant, planted
from sim.mutants.edit import Edit, StaleEditError, applied


class Base:
    def answer(self) -> int:
        return 1


class Child(Base):
    def answer(self) -> int:
        return super().answer() + 1

    @property
    def doubled(self) -> int:
        return self.answer() * 2

    @classmethod
    def named(cls) -> str:
        return "a" + cls.__name__

    @staticmethod
    def constant() -> int:
        return 5


@functools.cache
def remembered(number: int) -> int:
    return number + 1


def edit(target: str, old: str, new: str) -> Edit:
    return Edit(f"{Child.__module__}:{target}", old, new)


def test_methods_properties_class_and_static_methods_and_caches_are_edited_and_put_back() -> None:
    child = Child()
    before = (child.answer(), child.doubled, Child.named(), Child.constant(), remembered(1))
    edits = (
        edit("Child.answer", "+ 1", "+ 10"),
        edit("Child.doubled", "* 2", "* 3"),
        edit("Child.named", '"a"', '"b"'),
        edit("Child.constant", "5", "6"),
        edit("remembered", "number + 1", "number + 2"),
    )
    with applied(edits):
        during = (child.answer(), child.doubled, Child.named(), Child.constant(), remembered(1))
        assert during == (11, 33, "bChild", 6, 3)
    assert (child.answer(), child.doubled, Child.named(), Child.constant(), remembered(1)) == before


def test_what_was_edited_is_put_back_where_the_body_raises() -> None:
    with pytest.raises(RuntimeError, match="inside"), applied((edit("Child.constant", "5", "6"),)):
        raise RuntimeError("inside")
    assert Child.constant() == 5


@pytest.mark.parametrize(
    ("stale", "message"),
    [
        (("Child.constant", "7", "8"), "stands 0 times"),
        (("Child.answer", "a", "b"), "times in its source"),
        (("Child.gone", "a", "b"), "no such function"),
    ],
)
def test_an_edit_that_fits_no_code_is_named_and_nothing_is_changed(stale: tuple[str, str, str], message: str) -> None:
    with pytest.raises(StaleEditError, match=message), applied((edit("Child.constant", "5", "6"), edit(*stale))):
        pass
    assert Child.constant() == 5


@pytest.mark.parametrize("mutant", [m for m in MUTANTS.values() if m.edits and m.applicable], ids=lambda m: m.id)
def test_every_mutant_fits_the_code_of_today(mutant: object) -> None:
    with planted(mutant):  # type: ignore[arg-type]
        pass


def test_ids_are_unique_in_either_case() -> None:
    from sim.mutants.registry import FAMILIES

    ids = [mutant.id.lower() for family in FAMILIES for mutant in family.MUTANTS]
    assert len(ids) == len(set(ids))


def test_every_bug_names_invariants_that_exist_and_every_variant_none() -> None:
    from invariants.catalogue import CATALOGUE

    others = {"vacuity", "crash", "contract"}
    for mutant in MUTANTS.values():
        assert bool(mutant.caught_by) != mutant.benign, mutant.id
        strangers = {name for name in mutant.caught_by if name not in CATALOGUE and name not in others}
        assert all(name.startswith("SEED-") for name in strangers), mutant.id


def test_a_mutant_that_waits_for_a_feature_cannot_be_planted() -> None:
    waiting = next((mutant for mutant in MUTANTS.values() if not mutant.applicable), None)
    if waiting is None:
        pytest.skip("no mutant waits for a feature")
    with pytest.raises(UnknownMutantError, match="cannot be planted yet"):
        find_mutant(waiting.id)


def test_a_planted_bug_is_there_and_gone_afterwards() -> None:
    function = inspect.unwrap(HBMPageManager.free_hbm_pages)
    before = function.__code__
    with planted(find_mutant("mp04")):
        assert function.__code__ is not before
    assert function.__code__ is before
