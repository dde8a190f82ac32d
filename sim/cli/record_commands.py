"""`kvproof plot`, `report`, `diff`, `replay`, `judge`: what can be done with what runs have left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sim.cli.options import AsJson, Quiet, RunFolder, exits
from sim.cli.show import broken, busy, counted, progress_bar

if TYPE_CHECKING:
    from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(short_help="Draw the plots of a run again.")(exits(plot))
    app.command(short_help="Write the HTML report of a run.")(exits(report))
    app.command(short_help="Compare two runs.")(exits(diff))
    app.command(short_help="Run again and compare trace and violations.")(exits(replay))
    app.command(short_help="Audit a plan log of any engine.")(exits(judge))


def plot(run: RunFolder, as_json: AsJson = False, quiet: Quiet = False) -> int:
    """Draw the plots of a run again, from its record alone.

    Example: kvproof plot runs/quickstart-20261101T120000Z-1a2b3c
    """
    from reports.plots import draw

    with busy(_notes(quiet), "drawing plots"):
        files = draw(run)
    return _list_files(files, as_json=as_json, quiet=quiet)


def report(run: RunFolder, as_json: AsJson = False, quiet: Quiet = False) -> int:
    """Write report.html into a run folder: figures, plots and violations on one page.

    Example: kvproof report runs/quickstart-20261101T120000Z-1a2b3c
    """
    from reports.html import write

    with busy(_notes(quiet), "writing the report"):
        file = write(run)
    return _list_files([file], as_json=as_json, quiet=quiet)


def _notes(quiet: bool) -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)


def _list_files(files: list[Path], *, as_json: bool, quiet: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps({"files": [str(file) for file in files]}) + "\n")
    elif not quiet:
        for file in files:
            typer.echo(file)
    return 0


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another run folder.")],
    same_trace: Annotated[bool, typer.Option("--same-trace", help="Exit with 1 unless the traces are equal.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Compare the figures of two runs, and say what differs in what was run.

    Example: kvproof diff runs/before runs/after
    """
    from reports.diff import compare

    comparison = compare(a, b)
    if as_json:
        sys.stdout.write(json.dumps(comparison.to_json()) + "\n")
    elif not quiet:
        for line in comparison.lines():
            typer.echo(line)
    return 1 if same_trace and not comparison.same_trace else 0


def replay(
    path: Annotated[Path, typer.Argument(metavar="FILE|RUN", help="A scenario, a run folder or its failure folder.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Run again and compare trace hash and violations with the record; a scenario file is run twice.

    Exit status: 0 the same again, 1 different (the first differing step is named).

    Example: kvproof replay runs/leak-20261101T120000Z-1a2b3c/failure
    """
    from sim.host_devices import forced_count, run_with_devices, wanted_count
    from sim.replay import load_recorded, scenario_of
    from sim.replay import replay as run_again

    scenario = scenario_of(path)
    wanted = wanted_count(scenario)
    if wanted > forced_count():
        flags = ["--json"] * as_json + ["--quiet"] * quiet
        output, status = run_with_devices(wanted, ["replay", str(path), *flags])
        sys.stdout.write(output)
        return status
    with progress_bar(_notes(quiet), scenario.name, shown=not quiet) as progress:
        comparison = run_again(load_recorded(path, progress), progress)
    found: dict[str, Any] = {
        "path": str(path),
        "same": comparison.same,
        "trace_hash": comparison.report.trace_hash,
        "steps": comparison.report.recorder.steps,
        "violations": [violation.to_json() for violation in comparison.report.violations],
        "crash": comparison.report.summary["crash"],
        "differences": list(comparison.differences),
    }
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    elif not quiet:
        word = "the same again" if comparison.same else "different"
        for violation in comparison.report.violations:
            typer.echo(f"violated {violation}")
        if crash := comparison.report.summary["crash"]:
            typer.echo(broken(comparison.report.summary["crash_id"], crash))
        for difference in comparison.differences:
            typer.echo(difference)
        typer.echo(f"{word}: {counted(found['steps'], 'step')}, trace {found['trace_hash']}")
    return 0 if comparison.same else 1


def judge(
    log: Annotated[
        Path, typer.Argument(metavar="LOG", help="A plan log (kvproof/plan-v1), gzip where it ends in .gz.")
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Audit a plan log with every invariant that needs no device; any engine can write one.

    Exit status: 0 all held, 1 an invariant broke, 2 the log is malformed (file and line are named).

    Example: kvproof judge engine.jsonl.gz
    """
    from sim.judge import judge as judge_log

    with busy(_notes(quiet), "judging"):
        judgement = judge_log(log)
    violations = judgement.auditor.violations
    counters = judgement.auditor.counters()
    found: dict[str, Any] = {
        "log": str(log),
        "lines": judgement.lines,
        "complete": judgement.complete,
        "steps": judgement.recorder.steps,
        "trace_hash": judgement.recorder.hash.hexdigest,
        "invariants": counters,
        "violations": [violation.to_json() for violation in violations],
    }
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    elif not quiet:
        for violation in violations:
            typer.echo(f"violated {violation}")
        if not judgement.complete:
            typer.echo("the log has no line 'end': what must hold at the end was not checked")
        checked = sum(1 for counts in counters.values() if counts["checked"])
        word = "VIOLATED" if violations else "HELD"
        typer.echo(
            f"{word}: {counted(found['steps'], 'step')}, {counted(checked, 'invariant')} checked, "
            f"{counted(len(violations), 'violation')}"
        )
    return 1 if violations else 0
