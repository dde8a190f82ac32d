"""Which exit status and which sentence each kind of error gets."""

from __future__ import annotations

import errno

from backends.protocol import BackendUnavailableError
from backends.tpu_targets import UnknownTargetError
from reports.record import RecordError
from sim.build import SetupError
from sim.calibration.measure import CalibrationError
from sim.cores.checked import CoreFormError
from sim.cores.registry import UnknownCoreError
from sim.exit_codes import ExitCode
from sim.judge import PlanLogError
from sim.mutants import UnknownMutantError
from sim.replay import ReplayError
from sim.scenario import ScenarioError

USAGE_ERRORS = (
    ScenarioError,
    PlanLogError,
    RecordError,
    UnknownCoreError,
    UnknownMutantError,
    ReplayError,
    SetupError,
    CoreFormError,
    UnknownTargetError,
    CalibrationError,
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(Exception):
    """The command line asks for something that cannot be; the message says what to do."""


def status_of(error: Exception) -> tuple[ExitCode, str]:
    """The exit status and the line that the user sees."""
    if isinstance(error, (*USAGE_ERRORS, UsageError)):
        return ExitCode.USAGE, str(error)
    if isinstance(error, BackendUnavailableError):
        return ExitCode.UNAVAILABLE, str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in FULL:
            return ExitCode.INTERNAL, f"{where}{error.strerror}; free some space or write to another disk"
        return ExitCode.USAGE, f"{where}{error.strerror or error}; choose another file or folder"
    name = type(error).__name__
    return (
        ExitCode.INTERNAL,
        f"internal error: {name}: {error} (set KVPROOF_DEBUG=1 for the traceback; please report it)",
    )
