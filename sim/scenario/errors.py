"""What is wrong with a scenario or with a file that it names, in lines that a user can act on."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ScenarioError(Exception):
    """A scenario file, an override or a trace is wrong; `problems` has one line for each thing to change."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint in brackets that begins with a space: the closest known word, else all of them; "" where none is known."""
    known = list(known)
    if close := get_close_matches(word, known, n=1, cutoff=0.6):
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(known)})" if known else ""
