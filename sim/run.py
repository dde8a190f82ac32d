"""`run(scenario) -> Report`: one scenario from its parts to its verdict, with or without a folder on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

from invariants.violation import Violation
from sim.build import build_auditor, build_core, cache_spec, open_backend
from sim.cache_hash import cache_hash
from sim.cost_model import cost_model, num_extrapolated
from sim.deep import DeepResult, judge_deep
from sim.device_reads import DeviceReads
from sim.engine import Engine
from sim.event_log import EventLog
from sim.exit_codes import ExitCode
from sim.expect import FIRST, Check, check_expectations
from sim.faults import FaultSchedule
from sim.interrupt import Interrupt
from sim.metrics import run_figures
from sim.mutants import Mutant, find_mutant, planted
from sim.observer import Observer
from sim.part_calls import CRASH, HANG, PartError
from sim.parts import Parts, Progress
from sim.planlog import PlanLogWriteError, PlanLogWriter
from sim.record import Recorder
from sim.run_folder import SUMMARY_SCHEMA, write_failure, write_record, write_scenario
from sim.scenario import Scenario, scenario_hash
from sim.script import RequestScript
from sim.sometimes import Sometimes
from sim.workload import TraceError, Workload, concrete_faults, generate, prompt_tokens

PACKAGES: Final = ("kvproof", "numpy", "jax", "jaxlib", "simpy")
"""Whose versions a summary names."""

Audit = Literal[True, False, "host"]
"""What is judged: everything, nothing, or everything but what lies on the device."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run showed."""

    scenario: Scenario
    summary: dict[str, Any]
    violations: tuple[Violation, ...]
    checks: tuple[Check, ...]
    exit_code: ExitCode
    recorder: Recorder = field(repr=False)
    folder: Path | None = None

    @property
    def trace_hash(self) -> str:
        """The rolling hash of everything that was planned, moved and yielded."""
        return self.recorder.hash.hexdigest


class _Clocks:
    """Wall and CPU time of a run; they appear in the summary and nowhere in the simulation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def figures(self) -> dict[str, float]:
        return {
            "duration_wall_seconds": time.perf_counter() - self._wall,
            "duration_cpu_seconds": time.process_time() - self._cpu,
        }


def run(
    scenario: Scenario,
    *,
    out: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    plan_log: Path | None = None,
    workload: Workload | None = None,
    audit: Audit = True,
    deep_progress: Callable[[str], None] | None = None,
) -> Report:
    """Run a scenario.

    `out` is an existing folder that takes the record; None: nothing is written. `progress` is called now and then.
    `plan_log` is a file for `kvproof judge` (gzip where its name ends in .gz). `workload` takes the place of what the
    scenario's workload section stands for. With `audit` False nothing is checked, with "host" nothing on the device.
    `deep_progress` is told what comes next, where the scenario asks for deep checks.

    UnknownCoreError, UnknownMutantError, BackendUnavailableError: a part is not there. SetupError: it cannot be built
    like that. TraceError: the workload's file is wrong. OSError: the disk does not take the record.
    PlanLogWriteError: it does not take the plan log, but the record is written. Ctrl-C ends the run after its step, and
    the report says so; a second one raises KeyboardInterrupt at once, as does one that comes after the last step.
    """
    mutant = find_mutant(scenario.plant) if scenario.plant else None
    with planted(mutant):
        return _run(scenario, mutant, out, progress, plan_log, workload, audit, deep_progress)


def _run(
    scenario: Scenario,
    mutant: Mutant | None,
    out: Path | None,
    progress: Callable[[Progress], None] | None,
    plan_log: Path | None,
    workload: Workload | None,
    audit: Audit,
    deep_progress: Callable[[str], None] | None,
) -> Report:
    clocks = _Clocks()
    core = build_core(scenario, mutant)
    cost = cost_model(scenario.cost)
    script = RequestScript(scenario, prompt_tokens)
    if workload is None:
        workload = generate(scenario)
    faults = FaultSchedule(concrete_faults(scenario))
    if out is not None:
        write_scenario(out, scenario)
    with Interrupt() as interrupt:
        backend = open_backend(scenario, mutant)
        try:
            recorder = Recorder(core.policy)
            events = EventLog(recorder)
            # A judge of plan logs knows the tokens of scripted models only.
            vocab_size = None if scenario.model.kind == "tiny" else scenario.model.vocab_size
            log = PlanLogWriter(plan_log, core.policy, vocab_size, script.eos_position)
            sometimes = Sometimes(recorder)
            observers: list[Observer] = [sometimes] if audit else []
            # Only a folder has room for the last events of a failure.
            observers += [events] if audit and out is not None else []
            observers += [log] if plan_log is not None else []
            parts = Parts(
                core=core,
                backend=backend,
                script=script,
                cost=cost,
                workload=workload,
                faults=faults,
                recorder=recorder,
                auditor=build_auditor(scenario, core) if audit else None,
                observers=observers,
            )
            stop_at_first = scenario.invariants.stop == "first"
            engine = Engine(
                parts,
                stop_at_first=stop_at_first,
                audit_device=audit != "host",
                hang_seconds=scenario.invariants.hang_seconds,
                progress=progress,
                checkpoint=interrupt.check,
            )
            ending = _simulate(engine, log)
            described = dict(backend.describe())
            cache_digest = None
            if ending.crash is None and not ending.interrupted and not interrupt.asked:
                cache_digest, ending = _hashed(DeviceReads(backend, lambda: engine.num_plans), scenario, ending)
        finally:
            backend.close()
        deep, ending = _look_deeper(scenario, mutant, parts, ending, interrupt, deep_progress)
        summary = _summary(scenario, parts, ending, described, deep)
        summary["cache_hash"] = cache_digest
        summary["sometimes"] = sometimes.hits if audit else {}
        report = _report(scenario, parts, ending, summary, deep, out)
        summary.update(clocks.figures())
        if out is not None:
            if report.violations or ending.crash:
                write_failure(out, scenario, summary, events.lines(), recorder)
            write_record(out, recorder, summary)
    if ending.error is not None:
        raise ending.error
    return report


def run_whole(
    scenario: Scenario,
    workload: Workload | None = None,
    audit: Audit = True,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """`run` for those who have no use for a part of one. KeyboardInterrupt: Ctrl-C ended it."""
    report = run(scenario, workload=workload, audit=audit, progress=progress)
    if report.exit_code == ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    return report


@dataclass(frozen=True, slots=True)
class _Ending:
    end_ns: int
    crash: str | None = None
    """What a part under test raised, or which call did not return."""
    crash_id: str = ""
    """CRASH or HANG."""
    crash_cause: str = ""
    """See `PartError.cause`."""
    interrupted: bool = False
    error: TraceError | PlanLogWriteError | None = None
    """What is raised once the record is written."""


def _simulate(engine: Engine, log: PlanLogWriter) -> _Ending:
    ending = None
    try:
        with log:
            ending = _played(engine)
    except PlanLogWriteError as error:
        return replace(ending or _Ending(engine.close()), error=error)
    return ending


def _played(engine: Engine) -> _Ending:
    try:
        engine.run()
        engine.judge_end()
    except KeyboardInterrupt:
        return _Ending(engine.close(), interrupted=True)
    except PartError as error:
        return _crashed(_Ending(engine.close()), error)
    except TraceError as error:
        return _Ending(engine.close(), error=error)
    return _Ending(engine.close())


def _crashed(ending: _Ending, error: PartError) -> _Ending:
    return replace(ending, crash=str(error), crash_id=error.id, crash_cause=error.cause)


def _hashed(device: DeviceReads, scenario: Scenario, ending: _Ending) -> tuple[str | None, _Ending]:
    """See `cache_hash`; a cache that cannot be read is a crash of its backend."""
    try:
        return cache_hash(device, cache_spec(scenario)), ending
    except PartError as error:
        return None, _crashed(ending, error)


def _look_deeper(
    scenario: Scenario,
    mutant: Mutant | None,
    parts: Parts,
    ending: _Ending,
    interrupt: Interrupt,
    progress: Callable[[str], None] | None,
) -> tuple[DeepResult | None, _Ending]:
    """Where the scenario asks for it, and the run came to its end: what only more runs can judge."""
    settings, auditor = scenario.invariants, parts.auditor
    if not settings.deep or auditor is None or _cut_short(ending) is not None:
        return None, ending
    if settings.stop == "first" and auditor.violations:
        return None, ending
    try:
        deep = judge_deep(scenario, mutant, progress=progress, checkpoint=interrupt.check)
    except KeyboardInterrupt:
        return None, replace(ending, interrupted=True)
    return deep, replace(ending, crash=deep.crash, crash_id=CRASH if deep.crash else "")


def _violations(parts: Parts, deep: DeepResult | None) -> tuple[Violation, ...]:
    always = parts.auditor.violations if parts.auditor is not None else ()
    return (*always, *(deep.violations if deep is not None else ()))


def _summary(
    scenario: Scenario, parts: Parts, ending: _Ending, described: dict[str, str], deep: DeepResult | None
) -> dict[str, Any]:
    auditor = parts.auditor
    figures = run_figures(parts.recorder, ending.end_ns, parts.workload.skipped)
    if auditor is not None:
        auditor.summarised(figures)
    return {
        "schema": SUMMARY_SCHEMA,
        "name": scenario.name,
        "clock": "simulated",
        "seed": scenario.seed,
        "scenario_hash": scenario_hash(scenario),
        "versions": package_versions(),
        "backend": scenario.backend.kind,
        "device": described,
        **figures,
        "cost": {"kind": scenario.cost.kind, "extrapolated_steps": num_extrapolated(parts.cost)},
        "invariants": {
            **(auditor.counters() if auditor is not None else {}),
            **(deep.counters if deep is not None else {}),
        },
        "deep": deep.to_json() if deep is not None else None,
        "violations": [violation.to_json() for violation in _violations(parts, deep)],
        "crash": ending.crash,
        "crash_id": ending.crash_id,
        "crash_cause": ending.crash_cause,
    }


def _report(
    scenario: Scenario,
    parts: Parts,
    ending: _Ending,
    summary: dict[str, Any],
    deep: DeepResult | None,
    out: Path | None,
) -> Report:
    checks = check_expectations(scenario.expect, summary)
    exit_code, verdict = _verdict(checks, ending)
    summary["expectations"] = [check.to_json() for check in checks]
    summary["verdict"] = verdict
    return Report(
        scenario=scenario,
        summary=summary,
        violations=_violations(parts, deep),
        checks=checks,
        exit_code=exit_code,
        recorder=parts.recorder,
        folder=out,
    )


def _verdict(checks: tuple[Check, ...], ending: _Ending) -> tuple[ExitCode, str]:
    missed = [check for check in checks if not check.held]
    expected_crash = ending.crash is not None and any(c.name == FIRST and c.held for c in checks)
    cut_short = _cut_short(replace(ending, crash=None) if expected_crash else ending)
    if cut_short is not None:
        return cut_short
    if any(not check.objective for check in missed):
        return ExitCode.BROKE, "failed"
    if missed:
        return ExitCode.SLO, "objective missed"
    return ExitCode.HELD, "held"


def _cut_short(ending: _Ending) -> tuple[ExitCode, str] | None:
    if ending.interrupted:
        return ExitCode.INTERRUPTED, "interrupted"
    if isinstance(ending.error, TraceError):
        return ExitCode.USAGE, "trace wrong"
    if ending.crash is not None:
        return ExitCode.BROKE, "hung" if ending.crash_id == HANG else "crashed"
    if ending.error is not None:
        return ExitCode.INTERNAL, "plan log not written"
    return None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a run."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
