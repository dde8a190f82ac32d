"""Runs a recorded scenario again and compares: the same trace hash, step by step, and the same violations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from sim.part_calls import CRASH
from sim.parts import Progress
from sim.run import Report, run_whole
from sim.run_folder import FAILURE, SCENARIO, SUMMARY, VIOLATIONS, read_json, read_step_hashes
from sim.scenario import Scenario, load_scenario
from sim.trace_hash import DIGEST_BYTES, first_difference


class ReplayError(Exception):
    """There is nothing to replay at that path; the message says what was looked for."""


CUT_SHORT: Final = ("interrupted", "trace wrong", "plan log not written")
"""Verdicts of a run that did not come to its own end."""


class Shown(NamedTuple):
    """What a run showed: a violation, or how a call of a part ended it."""

    id: str
    step: int
    """Of a crash or a hang the steps that were completed."""
    cause: str = ""
    """What `PartError.cause` says of it; "": the record does not say."""

    def __str__(self) -> str:
        return f"{self.id}{f' ({self.cause})' if self.cause else ''} at step {self.step}"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run has left behind for comparison."""

    scenario: Scenario
    trace_hash: str
    step_hashes: bytes
    violations: tuple[Shown, ...]
    """Each in order; a crash or a hang comes last."""
    whole: bool
    """False: the recorded run was cut short, so only its steps can be compared."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run and its repetition."""

    report: Report
    same: bool
    differences: tuple[str, ...]
    """One sentence each, the first differing step first."""


def scenario_of(path: Path) -> Scenario:
    """The scenario of a run folder, of its failure folder, or in a file. Raises what load_recorded raises."""
    if path.is_dir() and not (path / SCENARIO).is_file():
        raise ReplayError(
            f"{path}: there is no {SCENARIO}; give a run folder (with {SUMMARY}) or its {FAILURE}/ (with {VIOLATIONS})"
        )
    return load_scenario(path / SCENARIO if path.is_dir() else path)


def load_recorded(path: Path, progress: Callable[[Progress], None] | None = None) -> Recorded:
    """The run behind a run folder, its failure folder or a scenario file.

    A file says in `expect.first` what was found; one without it is run once to have a record.

    ReplayError: neither of these. ScenarioError: the scenario is wrong.
    """
    scenario = scenario_of(path)
    if path.is_file():
        first = scenario.expect.first
        if first is not None:
            return Recorded(scenario, first.trace_hash, b"", (Shown(first.id, first.step, first.cause),), whole=True)
        return _of_report(run_whole(scenario, progress=progress))
    for name, read in ((SUMMARY, _of_run), (VIOLATIONS, _of_failure)):
        if (path / name).is_file():
            try:
                return read(path, scenario)
            except (KeyError, TypeError, ValueError, OSError) as error:
                what = f"{name}: no {error}" if isinstance(error, KeyError) else error
                raise ReplayError(f"{path}: the record is damaged ({what}); run the scenario again") from None
    raise ReplayError(f"{path}: there is neither {SUMMARY} nor {VIOLATIONS}; give a run folder or its {FAILURE}/")


def _of_report(report: Report) -> Recorded:
    digests = bytes(report.recorder.hash.step_digests)
    return Recorded(report.scenario, report.trace_hash, digests, _shown(report.summary), whole=True)


def _of_run(folder: Path, scenario: Scenario) -> Recorded:
    summary = cast("dict[str, Any]", read_json(folder / SUMMARY))
    whole = summary["verdict"] not in CUT_SHORT
    return Recorded(scenario, str(summary["trace_hash"]), read_step_hashes(folder), _shown(summary), whole)


def _of_failure(folder: Path, scenario: Scenario) -> Recorded:
    found = cast("dict[str, Any]", read_json(folder / VIOLATIONS))
    return Recorded(scenario, str(found["trace_hash"]), bytes.fromhex(found["step_hashes"]), _shown(found), whole=True)


def _shown(found: dict[str, Any]) -> tuple[Shown, ...]:
    shown = tuple(Shown(str(violation["id"]), int(violation["step"])) for violation in found["violations"])
    if not found["crash"]:
        return shown
    # Records of older versions know crashes only, and not what was raised.
    name, cause = found.get("crash_id", CRASH), found.get("crash_cause", "")
    return (*shown, Shown(str(name), int(found["steps"]), str(cause)))


def replay(recorded: Recorded, progress: Callable[[Progress], None] | None = None) -> Comparison:
    """Run it again and compare. KeyboardInterrupt: Ctrl-C ended the run."""
    report = run_whole(recorded.scenario, progress=progress)
    again = _of_report(report)
    differences: list[str] = []
    step = first_difference(recorded.step_hashes, again.step_hashes)
    before, after = len(recorded.step_hashes) // DIGEST_BYTES, len(again.step_hashes) // DIGEST_BYTES
    if step is not None:
        differences.append(f"the runs part at completed step {step} (counted from 0)")
    elif recorded.whole and recorded.step_hashes and before != after:
        differences.append(f"the recorded run completed {before} steps, this one {after}")
    elif recorded.whole and recorded.trace_hash != again.trace_hash:
        differences.append(
            f"the runs part after the last completed step {after - 1}: "
            f"recorded is trace {recorded.trace_hash}, found {again.trace_hash}"
        )
    if recorded.whole and not _is_shown(recorded.violations, again.violations):
        differences.append(f"the recorded run violated {_named(recorded)}, this one {_named(again)}")
    return Comparison(report, not differences, tuple(differences))


def _is_shown(recorded: tuple[Shown, ...], again: tuple[Shown, ...]) -> bool:
    """Whether a run begins with what was recorded; where the record names no cause, any will do."""
    if len(again) < len(recorded):
        return False
    told = (seen if known.cause else seen._replace(cause="") for known, seen in zip(recorded, again, strict=False))
    return recorded == tuple(told)


def _named(recorded: Recorded) -> str:
    return ", ".join(map(str, recorded.violations)) or "nothing"
