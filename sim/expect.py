"""What a scenario expects of its run, compared with what the run showed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from sim.scenario.models import CountRange, Expectations, LatencyBounds

LATENCIES: Final = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
)

FIRST: Final = "first violation"
"""The name of the check of `expect.first`."""


@dataclass(frozen=True, slots=True)
class Check:
    """One expectation and what was found."""

    name: str
    expected: str
    found: str
    held: bool
    objective: bool = False
    """A latency bound: missing it has an exit code of its own."""

    def to_json(self) -> dict[str, Any]:
        """The check as a dict of JSON values."""
        return asdict(self)


def check_expectations(expect: Expectations, summary: Mapping[str, Any]) -> tuple[Check, ...]:
    """Every expectation of the scenario, the silent one included: no violation where none is asked for."""
    violated = {name for name, counts in summary["invariants"].items() if counts["violated"]}
    return (*_violations(expect, violated, summary), *_counts(expect, summary), *_latencies(expect, summary))


def _violations(expect: Expectations, violated: set[str], summary: Mapping[str, Any]) -> Iterator[Check]:
    found = sum(counts["violated"] for counts in summary["invariants"].values())
    if expect.violated:
        yield Check(
            name="violated",
            expected=", ".join(sorted(expect.violated)),
            found=", ".join(sorted(violated)) or "none",
            held=violated == set(expect.violated),
        )
    if expect.first is not None:
        first = expect.first
        wanted, seen = _told(first.id, first.cause, first.step), _first(summary, with_cause=first.cause != "")
        yield Check(FIRST, wanted, seen, seen == wanted)
    if expect.violations is not None or not (expect.violated or expect.first):
        yield _count("violations", expect.violations or 0, found)


def _first(summary: Mapping[str, Any], *, with_cause: bool) -> str:
    """The first violation of a run, as in expect.first."""
    if summary["violations"]:
        first = summary["violations"][0]
        return _told(first["id"], "", first["step"])
    if not summary["crash"]:
        return "none"
    return _told(summary["crash_id"], summary["crash_cause"] if with_cause else "", summary["steps"])


def _told(name: str, cause: str, step: int) -> str:
    return f"{name}{f' ({cause})' if cause else ''} at step {step}"


def _counts(expect: Expectations, summary: Mapping[str, Any]) -> Iterator[Check]:
    requests = summary["requests"]
    if expect.finished == "all":
        due = requests["submitted"] - requests["cancelled"] - requests["rejected"]
        yield Check("finished", f"all ({due})", str(requests["finished"]), requests["finished"] == due)
    elif expect.finished is not None:
        yield _count("finished", expect.finished, requests["finished"])
    found = {
        "cancelled": requests["cancelled"],
        "rejected": requests["rejected"],
        "preemptions": summary["num_preemptions"],
        "steps": summary["steps"],
    }
    for name, value in found.items():
        wanted: int | CountRange | None = getattr(expect, name)
        if wanted is not None:
            yield _count(name, wanted, value)


def _count(name: str, wanted: int | CountRange, found: int) -> Check:
    if isinstance(wanted, int):
        return Check(name, str(wanted), str(found), found == wanted)
    held = wanted.min <= found and (wanted.max is None or found <= wanted.max)
    limit = f"at least {wanted.min}" if wanted.max is None else f"{wanted.min} to {wanted.max}"
    return Check(name, limit, str(found), held)


def _latencies(expect: Expectations, summary: Mapping[str, Any]) -> Iterator[Check]:
    for name in LATENCIES:
        bounds: LatencyBounds | None = getattr(expect, name)
        if bounds is None:
            continue
        for figure, bound in bounds.model_dump(exclude_none=True).items():
            found = summary[name][figure]
            yield Check(
                name=f"{name}.{figure}",
                expected=f"at most {bound:g} s",
                found="no value" if found is None else f"{found:g} s",
                held=found is not None and found <= bound,
                objective=True,
            )
