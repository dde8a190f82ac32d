"""`kvproof list` and `explain`: what there is, and what it means."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sim.cli.options import AsJson, exits
from sim.exit_codes import ExitCode

if TYPE_CHECKING:
    from sim.mutants import Mutant

SCENARIO_FOLDER: Final = Path("scenarios")
LIBRARY: Final = Path(__file__).parents[2] / "scenarios"
"""The scenarios that come with the package."""


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("list", short_help="List scenarios, invariants, corner cases, backends, cores or mutants.")(
        exits(list_things)
    )
    app.command(short_help="Explain an invariant or a mutant.")(exits(explain))


def list_things(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="scenarios, invariants, sometimes, backends, cores or mutants.")
    ],
    folder: Annotated[
        Path | None, typer.Option(help="Where the scenarios are [./scenarios, else those that come with kvproof].")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """List what there is, one line each. Exit status 5: there is none.

    Example: kvproof list invariants
    """
    listers: dict[str, Callable[[], dict[str, str]]] = {
        "scenarios": lambda: scenario_purposes(folder or (SCENARIO_FOLDER if SCENARIO_FOLDER.is_dir() else LIBRARY)),
        "invariants": invariant_statements,
        "sometimes": corner_cases,
        "backends": backends,
        "cores": cores,
        "mutants": mutants,
    }
    if what not in listers:
        close = get_close_matches(what, listers, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(listers)}"
        raise typer.BadParameter(f"cannot list '{what}'; {hint}")
    found = listers[what]()
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    elif found:
        width = max(map(len, found))
        for name, sentence in found.items():
            typer.echo(f"{name:<{width}}  {sentence}".rstrip())
    else:
        typer.echo(f"no {what} found" + (f" in {folder or SCENARIO_FOLDER}" if what == "scenarios" else ""), err=True)
    return ExitCode.HELD if found else ExitCode.NOTHING


def scenario_purposes(folder: Path) -> dict[str, str]:
    """Path and first comment line of every scenario file in a folder."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[str(path)] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def invariant_statements() -> dict[str, str]:
    """Id and statement of every invariant; those that not every run checks say so."""
    from invariants.catalogue import CATALOGUE

    return {
        name: entry.statement if entry.active and entry.mode == "always" else f"{entry.statement} ({entry.status})"
        for name, entry in CATALOGUE.items()
    }


def corner_cases() -> dict[str, str]:
    """Id and sentence of everything that must happen in some run."""
    from sim.sometimes import SOMETIMES

    return SOMETIMES


def backends() -> dict[str, str]:
    """Name and entry point of every installed backend."""
    from backends.registry import backend_entry_points

    return {name: entry.value for name, entry in backend_entry_points().items()}


def cores() -> dict[str, str]:
    """Name and factory of every core."""
    from sim.cores.registry import core_names

    return core_names()


def mutants() -> dict[str, str]:
    """Name of every planted bug, what it does, and who must notice."""
    from sim.mutants import MUTANTS

    return {name: f"{mutant.sentence} {_fate(mutant)}." for name, mutant in MUTANTS.items()}


def _fate(mutant: Mutant) -> str:
    if mutant.benign:
        return "Legal: nobody may complain"
    if not mutant.applicable:
        return f"Not applicable yet: {mutant.waits_for}"
    return f"Caught by {' or '.join(mutant.caught_by)}"


def explain(
    name: Annotated[str, typer.Argument(metavar="ID", help="An invariant such as P1, or a mutant.")],
    as_json: AsJson = False,
) -> int:
    """Explain an invariant: what must hold, why, and how it is checked; or a planted bug.

    Example: kvproof explain P1
    """
    from invariants.catalogue import CATALOGUE
    from sim.mutants import MUTANTS

    invariant = CATALOGUE.get(name.upper())
    mutant = next((found for known, found in MUTANTS.items() if known.lower() == name.lower()), None)
    if invariant is not None:
        fields = {"id": invariant.id, "statement": invariant.statement, "why": invariant.why, "checked": invariant.when}
        fields["how"] = invariant.status
    elif mutant is not None:
        kind = "benign variant" if mutant.benign else "planted bug"
        fields = {"id": mutant.id, kind: mutant.sentence, "fate": _fate(mutant), "seen by": mutant.where}
    else:
        close = get_close_matches(name, [*CATALOGUE, *MUTANTS], n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see kvproof list invariants"
        raise typer.BadParameter(f"there is no invariant or mutant '{name}'; {hint}")
    if as_json:
        sys.stdout.write(json.dumps(fields) + "\n")
    else:
        for field, text in fields.items():
            typer.echo(f"{field}: {text}")
    return 0
