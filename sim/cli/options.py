"""What several commands share: options, and how a command sets the exit status."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")

Seed = Annotated[int | None, typer.Option("--seed", help="Another seed than the scenario's.", min=0)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key; may be given again.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder [runs/<name>-<utc>-<id>].")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def note_hangs(console: Console, seconds: float) -> None:
    """Say so where calls that do not return within `seconds` would go unnoticed."""
    from sim.hang import can_watch

    if seconds and not can_watch():
        console.print("this platform has no interval timers: a call that does not return is not noticed", markup=False)


def exits(command: Callable[P, int]) -> Callable[P, None]:
    """A command whose return value becomes the exit status."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        raise typer.Exit(command(*args, **kwargs))

    return run
