"""`kvproof calibrate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sim.cli.options import AsJson, Overrides, Quiet, Seed, exits

if TYPE_CHECKING:
    from sim.calibration.file import Calibration


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(short_help="Fit a step-time model to this device.")(exits(calibrate))


def calibrate(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="Whose steps are timed.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The calibration file; a new one.")],
    seed: Seed = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that are timed at most.")] = 2000,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Passes of each of the two timed runs; a step's fastest counts.")
    ] = 3,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Time the real steps of a scenario on its device, fit a model of them, and say how far it is off.

    A scenario uses it with `cost: {kind: measured, file: FILE}`. The device should have nothing else to do meanwhile.

    Example: kvproof calibrate scenarios/calibrate-tiny.yaml --out tiny-cpu.yaml
    """
    from datetime import UTC, datetime

    from sim.calibration.calibrate import calibrate as measure
    from sim.calibration.file import calibration_text
    from sim.cli.errors import UsageError
    from sim.host_devices import forced_count, run_with_devices, wanted_count
    from sim.scenario import load_scenario

    loaded = load_scenario(scenario, overrides or (), seed)
    if out.exists():
        raise UsageError(f"{out} exists already; give a new file with --out")
    if (wanted := wanted_count(loaded)) > forced_count():
        arguments = ["calibrate", str(scenario), "--out", str(out), "--steps", str(steps), "--repeat", str(repeat)]
        arguments += ["--seed", str(seed)] if seed is not None else []
        for override in overrides or ():
            arguments += ["--set", override]
        flags = [flag for flag, given in (("--json", as_json), ("--quiet", quiet)) if given]
        output, status = run_with_devices(wanted, arguments + flags)
        sys.stdout.write(output)
        return status
    found = measure(loaded, datetime.now(UTC).date().isoformat(), steps, repeat)
    out.write_text(calibration_text(found), encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps({"file": str(out), **found.model_dump(mode="json", by_alias=True)}) + "\n")
    elif not quiet:
        typer.echo("\n".join(_lines(found, out)))
    return 0


def _lines(found: Calibration, out: Path) -> Iterator[str]:
    from sim.calibration.calibrate import MAX_MEDIAN_ERROR
    from sim.calibration.features import FEATURES

    for kind, fit in found.kinds.measured().items():
        terms = [f"{fit.base_ps / 1e6:,.1f} us"]
        names = zip(FEATURES, fit.coefficients_ps, strict=True)
        terms += [f"{per / 1e6:,.3f} us x {name}" for name, per in names if per]
        yield f"{kind} ({fit.steps:,} steps): {' + '.join(terms)}"
    held, noise = found.held_out, found.noise
    yield (
        f"{held.steps:,} steps held out: off by {held.median:.1%} (median; target {MAX_MEDIAN_ERROR:.0%}), "
        f"{held.p90:.1%} (p90), {held.total:+.1%} in all"
    )
    yield f"noise: the same steps timed twice differ by {noise.median:.1%} (median), {noise.p90:.1%} (p90)"
    if held.median > MAX_MEDIAN_ERROR:
        yield "the target is missed: calibrate again while the device has nothing else to do, or with a larger --repeat"
    yield f"wrote {out}; a scenario uses it with cost: {{kind: measured, file: {out.name}}}"
