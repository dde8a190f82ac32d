"""`kvproof init`, `schema`, `doctor`, `bench`: help around the runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from sim.cli.options import AsJson, Quiet, exits

STARTER: Final = """\
# yaml-language-server: $schema=schema.json
# A starter scenario: run it with `kvproof run {name}`; `kvproof schema > schema.json` gives editors completion.
schema: kvproof/v1
name: starter
seed: 1 # every random draw comes from it: the same seed is the same run, bit for bit

core: # the scheduler under test
  kind: paged_attention # kvproof list cores
  batch_size: 16 # decode slots
  prefill_chunk: 64 # prompt tokens that one step prefills at most
  preemption: recompute # or none
  lag: 0 # steps planned ahead of the oldest outcome that the host has seen: 0, 1, 2

cache:
  page_size: 16 # tokens per page
  num_pages: 256 # page 0, the dummy, included
  max_sequence_length: 512
  layers: 2
  kv_heads: 2
  head_dim: 16
  dtype: bfloat16

backend: # where K/V is really written and read: kvproof list backends
  kind: jax
  platform: cpu

workload:
  arrivals: {{kind: poisson, request_rate: 4.0}} # requests per simulated second
  prompt_tokens: {{kind: lognormal, mean: 96, sigma: 0.6, min: 8, max: 384}}
  output_tokens: {{kind: lognormal, mean: 32, sigma: 0.5, min: 2, max: 120}}
  num_requests: 50

cost: # how long a step takes in simulated time
  kind: linear
  base_ns: 10e6
  per_token_ns: 50e3

# faults: [{{kind: cancel, request: 3, at_step: 40}}]
# plant: leak-on-finish # a bug on purpose, to see it found: kvproof list mutants

expect: # what the run must show; a latency bound that is missed has an exit status of its own
  violations: 0
  finished: all
  time_to_first_token_seconds: {{p99: 2.0}}
"""

SECONDS_A_ROW: Final = 0.7
"""How long `bench devices` measures each row."""


def _show_version(asked: bool) -> None:
    """What `kvproof --version` prints."""
    if asked:
        from importlib.metadata import version

        typer.echo(f"kvproof {version('kvproof')}")
        raise typer.Exit


def _before_any_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    # No docstring: it would take the place of the program's help.
    del version


def register(app: typer.Typer) -> None:
    """Add this file's commands, and `--version`."""
    app.callback()(_before_any_command)
    app.command(short_help="Write a commented starter scenario.")(exits(init))
    app.command(short_help="Print the JSON Schema of scenario files.")(exits(schema))
    app.command(short_help="Show versions, devices and what missing extras would give.")(exits(doctor))
    app.command(short_help="Measure kvproof itself, in spins.")(exits(bench))


def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write it.")] = Path("scenario.yaml"),
    quiet: Quiet = False,
) -> int:
    """Write a commented starter scenario; an existing file is left alone.

    Example: kvproof init my-scenario.yaml
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER.format(name=path))
    except FileExistsError:
        raise typer.BadParameter(f"{path} exists already; choose another name") from None
    if not quiet:
        typer.echo(f"wrote {path}; run it with: kvproof run {path}", err=True)
    return 0


def schema() -> int:
    """Print the JSON Schema of scenario files, for editors.

    Example: kvproof schema > schema.json
    """
    from sim.scenario import schema_text

    sys.stdout.write(schema_text())
    return 0


def doctor(as_json: AsJson = False) -> int:
    """Show versions, devices, backends and what each missing extra would give.

    Example: kvproof doctor
    """
    from sim.doctor import diagnose, diagnosis_lines

    found = diagnose()
    typer.echo(json.dumps(found) if as_json else "\n".join(diagnosis_lines(found)))
    return 0


def bench(
    what: Annotated[
        Literal["runs", "devices"],
        typer.Argument(metavar="WHAT", help="runs: whole runs, in spins. devices: write paths, in memcpys."),
    ] = "runs",
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="CASE", help="A case; may be given again [all cases].")
    ] = None,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Runs per case; the best counts (device_checks: 4 pairs each).")
    ] = 5,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Measure kvproof itself: CPU time of a fixed workload in spins (a fixed loop), a spin before and after each run.

    `bench devices` measures what the device does, each row beside a yardstick of the same run.

    Example: kvproof bench --only plan_only --json
    """
    if what == "devices":
        return _bench_devices(only, as_json=as_json, quiet=quiet)
    from sim.bench import CASES
    from sim.bench import bench as measure

    names = only or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise typer.BadParameter(f"no case '{unknown[0]}'; there are: {', '.join(CASES)}", param_hint="--only")
    found = measure(names, repeat, lambda text: None if quiet else typer.echo(text, err=True))
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    elif not quiet:
        for name in names:
            typer.echo(f"{name}: {_checks_line(found[name]) if 'checks_share' in found[name] else _line(found[name])}")
    return 0


def _line(row: dict[str, Any]) -> str:
    target = "no target" if row["target"] is None else f"target {row['target']:g}"
    return (
        f"{row['spins']:.2f} spins ({target}), {row['cpu_seconds']:.2f} s CPU, {row['steps']:,} steps, "
        f"{row['mean_running']:.1f} running, {row['us_per_step']:.1f} us per step, "
        f"compiling {row['compile_seconds']:.1f} s"
    )


def _checks_line(row: dict[str, Any]) -> str:
    return (
        f"{row['us_per_step']:.0f} us per step, {row['unchecked_us_per_step']:.0f} with the device left alone: "
        f"the checks add {row['checks_share']:.2f} of that (target {row['max_checks_share']:g})"
    )


def _bench_devices(only: list[str] | None, *, as_json: bool, quiet: bool) -> int:
    from sim import bench_devices as devices

    names = only or list(devices.SECTIONS)
    if unknown := [name for name in names if name not in devices.SECTIONS]:
        raise typer.BadParameter(
            f"no section '{unknown[0]}'; there are: {', '.join(devices.SECTIONS)}", param_hint="--only"
        )
    found = devices.bench_devices(names, SECONDS_A_ROW, lambda text: None if quiet else typer.echo(text, err=True))
    if as_json:
        sys.stdout.write(json.dumps(devices.as_json(found)) + "\n")
    elif not quiet:
        for name, rows in found.items():
            typer.echo(name)
            for row in rows:
                typer.echo(f"  {row.line()}")
    return 0
