"""`kvproof run`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sim.cli.options import AsJson, Out, Overrides, Quiet, Seed, exits, note_hangs

if TYPE_CHECKING:
    from rich.console import Console

    from backends.protocol import ProcessShare
    from sim.scenario import Scenario

RUNS = Path("runs")
SEVERITY = (130, 3, 6, 2, 1, 4)
"""Of several runs, the exit status that comes first here wins."""


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("run", short_help="Run scenarios, check every step, write a run folder.")(exits(run_scenarios))


def run_scenarios(
    scenarios: Annotated[list[Path], typer.Argument(metavar="SCENARIO...", help="Scenario files (YAML).")],
    seed: Seed = None,
    overrides: Overrides = None,
    out: Out = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    plan_log: Annotated[
        Path | None,
        typer.Option("--plan-log", metavar="FILE", help="Also write a log for `kvproof judge` (.gz: gzip)."),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also check what only more runs can judge (invariants.deep: true).")
    ] = False,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="No plots, report or trace.")] = False,
    process: Annotated[
        str | None, typer.Option("--process", metavar="I/N", help="Be process I (from 0) of N that share the mesh.")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option("--coordinator", metavar="HOST:PORT", help="Where process 0 listens.")
    ] = None,
) -> int:
    """Run scenarios through the real scheduler, page manager and cache writes; check every step.

    Exit status: 0 all held, 1 an invariant broke or an expectation failed, 2 usage, 3 internal error or full disk,
    4 only a latency objective failed, 6 the backend is not there, 130 interrupted.

    Example: kvproof run scenarios/quickstart.yaml --set core.lag=2 --seed 5
    """
    from rich.console import Console

    from sim.host_devices import needs_own_process
    from sim.scenario import load_scenario

    if plan_log is not None and len(scenarios) > 1:
        raise typer.BadParameter("one log holds one run: give a single scenario", param_hint="--plan-log")
    share = _share(process, coordinator)
    if share is not None and (deep or len(scenarios) > 1):
        raise typer.BadParameter("processes share one scenario, without --deep", param_hint="--process")
    overrides = [*(overrides or ()), "invariants.deep=true"] if deep else overrides
    loaded = [(path, load_scenario(path, overrides or (), seed)) for path in scenarios]
    summaries: list[dict[str, Any]] = []
    statuses: list[int] = []
    notes = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    for (path, scenario), folder in zip(loaded, _folders(out, [scenario for _, scenario in loaded]), strict=True):
        if needs_own_process(scenario, share):
            arguments = _arguments(path, seed, overrides, folder, plan_log)
            summary, status = _in_own_process(scenario, arguments, share)
        else:
            if share is not None:
                from backends.jax_processes import join_processes

                join_processes(share)
            summary, status = run_one(scenario, folder, plan_log, notes)
        statuses.append(status)
        if summary is not None:
            summaries.append({**summary, "run_folder": str(folder), "exit_code": status})
            _show(notes if as_json else Console(quiet=quiet, highlight=False, soft_wrap=True), summary, folder)
            # After the verdict: whoever has no room for plots still learns what the run showed.
            if summary["steps"] and not no_plots:
                _draw(folder, notes)
        if status == 130:
            break
    if as_json:
        sys.stdout.write(json.dumps(summaries[0] if len(loaded) == 1 and summaries else summaries) + "\n")
    return next((status for status in SEVERITY if status in statuses), 0)


def run_one(scenario: Scenario, folder: Path, plan_log: Path | None, notes: Console) -> tuple[dict[str, Any], int]:
    """Run one scenario in this process; its summary and exit status."""
    from sim.cli.show import progress_bar
    from sim.run import run
    from sim.run_folder import unless_unused

    note_hangs(notes, scenario.invariants.hang_seconds)
    with unless_unused(folder), progress_bar(notes, scenario.name, shown=not notes.quiet) as progress:
        report = run(
            scenario,
            out=folder,
            progress=progress,
            plan_log=plan_log,
            deep_progress=lambda text: notes.print(f"deep: {text}", style="dim", markup=False),
        )
    return report.summary, int(report.exit_code)


def _draw(folder: Path, notes: Console) -> None:
    from reports import html, perfetto
    from reports.plots import draw
    from sim.cli.show import busy

    with busy(notes, "drawing plots"):
        draw(folder)
        html.write(folder)
        perfetto.write(folder)


def _folders(out: Path | None, scenarios: list[Scenario]) -> Iterator[Path]:
    """A new run folder for each scenario, made and proven writable before it runs. OSError: it is not."""
    from sim.run_folder import new_folder

    taken: Counter[str] = Counter()
    for scenario in scenarios:
        if out is None:
            yield new_folder(RUNS, scenario.name)
            continue
        taken[scenario.name] += 1
        number = f"-{taken[scenario.name]}" if taken[scenario.name] > 1 else ""
        folder = out / f"{scenario.name}{number}" if len(scenarios) > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise typer.BadParameter(f"{folder} is not empty; give a new folder", param_hint="--out")
        yield folder


def _show(console: Console, summary: dict[str, Any], folder: Path) -> None:
    from sim.cli.show import summary_lines, verdict_lines
    from sim.run_folder import FAILURE, replay_command

    for line in (*summary_lines(summary), f"run folder: {folder}"):
        console.print(line, markup=False)
    styles = {"held": "bold green", "objective missed": "bold yellow"}
    *details, verdict = verdict_lines(summary)
    if (folder / FAILURE).is_dir():
        details.append(f"replay it with: {replay_command(folder / FAILURE)}")
    for line in details:
        console.print(line, markup=False)
    console.print(verdict, markup=False, style=styles.get(summary["verdict"], "bold red"))


def _share(process: str | None, coordinator: str | None) -> ProcessShare | None:
    from backends.protocol import ProcessShare

    if process is None and coordinator is None:
        return None
    if process is None or coordinator is None:
        raise typer.BadParameter("each needs the other", param_hint="--process, --coordinator")
    index, _, count = process.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise typer.BadParameter(f"expected I/N such as 0/2, found {process!r}", param_hint="--process")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise typer.BadParameter(
            f"expected HOST:PORT such as 127.0.0.1:4711, found {coordinator!r}", param_hint="--coordinator"
        )
    return ProcessShare(int(index), int(count), f"{host}:{port}")


def _arguments(
    path: Path,
    seed: int | None,
    overrides: list[str] | None,
    folder: Path,
    plan_log: Path | None,
) -> list[str]:
    arguments = ["run", str(path), "--json", "--quiet", "--no-plots", "--out", str(folder)]
    arguments += ["--seed", str(seed)] if seed is not None else []
    for override in overrides or []:
        arguments += ["--set", override]
    return arguments + (["--plan-log", str(plan_log)] if plan_log is not None else [])


def _in_own_process(
    scenario: Scenario, arguments: list[str], share: ProcessShare | None
) -> tuple[dict[str, Any] | None, int]:
    from backends.protocol import BackendUnavailableError
    from sim.host_devices import ChildEndedError, run_with_devices, wanted_count

    if share is not None:
        arguments = [*arguments, "--process", f"{share.index}/{share.count}", "--coordinator", share.coordinator]
    try:
        output, status = run_with_devices(wanted_count(scenario, share), arguments)
    except ChildEndedError as error:
        if share is None:
            raise
        raise BackendUnavailableError(
            f"process {share.index} of {share.count}: {error}; JAX does so where the others are not at "
            f"{share.coordinator} within a minute, or one of them has ended: start all {share.count} together"
        ) from error
    # Gloo, which carries what processes say to each other, writes lines of its own to stdout.
    summary = next((line for line in output.splitlines() if line.startswith("{")), None)
    return (None if summary is None else json.loads(summary)), status
