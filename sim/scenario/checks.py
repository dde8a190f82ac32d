"""Contradictions between the keys of a scenario, each with the key that should change."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from invariants.catalogue import CATALOGUE
from paged_attention.decoder_spec import EXACT_DTYPES, MAX_POSITIONS, MAX_VOCAB
from sim.scenario.base import MAX_COUNT
from sim.scenario.memory import GIB, host_bytes, physical_memory
from sim.scenario.workload_models import ConcurrentArrivals, ScriptedArrivals, StagedArrivals, TraceArrivals, shortest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sim.scenario.models import Scenario
    from sim.scenario.workload_models import WorkloadSettings

Problem = tuple[tuple[str | int, ...], str]
"""Key path, and what is wrong there."""


def contradictions(scenario: Scenario) -> list[Problem]:
    """Every contradiction between keys that are valid one by one."""
    checks = (_devices, _model, _workload, _lengths, _prompts_fit, _faults, _expectations, _memory)
    return [problem for check in checks for problem in check(scenario)]


def _devices(scenario: Scenario) -> Iterator[Problem]:
    cache, backend = scenario.cache, scenario.backend
    sizes = {"heads": "kv_heads", "pages": "num_pages", "page": "page_size", "head_dim": "head_dim"}
    for axis, devices in backend.mesh.items():
        key = sizes[axis]
        size = getattr(cache, key)
        if size % devices:
            yield ("backend", "mesh", axis), f"{devices} devices do not divide cache.{key} {size}"
    if backend.mesh and backend.kind in {"none", "numpy"}:
        yield ("backend", "mesh"), f"the backend '{backend.kind}' has no devices to shard over"
    if backend.platform != "cpu" and backend.kind in {"none", "numpy"}:
        yield ("backend", "platform"), f"the backend '{backend.kind}' runs on the cpu only"
    if backend.writer is not None and backend.kind in {"none", "numpy"}:
        what = "takes no write kernel; choose backend.kind jax or one of your own"
        yield ("backend", "writer"), f"the backend '{backend.kind}' {what}"


def _model(scenario: Scenario) -> Iterator[Problem]:
    if scenario.model.lanes > scenario.cache.head_dim:
        yield ("model", "lanes"), f"{scenario.model.lanes} lanes, but cache.head_dim is {scenario.cache.head_dim}"
    if scenario.model.kind == "tiny":
        yield from _decoder(scenario)
    elif scenario.model.query_heads is not None:
        yield ("model", "query_heads"), f"the model '{scenario.model.kind}' has none; only kind tiny has"


def _decoder(scenario: Scenario) -> Iterator[Problem]:
    """What the tiny decoder cannot do, or not exactly (paged_attention.decoder_spec)."""
    cache, model, arrivals = scenario.cache, scenario.model, scenario.workload.arrivals
    if scenario.backend.kind == "none":
        yield ("backend", "kind"), "none computes nothing, so it runs no tiny decoder; choose numpy or jax"
    if cache.quantize:
        yield ("cache", "quantize"), "the tiny decoder's K and V are compared bit for bit; quantised pages lose some"
    elif cache.dtype not in EXACT_DTYPES:
        known = ", ".join(EXACT_DTYPES)
        yield ("cache", "dtype"), f"{cache.dtype} does not hold the tiny decoder's K and V without loss; {known} do"
    if cache.head_dim % 2:
        yield ("cache", "head_dim"), f"the tiny decoder turns pairs of lanes: {cache.head_dim} is odd"
    if cache.max_sequence_length > MAX_POSITIONS:
        yield ("cache", "max_sequence_length"), f"the tiny decoder is exact up to {MAX_POSITIONS} positions"
    if model.query_heads is not None and model.query_heads % cache.kv_heads:
        yield ("model", "query_heads"), f"{model.query_heads} cannot share cache.kv_heads {cache.kv_heads} evenly"
    if not 4 <= model.vocab_size <= MAX_VOCAB:
        yield (
            ("model", "vocab_size"),
            f"the tiny decoder knows 4 to {MAX_VOCAB} tokens, found {model.vocab_size}; set it to 64, say",
        )
    if isinstance(arrivals, ScriptedArrivals):
        for index, request in enumerate(arrivals.requests):
            if request.eos_after is not None:
                key = ("workload", "arrivals", "requests", index, "eos_after")
                yield key, "the tiny decoder draws its EOS itself; see workload.end_by"


def _workload(scenario: Scenario) -> Iterator[Problem]:
    workload = scenario.workload
    if isinstance(workload.arrivals, ScriptedArrivals):
        yield from _script(workload, workload.arrivals)
    elif not isinstance(workload.arrivals, TraceArrivals):
        for key in ("prompt_tokens", "output_tokens"):
            if getattr(workload, key) is None:
                yield (
                    ("workload", key),
                    f"missing; only arrivals of kind trace bring lengths, not {workload.arrivals.kind}",
                )
        if workload.num_requests is None and not isinstance(workload.arrivals, StagedArrivals):
            yield ("workload", "num_requests"), f"missing; arrivals of kind {workload.arrivals.kind} never end"
    if isinstance(workload.arrivals, StagedArrivals) and all(s.request_rate == 0 for s in workload.arrivals.stages):
        yield ("workload", "arrivals", "stages"), "every request_rate is 0: nothing would arrive"


def _script(workload: WorkloadSettings, arrivals: ScriptedArrivals) -> Iterator[Problem]:
    for key in ("prompt_tokens", "output_tokens", "num_requests"):
        if getattr(workload, key) is not None:
            yield ("workload", key), "arrivals of kind script spell out every request; leave this key out"
    steps = [request.at_step for request in arrivals.requests]
    for index, (before, step) in enumerate(pairwise(steps), 1):
        if step < before:
            yield (
                ("workload", "arrivals", "requests", index, "at_step"),
                f"{step} comes after {before}; put them in order",
            )


def _lengths(scenario: Scenario) -> Iterator[Problem]:
    for key in ("prompt_tokens", "output_tokens"):
        tokens = getattr(scenario.workload, key)
        low, high = getattr(tokens, "min", None), getattr(tokens, "max", None)
        if low is not None and high is not None and low > high:
            yield ("workload", key, "min"), f"min {low} is more than max {high}"


def _prompts_fit(scenario: Scenario) -> Iterator[Problem]:
    workload, cache = scenario.workload, scenario.cache
    if workload.prompt_tokens is None or workload.too_long == "clip" or scenario.expect.rejected is not None:
        return
    low = shortest(workload.prompt_tokens)
    room = (cache.num_pages - 1) * cache.page_size
    meant = "set workload.too_long: clip, or say with expect.rejected that this is meant"
    if low > cache.max_sequence_length:
        limit = f"longer than cache.max_sequence_length {cache.max_sequence_length}"
    elif low > room:
        limit = f"more than the {room} tokens of all {cache.num_pages - 1} usable pages"
    else:
        return
    yield ("workload", "prompt_tokens"), f"every prompt ({low} tokens or more) is {limit}, so all are rejected; {meant}"


def _faults(scenario: Scenario) -> Iterator[Problem]:
    arrivals = scenario.workload.arrivals
    scripted = isinstance(arrivals, ScriptedArrivals)
    count = len(arrivals.requests) if scripted else scenario.workload.num_requests
    first = scenario.workload.first_request_id
    ids = range(first, MAX_COUNT + 1 if count is None else first + count)
    for index, fault in enumerate(scenario.faults):
        if fault.kind == "cancel_storm":
            if scripted or isinstance(arrivals, ConcurrentArrivals):
                yield ("faults", index), f"a cancel_storm needs arrival times, and {arrivals.kind} arrivals have none"
            continue
        if fault.kind in {"cancel", "fail"} and (fault.at_step is None) == (getattr(fault, "at_seconds", None) is None):
            yield ("faults", index), "give exactly one of at_step and at_seconds"
        request: int | None = getattr(fault, "request", None)
        if request is not None and request not in ids:
            last = "and up" if count is None else f"to {ids[-1]}"
            yield ("faults", index, "request"), f"there is no request {request}: they are {first} {last}"


def _expectations(scenario: Scenario) -> Iterator[Problem]:
    expect, only = scenario.expect, scenario.invariants.only
    if expect.violated and expect.violations == 0:
        yield ("expect", "violations"), f"0 violations, but expect.violated names {', '.join(expect.violated)}"
    for index, name in enumerate(expect.violated):
        if only is not None and name not in only:
            yield ("expect", "violated", index), f"{name} is not among invariants.only, so it is never checked"
    for key, names in (("only", only or ()), ("violated", expect.violated)):
        deep = [name for name in names if CATALOGUE[name].mode == "deep"]
        if deep and not scenario.invariants.deep:
            where = ("invariants", "only") if key == "only" else ("expect", "violated")
            yield where, f"{', '.join(deep)} takes more runs than one; set invariants.deep: true, or run with --deep"
    for key in ("violations", "finished", "cancelled", "rejected", "preemptions", "steps"):
        bound = getattr(expect, key)
        low, high = getattr(bound, "min", None), getattr(bound, "max", None)
        if low is not None and high is not None and low > high:
            yield ("expect", key, "min"), f"min {low} is more than max {high}"


def _memory(scenario: Scenario) -> Iterator[Problem]:
    needed, present = host_bytes(scenario), physical_memory()
    total = sum(needed.values())
    if present is not None and total > present:
        text = f"the run needs {total / GIB:.1f} GiB of memory, but this machine has {present / GIB:.1f} GiB"
        yield max(needed, key=lambda key: needed[key]), text
