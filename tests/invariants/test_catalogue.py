"""The catalogue is complete, and a violation survives JSON."""

import json

import pytest

from invariants.auditor import AuditConfig, Auditor
from invariants.catalogue import ACTIVE, CATALOGUE, explain, select
from invariants.violation import Violation
from tests.invariants.reference import small_policy

FAMILIES = {"P": 13, "T": 6, "K": 10, "S": 14, "L": 6, "O": 11, "X": 7, "R": 4, "D": 5, "M": 8}


def test_every_id_of_every_family_is_there():
    assert list(CATALOGUE) == [f"{f}{i}" for f, n in FAMILIES.items() for i in range(1, n + 1)]


def test_each_entry_says_what_and_why_in_a_sentence():
    for entry in CATALOGUE.values():
        assert entry.statement.endswith("."), entry.id
        assert entry.why.endswith("."), entry.id
        assert entry.when
    assert len({e.statement for e in CATALOGUE.values()}) == len(CATALOGUE)


def test_an_explanation_says_whether_it_is_checked():
    assert explain("p1").startswith("P1 (pages, checked in every run)")
    assert explain("d1").startswith("D1 (determinism, checked by kvproof run --deep)")
    assert "not yet applicable: prefix sharing" in explain("X2")
    with pytest.raises(ValueError, match="no invariant is called 'P99'"):
        explain("P99")


def test_only_active_ids_can_be_selected():
    assert select(None, "always") | select(None, "deep") == ACTIVE
    assert select(frozenset({"P1", "D1"}), "deep") == {"D1"}
    with pytest.raises(ValueError, match="no invariant is called 'P99'"):
        Auditor(small_policy(), AuditConfig(only=frozenset({"P99"})), 10)
    with pytest.raises(ValueError, match="X1 is not checked yet: it waits for prefix sharing"):
        select(frozenset({"X1"}), "always")


def test_a_violation_survives_json():
    violation = Violation("P1", "s", 3, 17, "m", (1, 2), (4,), "a", "b")
    assert Violation.from_json(json.loads(json.dumps(violation.to_json()))) == violation
    assert str(violation) == "P1 at step 3: m"
