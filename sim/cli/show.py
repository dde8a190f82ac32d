"""What a run looks like on the console: a table in the manner of serving benchmarks, and a verdict line."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console

    from sim.parts import Progress

WIDTH: Final = 58
TITLES: Final = {
    "time_to_first_token_seconds": ("Time to First Token", "TTFT"),
    "time_per_output_token_seconds": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "inter_token_latency_seconds": ("Inter-token Latency", "ITL"),
    "e2e_request_latency_seconds": ("End-to-end Latency", "E2EL"),
}
_MAX_VIOLATIONS: Final = 5
ENDINGS: Final = {"crash": "crashed:", "hang": "hung:"}


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The table; every time in it is simulated, but for the last two lines."""
    requests, tokens = summary["requests"], summary["tokens"]
    yield f" {summary['name']}: simulated serving result ".center(WIDTH, "=")
    yield _row("Successful requests:", requests["finished"])
    for name in ("cancelled", "rejected", "live", "skipped"):
        if requests[name]:
            yield _row({"live": "Unfinished"}.get(name, name.capitalize()) + " requests:", requests[name])
    yield _row("Simulated duration (s):", summary["duration_simulated_seconds"])
    yield _row("Total input tokens:", tokens["prompt"])
    yield _row("Total generated tokens:", tokens["output"])
    yield _row("Request throughput (req/s):", summary["request_throughput"])
    yield _row("Output token throughput (tok/s):", summary["output_throughput"])
    yield _row("Preemptions / recomputed tokens:", f"{summary['num_preemptions']:,} / {tokens['recomputed']:,}")
    usage, waste = summary["kv_cache_usage_perc"], summary["internal_fragmentation"]["mean"]
    yield _row("KV cache usage, mean / max (%):", f"{_percent(usage['mean'])} / {_percent(usage['max'])}")
    yield _row("Internal fragmentation, mean (%):", _percent(waste))
    for key, (title, short) in TITLES.items():
        figures = summary[key]
        if figures["count"]:
            yield title.center(WIDTH, "-")
            for label, figure in (("Mean", "mean"), ("Median", "p50"), ("P99", "p99")):
                yield _row(f"{label} {short} (ms):", figures[figure] * 1e3)
    if summary["sometimes"]:
        reached = sum(count > 0 for count in summary["sometimes"].values())
        yield _row("Corner cases reached:", f"{reached} of {len(summary['sometimes'])}")
    yield "On this machine".center(WIDTH, "-")
    yield _row(
        "Wall / CPU time (s):", f"{summary['duration_wall_seconds']:.2f} / {summary['duration_cpu_seconds']:.2f}"
    )
    yield _row("Backend:", _backend(summary))
    yield "=" * WIDTH


def _row(label: str, value: float | str | None) -> str:
    if value is None:
        text = "-"
    elif isinstance(value, str):
        text = value
    else:
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
    return f"{label:<36}{text:>{WIDTH - 36}}"


def counted(number: int, thing: str) -> str:
    """`1 step`, `2 steps`, `1,000 steps`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f}"


def _backend(summary: Mapping[str, Any]) -> str:
    device = summary["device"]
    return " ".join(dict.fromkeys(str(part) for part in (summary["backend"], device.get("device_kind", "")) if part))


def verdict_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What does not hold, then one line: the verdict, steps, tokens, invariants checked, violations."""
    for violation in summary["violations"][:_MAX_VIOLATIONS]:
        yield f"violated {violation['id']} at step {violation['step']}: {violation['message']}"
        if violation["expected"] or violation["found"]:
            yield f"  expected {violation['expected']}, found {violation['found']}"
    if (more := len(summary["violations"]) - _MAX_VIOLATIONS) > 0:
        yield f"... and {more} more"
    if summary["crash"]:
        yield broken(summary["crash_id"], summary["crash"])
        if summary["crash_id"] == "hang":
            yield "  where such a call only takes long, give it longer: --set invariants.hang_seconds=60, say"
    for check in summary["expectations"]:
        if not check["held"]:
            yield f"not as expected: {check['name']} is {check['found']}, expected {check['expected']}"
    if extrapolated := summary["cost"]["extrapolated_steps"]:
        yield (
            f"warning: {extrapolated:,} steps lie outside what the calibration measured; their times are extrapolated"
            " (kvproof calibrate with a scenario that has such steps)"
        )
    checked = sum(1 for counts in summary["invariants"].values() if counts["checked"])
    violated = sum(counts["violated"] for counts in summary["invariants"].values())
    wanted = " (expected)" if violated and summary["verdict"] == "held" else ""
    yield (
        f"{summary['verdict'].upper()}: {summary['name']}: {counted(summary['steps'], 'step')}, "
        f"{counted(summary['tokens']['scheduled'], 'token')}, {counted(checked, 'invariant')} checked, "
        f"{counted(violated, 'violation')}{wanted}, trace {summary['trace_hash']}"
    )


def busy(console: Console, what: str) -> AbstractContextManager[object]:
    """Says what is being done as long as it lasts; on anything but a terminal it does nothing."""
    return console.status(what) if console.is_terminal and not console.quiet else nullcontext()


def broken(name: str, message: str) -> str:
    """What broke in words; `name` is the id of an invariant, or crash or hang."""
    return f"{ENDINGS.get(name, 'violated')} {message}"


@contextmanager
def progress_bar(console: Console, title: str, shown: bool) -> Generator[Callable[[Progress], None], None, None]:
    """A callback that moves a progress bar; on anything but a terminal it does nothing."""
    if not shown or not console.is_terminal:
        yield lambda progress: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests, {task.fields[steps]:,} steps"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, steps=0)
        yield lambda p: bar.update(task, completed=p.done, total=p.total, steps=p.steps)
