"""What an auditor says when a statement does not hold: evidence, never an assertion error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Violation:
    """One statement that did not hold, with what was expected, what was found, and where.

    `id` is a key of `invariants.catalogue`; `step` is the newest step known when it was found (-1: before the first);
    `expected` and `found` are short values as text.
    """

    id: str
    statement: str
    step: int
    time_ns: int
    message: str
    requests: tuple[int, ...] = ()
    pages: tuple[int, ...] = ()
    expected: str = ""
    found: str = ""

    def to_json(self) -> dict[str, Any]:
        """The violation as a dict of JSON values."""
        return {
            "id": self.id,
            "statement": self.statement,
            "step": self.step,
            "time_ns": self.time_ns,
            "message": self.message,
            "requests": list(self.requests),
            "pages": list(self.pages),
            "expected": self.expected,
            "found": self.found,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Violation:
        """Rebuild a violation that `to_json` wrote. KeyError: a field is missing."""
        return cls(
            id=str(data["id"]),
            statement=str(data["statement"]),
            step=int(data["step"]),
            time_ns=int(data["time_ns"]),
            message=str(data["message"]),
            requests=tuple(int(r) for r in data["requests"]),
            pages=tuple(int(p) for p in data["pages"]),
            expected=str(data["expected"]),
            found=str(data["found"]),
        )

    def __str__(self) -> str:
        return f"{self.id} at step {self.step}: {self.message}"
