"""`kvproof fuzz`, `explore` and `shrink`: the search for scenarios that break a core."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from sim.cli.fuzz_state import FUZZ_STATE, agree, read_state, with_earlier
from sim.cli.options import AsJson, Overrides, Quiet, exits, note_hangs
from sim.cli.show import broken, counted
from sim.exit_codes import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from sim.search.fuzz import FuzzResult

RUNS: Final = Path("runs")

Plant = Annotated[str | None, typer.Option("--plant", metavar="ID", help="Plant a bug, to see it found.")]
HangSeconds = Annotated[
    float, typer.Option("--hang-seconds", min=0.0, help="A call of the core that takes longer hangs; 0: none does.")
]
Core = Annotated[str, typer.Option("--core", metavar="NAME", help="The core to search (kvproof list cores).")]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(short_help="Search random scenarios for one that breaks a core.")(exits(fuzz))
    app.command(short_help="Try every order of events in a small world.")(exits(explore))
    app.command(short_help="Make a failing scenario as small as it gets.")(exits(shrink))


def fuzz(
    seed: Annotated[int, typer.Option("--seed", min=0, help="Everything is drawn from it.")] = 0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="How long to search.")] = 60.0,
    runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="Scenarios to search [as many as --seconds allow].")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes side by side.")] = 1,
    shard: Annotated[str, typer.Option("--shard", metavar="I/N", help="The I-th of N parts of the scenarios.")] = "1/1",
    backend: Annotated[Literal["none", "numpy", "jax"], typer.Option("--backend", help="Where steps run.")] = "none",
    core: Core = "paged_attention",
    plant: Plant = None,
    stop: Annotated[
        Literal["first", "never"], typer.Option("--stop", help="Whether the first scenario that breaks ends it.")
    ] = "never",
    hang_seconds: HangSeconds = 2.0,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="For what is found [runs/fuzz-*].")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on where the search in this folder ended.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Draw scenarios from a seed, run the real core through each, judge every step, and shrink what breaks.

    Scenario k of a seed is the same everywhere, whatever the jobs and shards. Exit status: 0 nothing broke, 1 a minimal
    scenario was written for each statement that broke, 3 the canary survived: the verifier is broken, 130 interrupted:
    --resume goes on.

    Example: kvproof fuzz --seconds 60 --jobs 2
    """
    from rich.console import Console

    from sim.bench import spin
    from sim.cores.registry import core_factory
    from sim.mutants import find_mutant
    from sim.run_folder import new_folder, write_json
    from sim.search.fuzz import FuzzOptions
    from sim.search.fuzz import fuzz as search

    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    state: dict[str, Any] = {"searched": 0, "violations": [], "sometimes": {}}
    if resume is not None:
        state = read_state(resume)
        asked = {"seed": seed, "shard": shard, "backend": backend, "plant": plant, "core": core, "out": out}
        agree(asked, state, resume)
        seed, shard = int(state["seed"]), str(state["shard"])
        backend, plant, core = state["backend"], state["plant"], str(state["core"])
    first = int(state["searched"])
    options = FuzzOptions(
        seed=seed,
        seconds=seconds,
        runs=runs,
        jobs=jobs,
        shard=_shard(shard),
        backend=backend,
        plant=find_mutant(plant).id if plant else None,
        core=core,
        first=first,
        stop=stop,
        hang_seconds=hang_seconds,
    )
    core_factory(core)  # an unknown core is told before the search
    folder = resume or out or new_folder(RUNS, f"fuzz-{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    note_hangs(console, hang_seconds)
    console.print(f"seed {seed}, shard {shard}, from scenario {first}; what is found goes to {folder}", markup=False)
    with _progress(console) as progress:
        result = search(options, folder, progress)
    found = {**with_earlier(result.to_json(spin()), state), "backend": backend, "plant": plant, "core": core}
    write_json(folder / FUZZ_STATE, found)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    elif not quiet:
        _show_fuzz(found)
    if not result.canary_caught:
        return ExitCode.INTERNAL
    if result.interrupted:
        console.print(f"interrupted; `kvproof fuzz --resume {folder}` goes on", markup=False)
        return ExitCode.INTERRUPTED
    if result.refused and result.refused == result.scenarios:
        from sim.cli.errors import UsageError

        raise UsageError(f"none of {result.scenarios} scenarios could be run: {result.refusal}")
    return ExitCode.BROKE if found["violations"] else ExitCode.HELD


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise typer.BadParameter(f"expected I/N with 1 <= I <= N, such as 2/8: found '{text}'", param_hint="--shard")
    return int(found[1]), int(found[2])


@contextmanager
def _progress(console: Console) -> Generator[Callable[[FuzzResult], None]]:
    """A callback that keeps a line up to date on a terminal."""
    status = console.status("searching")

    def show(result: FuzzResult) -> None:
        status.update(_line(result))

    with status if console.is_terminal and not console.quiet else nullcontext():
        yield show


def _line(result: FuzzResult) -> str:
    broken = ", ".join(sorted(result.shrunk)) or "nothing broke"
    return f"{counted(result.scenarios, 'scenario')}, {counted(result.steps, 'checked step')}, {broken}"


def _show_fuzz(found: dict[str, Any]) -> None:
    if not found["canary"]["caught"]:
        typer.echo(f"BROKEN: the canary {found['canary']['id']} survived: this search would notice nothing")
        return
    for violation in found["violations"]:
        typer.echo(broken(violation["id"], violation["message"]))
        typer.echo(f"  shrunk to {_size(violation['requests'], violation['operations'])}: {violation['file']}")
        typer.echo(f"  kvproof replay {violation['file']}")
    if found["refused"]:
        typer.echo(f"{found['refused']:,} scenarios were left out: {found['refusal']}")
    never = [name for name, count in found["sometimes"].items() if not count]
    if never:
        typer.echo(f"never met: {', '.join(never)}")
    hit = len(found["sometimes"]) - len(never)
    word = "BROKE" if found["violations"] else "HELD"
    typer.echo(
        f"{word}: seed {found['seed']}: {counted(found['scenarios'], 'scenario')}, "
        f"{counted(found['steps'], 'checked step')}, "
        f"{found['steps_per_spin']:,.0f} per spin, {hit} of {len(found['sometimes'])} situations met, "
        f"{counted(len(found['violations']), 'statement')} broke"
    )


def _size(requests: int, operations: int) -> str:
    return f"{counted(requests, 'request')}, {counted(operations, 'operation')}"


def explore(
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 3,
    pages: Annotated[int, typer.Option(min=1, help="Usable pages.")] = 5,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens per page.")] = 1,
    slots: Annotated[int, typer.Option(min=1, help="Decode slots.")] = 2,
    prompt: Annotated[int, typer.Option(min=1, help="Longest prompt, in tokens.")] = 2,
    output: Annotated[int, typer.Option(min=1, help="Longest output, in tokens.")] = 2,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens that a step prefills at most.")] = 2,
    lag: Annotated[int, typer.Option(min=0, max=2, help="Steps planned ahead.")] = 0,
    mix: Annotated[
        Literal["mixed", "prefill_first", "decode_first"], typer.Option(help="How prefill and decodes share steps.")
    ] = "mixed",
    eos: Annotated[bool, typer.Option(help="Any token may be an EOS.")] = True,
    cancels: Annotated[bool, typer.Option(help="Any request may be cancelled at any time.")] = True,
    fails: Annotated[bool, typer.Option(help="Any planned step may fail.")] = False,
    symmetry: Annotated[bool, typer.Option(help="Count states that differ in names only once.")] = True,
    seconds: Annotated[float, typer.Option(min=0.1, help="Give up after so long.")] = 600.0,
    hang_seconds: HangSeconds = 2.0,
    core: Core = "paged_attention",
    plant: Plant = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Visit every state that a core can reach in a small world, judging each step: proof for that world.

    Exit status: 0 every state was visited and everything held, 1 something broke (a shortest way to it is printed),
    130 time ran out.

    Example: kvproof explore --requests 2 --pages 3 --lag 1
    """
    from rich.console import Console

    from sim.build import SetupError
    from sim.cores.registry import core_factory
    from sim.mutants import find_mutant, planted
    from sim.search.explore import explore as search
    from sim.search.small_world import Scope

    scope = Scope(
        requests=requests,
        pages=pages,
        page_size=page_size,
        slots=slots,
        max_prompt=prompt,
        max_output=output,
        chunk=chunk,
        lag=lag,
        mix=mix,
        eos=eos,
        cancels=cancels,
        fails=fails,
        symmetry=symmetry,
    )
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    status = console.status("exploring") if console.is_terminal and not quiet else None
    factory = core_factory(core)
    note_hangs(console, hang_seconds)
    try:
        factory(scope.config())
    except ValueError as error:
        raise SetupError(f"core: {error}") from error
    with planted(find_mutant(plant) if plant else None):
        if status is not None:
            status.start()
        try:
            found = search(
                scope,
                factory,
                max_seconds=seconds,
                hang_seconds=hang_seconds,
                progress=lambda seen: (
                    status.update(f"{seen.states:,} states, {seen.transitions:,} transitions, depth {seen.depth}")
                    if status is not None
                    else None
                ),
            )
        finally:
            if status is not None:
                status.stop()
    if as_json:
        sys.stdout.write(json.dumps(found.to_json()) + "\n")
    elif not quiet:
        for violation in found.violations:
            typer.echo(broken(violation.id, violation.message))
            for number, action in enumerate(violation.actions, 1):
                typer.echo(f"  {number}. {action}")
        word = "BROKE" if found.violations else "EXHAUSTED" if found.exhausted else "UNFINISHED"
        typer.echo(
            f"{word}: {counted(found.states, 'state')}, {counted(found.transitions, 'transition')}, "
            f"depth {found.depth}, {counted(len(found.violations), 'violation')}"
        )
    if found.violations:
        return ExitCode.BROKE
    return ExitCode.HELD if found.exhausted else ExitCode.INTERRUPTED


def shrink(
    path: Annotated[Path, typer.Argument(metavar="FILE|RUN", help="A scenario, a run folder or its failure folder.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The minimal scenario [failure.yaml].")
    ] = None,
    budget: Annotated[int, typer.Option("--budget", min=1, help="Scenarios to try at most.")] = 5000,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Make a failing scenario as small as it gets while the same statement breaks first.

    Operations go first, then their numbers, then the core's sizes; comments of the file stay with what is left. Exit
    status: 0 a minimal scenario was written, 5 everything holds, so that there is nothing to shrink.

    Example: kvproof shrink runs/leak-20261101T120000Z-1a2b3c/failure --out leak.yaml
    """
    from rich.console import Console

    from sim.replay import scenario_of
    from sim.scenario import load_scenario
    from sim.search.concrete import concrete
    from sim.search.failure import write_failure_file
    from sim.search.shrink import NothingToShrinkError
    from sim.search.shrink import shrink as search

    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    scenario = load_scenario(path, overrides or ()) if path.is_file() else scenario_of(path)
    spelled_out, before = concrete(scenario)
    target = out or Path("failure.yaml")
    with console.status("shrinking") if console.is_terminal and not quiet else nullcontext() as status:
        try:
            shrunk = search(
                spelled_out,
                wanted=before.pin or None,
                budget=budget,
                progress=lambda tried, operations: (
                    status.update(f"{counted(tried, 'scenario')} tried, {counted(operations, 'operation')} left")
                    if status
                    else None
                ),
            )
        except NothingToShrinkError as error:
            console.print(str(error), markup=False)
            return ExitCode.NOTHING
    write_failure_file(target, shrunk, source=path if path.is_file() else None)
    found = {
        "file": str(target),
        "id": shrunk.finding.id,
        "step": shrunk.finding.step,
        "trace_hash": shrunk.finding.trace_hash,
        "requests": shrunk.num_requests,
        "operations": shrunk.num_operations,
        "tried": shrunk.tried,
        "message": shrunk.finding.message,
    }
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    elif not quiet:
        typer.echo(broken(shrunk.finding.id, shrunk.finding.message))
        typer.echo(f"shrunk to {_size(shrunk.num_requests, shrunk.num_operations)} in {shrunk.tried} tries: {target}")
        typer.echo(f"kvproof replay {target}")
    return ExitCode.HELD
