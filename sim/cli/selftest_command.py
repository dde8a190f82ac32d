"""`kvproof selftest`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from sim.cli.options import AsJson, Quiet, exits
from sim.exit_codes import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from sim.selftest import Selftest


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(short_help="Plant every bug and see who notices: the judge judged.")(exits(selftest))


def selftest(
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ID", help="A mutant; may be given again [all of them].")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes side by side.")] = 1,
    host_only: Annotated[
        bool, typer.Option("--host-only", help="Only what planning alone shows: no JAX, no second runs.")
    ] = False,
    hunt: Annotated[
        bool,
        typer.Option("--hunt", help="Let the fuzzer find each bug from a cold seed, shrink it and replay it."),
    ] = False,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", min=0, metavar="SEED", help="Of a hunt; may be given again [0].")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="How long one hunt may search.")] = 60.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Plant every bug, one by one, and print who notices it, where, and how soon: the kill matrix.

    Legal variants and the scenario library must raise no alarm, each invariant must be the sole killer of some mutant,
    and none may be vacuous. Exit status: 0 all of that holds, 1 it does not, 3 the canary survived: the verifier is
    broken. With --hunt: 0 the fuzzer found every bug in time and each replays, 1 it did not.

    Example: kvproof selftest --jobs 2
    """
    from rich.console import Console

    from sim.mutants import find_mutant
    from sim.selftest import SelftestOptions
    from sim.selftest import selftest as run_selftest

    ids = tuple(find_mutant(name).id for name in only or ())
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    if hunt:
        return _hunt(console, ids, seed or [0], seconds, jobs, host_only=host_only, as_json=as_json)
    start = time.perf_counter()
    with _progress(console) as progress:
        result = run_selftest(SelftestOptions(jobs=jobs, only=ids, host_only=host_only), progress)
    result.seconds = time.perf_counter() - start
    if as_json:
        sys.stdout.write(json.dumps(result.to_json()) + "\n")
    elif not quiet:
        _show(Console(highlight=False, soft_wrap=True), result)
    if not result.canary_caught:
        return ExitCode.INTERNAL
    return ExitCode.HELD if result.passed else ExitCode.BROKE


def _hunt(
    console: Console,
    ids: tuple[str, ...],
    seeds: list[int],
    seconds: float,
    jobs: int,
    *,
    host_only: bool,
    as_json: bool,
) -> int:
    """`--hunt`: a line for each hunt as it ends, then one object."""
    from sim.search.campaign import Hunt, campaign, figures

    hunts: list[Hunt] = []
    for one in campaign(ids, seeds, seconds=seconds, jobs=jobs, host_only=host_only):
        hunts.append(one)
        console.print(
            f"{one.mutant:<10} seed {one.seed}  {one.id or 'MISSED':<6}  {one.seconds:7.2f} s  "
            f"{one.requests:2} requests, {one.operations:2} operations, shrunk in {one.shrink_seconds:.1f} s, "
            f"replays: {'yes' if one.replayed else 'NO'}",
            markup=False,
        )
    found = figures(hunts)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for title in ("missed", "not_replayed", "large"):
            console.print(f"{title.replace('_', ' ')}: {', '.join(found[title]) or 'none'}", markup=False)
        console.print(f"medians: {', '.join(f'{name} {value}' for name, value in found['medians'].items())}")
    return ExitCode.BROKE if found["missed"] or found["not_replayed"] else ExitCode.HELD


@contextmanager
def _progress(console: Console) -> Generator[Callable[[int, int, str], None]]:
    """A callback that moves a bar on a terminal, and else prints a line now and then."""
    if not console.is_terminal:
        yield (
            lambda done, total, what: (
                console.print(f"{done}/{total} {what}", markup=False) if done % 25 == 0 or done == total else None
            )
        )
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _show(console: Console, result: Selftest) -> None:
    from sim.mutants import CANARY

    if not result.canary_caught:
        console.print(f"BROKEN: the canary {CANARY} survived: no verdict of this verifier can be trusted", markup=False)
        return
    lines = [("mutant", "killed by", "driver", "steps", "seconds", "replays", "also fires")]
    for fate in result.fates:
        also = " ".join(name for name in fate.fired if name != fate.killed_by)
        seconds, replays = f"{fate.seconds:.2f}", "yes" if fate.replayed else "NO"
        lines.append((fate.id, fate.killed_by or "SURVIVED", fate.driver, str(fate.steps), seconds, replays, also))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        console.print("  ".join([*cells, line[6]]).rstrip(), markup=False)
    for title, names in (
        ("not applicable yet", [f"{m.id} ({m.waits_for})" for m in result.waiting]),
        ("survived", [fate.id for fate in result.survivors]),
        ("another violation, step or hash in a second run", [fate.id for fate in result.fates if not fate.replayed]),
        ("false alarms", result.false_alarms),
        ("no sole killer", result.sole_killer_missing),
        ("vacuous", result.vacuous),
    ):
        if names:
            console.print(f"{title}: {', '.join(names)}", markup=False)
    verdict = "AWAKE" if result.passed else "ASLEEP"
    console.print(
        f"{verdict}: {len(result.fates) - len(result.survivors)} of {len(result.fates)} mutants killed, "
        f"{len(result.benign)} benign variants, {len(result.false_alarms)} false alarms, canary caught, "
        f"{len(result.sole_killers)} invariants with a sole killer ({len(result.sole_killer_missing)} without), "
        f"{result.seconds:.0f} s",
        markup=False,
    )
