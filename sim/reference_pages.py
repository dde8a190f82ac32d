"""The reference pages docs/invariants.md and docs/mutants.md, made from the code so that they cannot be out of date.

python -m sim.reference_pages    writes both
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from invariants.catalogue import CATALOGUE
from sim.deep import RELATIONS
from sim.deep.world import MAX_REQUESTS, MAX_TOKENS
from sim.mutants import CANARY, MUTANTS, Mutant

DOCS: Final = Path(__file__).parents[1] / "docs"
PAGES: Final = ("invariants.md", "mutants.md")

_COSTS: Final = {
    "delta": "per thing that changed",
    "rows": "per row of a step",
    "step": "once a step",
    "full": "the whole state",
    "once": "once a run",
}


def page(name: str) -> str:
    """The text of one page of PAGES."""
    lines = {"invariants.md": _invariants, "mutants.md": _mutants}[name]()
    return "\n".join(lines) + "\n"


def _invariants() -> Iterator[str]:
    caught: defaultdict[str, list[str]] = defaultdict(list)
    for mutant in MUTANTS.values():
        if mutant.applicable:
            for invariant in mutant.caught_by:
                caught[invariant].append(mutant.id)
    active = [entry for entry in CATALOGUE.values() if entry.active]
    yield "# Invariants"
    yield ""
    yield f"{len(CATALOGUE)} statements; {len(active)} are checked today. Made from `invariants/catalogue.py`."
    yield "What none of them covers is on [the page of limits](not-verified.md)."
    families: defaultdict[str, list[str]] = defaultdict(list)
    for name, entry in CATALOGUE.items():
        families[entry.family].append(name)
    for family, names in families.items():
        yield ""
        yield f"## {family.capitalize()}"
        for name in names:
            entry = CATALOGUE[name]
            yield ""
            yield f"### {name}"
            yield ""
            yield f"{entry.statement}"
            yield ""
            yield f"- Why: {entry.why}"
            if entry.active:
                yield f"- Checked: {entry.when}. Cost: {_COSTS[entry.cost]}."
                if entry.mode == "deep":
                    yield "- Only with `kvproof run --deep`, or `invariants: {deep: true}` in the scenario."
            else:
                yield f"- Not yet applicable: waits for {entry.waits_for}."
            if caught[name]:
                yield f"- Planted bugs that it must notice: {', '.join(caught[name])}."
    yield ""
    yield "## Deep checks"
    yield ""
    yield (
        f"`kvproof run --deep` plays up to {MAX_REQUESTS} requests of a scenario ({MAX_TOKENS:,} tokens) again and "
        "again, each time with one thing changed, and compares."
    )
    yield ""
    yield "| ids | what the other run changes | what must be equal |"
    yield "|---|---|---|"
    yield from (f"| {', '.join(r.ids)} | {_cell(r.changes)} | {_cell(r.equal)} |" for r in RELATIONS)


def _mutants() -> Iterator[str]:
    bugs = [mutant for mutant in MUTANTS.values() if not mutant.benign]
    yield "# Planted bugs and legal variants"
    yield ""
    yield (
        f"{len(bugs)} planted bugs, {sum(m.applicable for m in bugs)} of them applicable today, and "
        f"{len(MUTANTS) - len(bugs)} legal variants. Made from `sim/mutants/`. `kvproof selftest` plants each of them; "
        f"`plant: ID` in a scenario plants one. The canary, which every selftest must catch first, is `{CANARY}`."
    )
    yield ""
    yield "## Planted bugs"
    yield ""
    yield "| id | what it does | noticed by | seen by |"
    yield "|---|---|---|---|"
    yield from (_row(mutant) for mutant in bugs)
    yield ""
    yield "## Legal variants"
    yield ""
    yield "Nobody may complain about these."
    yield ""
    yield "| id | what it does |"
    yield "|---|---|"
    yield from (f"| {m.id} | {_cell(m.sentence)} |" for m in MUTANTS.values() if m.benign)


def _row(mutant: Mutant) -> str:
    noticed = ", ".join(mutant.caught_by) if mutant.applicable else f"(waits for {mutant.waits_for})"
    seen = {"host": "planning alone", "device": "a step on the device", "deep": "runs compared"}[mutant.where]
    return f"| {mutant.id} | {_cell(mutant.sentence)} | {noticed} | {seen} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write both pages."""
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
