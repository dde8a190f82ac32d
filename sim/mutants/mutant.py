"""What a planted bug is: a value that says what is wrong, how it is planted, and who must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from backends.protocol import Backend
from sim.cores.protocol import ServingCore
from sim.mutants.edit import Edit

Where = Literal["host", "device", "deep"]
"""What it takes to see it: planning alone, a step on the device, or runs compared with one another."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A planted bug, or (with `benign`) a legal variant that nobody may complain about.

    It rewrites functions of our own code (`edits`), or wraps whatever core or backend runs.
    """

    id: str
    sentence: str
    """What it does, in one sentence."""
    caught_by: tuple[str, ...] = ()
    """Invariants that can be the first to notice; the first of them names the statement that it breaks."""
    where: Where = "host"
    edits: tuple[Edit, ...] = ()
    core: Callable[[ServingCore], ServingCore] | None = None
    backend: Callable[[Backend], Backend] | None = None
    driver: str = ""
    """The name of the driver to try first; "": those of `where` in their order."""
    waits_for: str = ""
    """The feature without which it means nothing; "": it is applicable today."""
    benign: bool = False

    @property
    def applicable(self) -> bool:
        """Whether it can be planted today."""
        return not self.waits_for
