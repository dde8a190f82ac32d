"""What several commands share: options, and how a command sets the exit status."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

P = ParamSpec("P")

Seed = Annotated[int | None, typer.Option("--seed", help="Another seed than the scenario's.", min=0)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key; may be given again.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder [runs/<name>-<utc>-<id>].")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def exits(command: Callable[P, int]) -> Callable[P, None]:
    """A command whose return value becomes the exit status."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        raise typer.Exit(command(*args, **kwargs))

    return run
