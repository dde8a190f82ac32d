"""Where judges put what they found, and how often each statement was really tested."""

from __future__ import annotations

from collections.abc import Iterable

from invariants.catalogue import CATALOGUE
from invariants.violation import Violation


class Count:
    """How often one invariant was evaluated, and how often it could have failed."""

    __slots__ = ("checked", "nontrivial")

    def __init__(self) -> None:
        self.checked = 0
        self.nontrivial = 0

    def add(self, checked: int, nontrivial: int) -> None:
        """Count `checked` evaluations, `nontrivial` of which could have failed."""
        self.checked += checked
        self.nontrivial += nontrivial


class Findings:
    """Violations and counters of the invariants that are on; everything else is dropped here."""

    def __init__(self, on: frozenset[str], max_violations: int) -> None:
        self.on = on
        self.max_violations = max_violations
        self.violations: list[Violation] = []
        self.violated = dict.fromkeys(sorted(on), 0)
        self.counts = {name: Count() for name in CATALOGUE}
        self.step = -1
        self.time_ns = 0

    def any_on(self, ids: Iterable[str]) -> bool:
        """Whether at least one of `ids` is on, so that its evidence is worth gathering."""
        return not self.on.isdisjoint(ids)

    def breach(
        self,
        name: str,
        message: str,
        *,
        requests: Iterable[int] = (),
        pages: Iterable[int] = (),
        expected: object = "",
        found: object = "",
    ) -> None:
        """Record that invariant `name` does not hold; at most max_violations are kept, all are counted."""
        if name not in self.on:
            return
        self.violated[name] += 1
        if len(self.violations) >= self.max_violations:
            return
        self.violations.append(
            Violation(
                id=name,
                statement=CATALOGUE[name].statement,
                step=self.step,
                time_ns=self.time_ns,
                message=message,
                requests=tuple(int(r) for r in requests),
                pages=tuple(int(p) for p in pages),
                expected=str(expected),
                found=str(found),
            )
        )

    def counters(self) -> dict[str, dict[str, int]]:
        """For each invariant that is on: checked, nontrivial, violated."""
        return {
            name: {
                "checked": self.counts[name].checked,
                "nontrivial": self.counts[name].nontrivial,
                "violated": self.violated[name],
            }
            for name in CATALOGUE
            if name in self.on
        }
