"""What `kvproof fuzz` leaves in its folder, and how `--resume` goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import typer

FUZZ_STATE: Final = "fuzz.json"

FRESH: Final[dict[str, Any]] = {
    "seed": 0,
    "shard": "1/1",
    "backend": "none",
    "plant": None,
    "core": "paged_attention",
    "out": None,
}
"""What the options are where they are not given."""


def read_state(folder: Path) -> dict[str, Any]:
    """What the search in a folder has found. BadParameter: there was none."""
    from sim.run_folder import read_json

    try:
        return dict(read_json(folder / FUZZ_STATE))
    except (OSError, ValueError):
        raise typer.BadParameter(f"{folder} holds no {FUZZ_STATE} of a search", param_hint="--resume") from None


def agree(asked: dict[str, Any], state: dict[str, Any], folder: Path) -> None:
    """A search goes on as it began. BadParameter: an option says otherwise."""
    for name, value in asked.items():
        if value not in (FRESH[name], state.get(name)):
            raise typer.BadParameter(
                f"the search in {folder} goes on with what it began with"
                + (f", {state[name]}" if name in state else "")
                + f": found {value}; leave the option away, or begin another search without --resume",
                param_hint=f"--{name}",
            )


def with_earlier(found: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """What a search found, with what it had found before it was resumed; all other figures are of this part."""
    again = {violation["id"] for violation in found["violations"]}
    earlier = [violation for violation in state["violations"] if violation["id"] not in again]
    met = {name: count + state["sometimes"].get(name, 0) for name, count in found["sometimes"].items()}
    return {**found, "violations": [*earlier, *found["violations"]], "sometimes": met}
