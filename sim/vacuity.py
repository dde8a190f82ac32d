"""What a set of runs never tried: invariants that were never really tested, corner cases that never came up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from invariants.catalogue import CATALOGUE
from sim.sometimes import SOMETIMES


def vacuous(summaries: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Ids without one evaluation that could have failed, then ids of `sometimes` that no run reached.

    `summaries` are those of runs with every check on. Statements that compare runs (mode "deep") count where one of
    them was looked at.
    """
    looked_at = {name for summary in summaries for name in summary["invariants"]}
    wanted = [
        name for name, entry in CATALOGUE.items() if entry.active and (entry.mode == "always" or name in looked_at)
    ]
    never = [name for name in wanted if not _total(summaries, "invariants", name)]
    return (*never, *(name for name in SOMETIMES if not _total(summaries, "sometimes", name)))


def _total(summaries: Sequence[Mapping[str, Any]], section: str, name: str) -> int:
    """How often something happened in all runs together."""
    total = 0
    for summary in summaries:
        count: Any = summary.get(section, {}).get(name, 0)
        total += count["nontrivial"] if section == "invariants" and count else count
    return total
