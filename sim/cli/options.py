"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Seed = Annotated[int | None, typer.Option("--seed", help="Another seed than the scenario's.", min=0)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key; may be given again.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder [runs/<name>-<utc>-<id>].")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
