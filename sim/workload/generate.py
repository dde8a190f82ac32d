"""From a scenario to its workload."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from sim.scenario.models import Scenario
from sim.scenario.workload_models import ConcurrentArrivals, ScriptedArrivals, StagedArrivals, TraceArrivals
from sim.workload.arrival import Arrival, Workload
from sim.workload.lengths import lengths
from sim.workload.readers import read_trace
from sim.workload.rows import TraceError
from sim.workload.times import arrival_times


def generate(scenario: Scenario) -> Workload:
    """The arrivals of a scenario in order of time, streamed; TraceError: a trace is missing, corrupt or empty.

    With `too_long: clip` prompts and outputs are cut here to what the cache can hold; with `reject` they pass as they
    are, and the core refuses what can never fit.
    """
    settings = scenario.workload
    skipped: dict[str, int] = {}
    arrivals = islice(_relengthened(scenario, _timed(scenario, skipped)), settings.num_requests)
    if first := settings.first_request_id:
        arrivals = (arrival._replace(request=first + arrival.request) for arrival in arrivals)
    if settings.too_long == "clip":
        arrivals = _clipped(scenario, arrivals)
    if isinstance(settings.arrivals, ScriptedArrivals):
        scripted = settings.arrivals.requests
        return Workload(arrivals, at_steps=[request.at_step for request in scripted], total=len(scripted))
    if isinstance(settings.arrivals, TraceArrivals):
        arrivals = _never_empty(settings.arrivals.path, arrivals)
    closed_loop = settings.arrivals.concurrency if isinstance(settings.arrivals, ConcurrentArrivals) else None
    return Workload(arrivals, closed_loop, _total(scenario), skipped)


def _timed(scenario: Scenario, skipped: dict[str, int]) -> Iterator[Arrival]:
    """Arrivals with their times, numbered from 0; lengths are those of the trace, or 0."""
    arrivals = scenario.workload.arrivals
    if isinstance(arrivals, TraceArrivals):
        scale, limit = arrivals.time_scale, arrivals.limit
        yield from read_trace(arrivals.format, arrivals.path, time_scale=scale, limit=limit, skipped=skipped)
    elif isinstance(arrivals, ScriptedArrivals):
        for number, asked in enumerate(arrivals.requests):
            yield Arrival(0, number, asked.prompt_tokens, asked.output_tokens, eos_after=asked.eos_after or 0)
    elif isinstance(arrivals, ConcurrentArrivals):
        yield from (Arrival(0, request, 0, 0) for request in range(scenario.workload.num_requests or 0))
    else:
        for request, time_ns in enumerate(arrival_times(arrivals, scenario.seed)):
            yield Arrival(time_ns, request, 0, 0)


def _relengthened(scenario: Scenario, arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """Lengths drawn where the workload gives a distribution; a prompt of another length shares no prefix."""
    prompt, output = scenario.workload.prompt_tokens, scenario.workload.output_tokens
    if prompt is not None:
        drawn = lengths(prompt, scenario.seed, "prompt_tokens", 0)
        arrivals = (a._replace(prompt_tokens=n, prefix_hashes=()) for a, n in zip(arrivals, drawn, strict=False))
    if output is not None:
        drawn = lengths(output, scenario.seed, "output_tokens", 1)
        arrivals = (a._replace(output_tokens=n) for a, n in zip(arrivals, drawn, strict=False))
    return arrivals


def _clipped(scenario: Scenario, arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """Cut to what fits alone: prompt + output - 1 tokens have K/V, since the last token is never fed."""
    cache = scenario.cache
    room = min(cache.max_sequence_length, (cache.num_pages - 1) * cache.page_size)
    for arrival in arrivals:
        asked = (arrival.prompt_tokens, arrival.output_tokens)
        prompt = min(asked[0], room)
        output = min(asked[1], room - prompt + 1)
        if (prompt, output) == asked:
            yield arrival
        else:
            note = f"clipped from {asked[0]} + {asked[1]} to {prompt} + {output} tokens"
            yield arrival._replace(prompt_tokens=prompt, output_tokens=output, note=note)


def _never_empty(path: str, arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """The same arrivals, the first one read now: a trace that is wrong from the start fails before the run."""
    first = next(arrivals, None)
    if first is None:
        raise TraceError(f"{path}: there is no request in the trace")
    return chain((first,), arrivals)


def _total(scenario: Scenario) -> int | None:
    arrivals, count = scenario.workload.arrivals, scenario.workload.num_requests
    if isinstance(arrivals, TraceArrivals):
        return min((n for n in (count, arrivals.limit) if n is not None), default=None)
    return None if isinstance(arrivals, StagedArrivals) else count
