"""What the command line's exit status says."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """One meaning each; scripts may rely on them."""

    HELD = 0
    BROKE = 1
    """An invariant broke, an expectation failed, the core raised, or backends diverged."""
    USAGE = 2
    """The command line or a scenario file is wrong."""
    INTERNAL = 3
    SLO = 4
    """Everything held but a latency bound in `expect`."""
    NOTHING = 5
    """Nothing was selected."""
    UNAVAILABLE = 6
    """The asked backend or device is not there."""
    INTERRUPTED = 130
