"""`kvproof audit`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sim.cli.options import AsJson, Overrides, Quiet, exits
from sim.exit_codes import ExitCode

if TYPE_CHECKING:
    from sim.audit import TargetReport

MIB = 2**20


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(short_help="Compile a scenario's cache writes for TPUs that are not there, and judge them.")(
        exits(audit)
    )


def audit(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="A scenario file (YAML).")],
    target: Annotated[
        list[str], typer.Option("--target", metavar="TPU", help="Such as tpu-v5e:2x2; may be given again.")
    ],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="FUNCTION", help="A function; may be given again [all].")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Compile a scenario's write and step functions for TPUs ahead of time, at its pool size; no TPU is needed.

    Each must write in place: every byte of the pools aliased, no whole-pool copy, no collective between writers, and
    all of it within the device's memory. Needs the tpu extra. Exit status: 0 all pass, 1 one fails, 2 unknown target,
    6 libtpu is not installed.

    Example: kvproof audit scenarios/audit-llama3-8b.yaml --target tpu-v5e:2x2
    """
    from backends.tpu_targets import FUNCTIONS, find_target, prepare
    from sim.audit import FOR_TPU
    from sim.audit import audit as run_audit
    from sim.scenario import load_scenario

    targets = [find_target(name) for name in target]
    if unknown := [name for name in only or () if name not in FUNCTIONS]:
        raise typer.BadParameter(f"no function '{unknown[0]}'; there are: {', '.join(FUNCTIONS)}", param_hint="--only")
    loaded = load_scenario(scenario, [*FOR_TPU, *(overrides or ())])
    prepare()
    reports: list[TargetReport] = []
    for each in targets:
        report = run_audit(loaded, each, lambda text: None if quiet else typer.echo(text, err=True), only or FUNCTIONS)
        reports.append(report)
        if not quiet:
            typer.echo("\n".join(lines_of(report)), err=as_json)
    if as_json:
        found = [report.to_json() for report in reports]
        sys.stdout.write(json.dumps(found[0] if len(found) == 1 else found) + "\n")
    return ExitCode.HELD if all(report.passed for report in reports) else ExitCode.BROKE


def lines_of(report: TargetReport) -> list[str]:
    """A report for the console: a table of sizes per device, the reasons below it, the verdict last."""
    rows = [("function", "verdict", "alias/pool MiB", "temp MiB", "copies", "collectives", "HBM GiB", "cycles", "s")]
    for each in report.functions:
        found = each.compiled
        rows.append(
            (
                found.name,
                "pass" if each.passed else "FAIL",
                f"{found.alias_bytes / MIB:,.0f}/{found.pool_bytes / MIB:,.0f}",
                f"{found.temp_bytes / MIB:,.1f}",
                str(len(found.pool_copies)),
                str(len(found.collectives)),
                f"{found.hbm_bytes / 2**30:.2f}",
                "-" if found.cycles is None else f"{found.cycles:,}",
                f"{found.seconds:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines += [f"{each.compiled.name}: {why}" for each in report.functions for why in each.why]
    mesh = ", ".join(f"{axis} over {size}" for axis, size in report.mesh.items())
    verdict = "IN PLACE" if report.passed else "FAILED"
    return [*lines, f"{verdict}: {report.target.name} ({mesh}; {report.target.hbm_bytes / 2**30:.2f} GiB a device)"]
