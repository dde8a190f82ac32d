"""Moves that make a scenario smaller by one operation where leaving it out alone does not: several changes at once.

    merge   two requests become one that is as long as both, in a cache that is large enough for it
    fill    a request goes, and the others' prompts become as long as they can
    shift   an operation goes, and whatever came at its step or later comes earlier
    shrink  a request goes, and with it a slot, or the pages that it held
    delay   an operation goes, and a request with all that comes after it comes later: no need to keep the core busy

Each yields scenarios with one operation less, whatever becomes of the numbers: those are made smaller afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import combinations
from typing import Any, Final

Data = dict[str, Any]
"""A scenario, spelled out, as plain data."""
Kept = list[int]
"""Which requests are left."""

MOST: Final = 14
"""Requests up to which all pairs are tried; beyond, only neighbours."""
SHIFTS: Final = (1, 2, 3, 5, 8, 13)


def requests_of(data: Data) -> list[Data]:
    """The scripted requests."""
    return data["workload"]["arrivals"]["requests"]


def operations_of(data: Data) -> list[tuple[str, int]]:
    """Every operation as (list, index): requests in order, then faults."""
    requests = [("request", at) for at in range(len(requests_of(data)))]
    return requests + [("fault", at) for at in range(len(data["faults"]))]


def step_of(data: Data, operation: tuple[str, int]) -> int:
    """The step before which an operation happens."""
    kind, at = operation
    return requests_of(data)[at]["at_step"] if kind == "request" else data["faults"][at]["at_step"]


def first_id_of(data: Data) -> int:
    """The id of the first request."""
    return data["workload"]["first_request_id"]


def leave_out(data: Data, gone: list[int], *, first_id: int | None = None) -> Kept:
    """Take operations out of the data, in place; what names a request follows its new id, or goes with it.

    The first request that is left gets `first_id`; None: the id that the first has now.
    """
    names, old_first = operations_of(data), first_id_of(data)
    new_first = old_first if first_id is None else first_id
    left_out = {names[at] for at in gone}
    kept = [at for at in range(len(requests_of(data))) if ("request", at) not in left_out]
    renumbered = {old_first + old: new_first + new for new, old in enumerate(kept)}
    data["workload"]["arrivals"]["requests"] = [requests_of(data)[at] for at in kept]
    data["workload"]["first_request_id"] = new_first
    faults: list[Data] = []
    for at, fault in enumerate(data["faults"]):
        if ("fault", at) in left_out or ("request" in fault and fault["request"] not in renumbered):
            continue
        faults.append({**fault, "request": renumbered[fault["request"]]} if "request" in fault else fault)
    data["faults"] = faults
    return kept


def bold_moves(data: Data, *, sizes: bool) -> Iterator[tuple[Data, Kept]]:
    """Every move; `sizes`: the core's and the cache's sizes may change."""
    yield from _merged(data, sizes=sizes)
    yield from _filled(data)
    yield from _shifted(data)
    if sizes:
        yield from _shrunk(data)
    yield from _delayed(data)


def _merged(data: Data, *, sizes: bool) -> Iterator[tuple[Data, Kept]]:
    count = len(requests_of(data))
    for first, second in combinations(range(count), 2):
        if count > MOST and second != first + 1:
            continue
        for both in (("prompt_tokens",), ("output_tokens",), ("prompt_tokens", "output_tokens")):
            changed = deepcopy(data)
            one, two = requests_of(changed)[first], requests_of(changed)[second]
            for key in ("prompt_tokens", "output_tokens"):
                one[key] = one[key] + two[key] if key in both else max(one[key], two[key])
            for fault in changed["faults"]:
                if fault.get("request") == first_id_of(data) + second:
                    fault["request"] = first_id_of(data) + first
            if sizes:
                _make_room(changed["cache"], one["prompt_tokens"] + one["output_tokens"] - 1)
            else:
                _cut_to(one, _longest(changed["cache"]))
            yield changed, leave_out(changed, [second])


def _longest(cache: Data) -> int:
    """The longest sequence that fits, in tokens with K/V."""
    return min(cache["max_sequence_length"], (cache["num_pages"] - 1) * cache["page_size"])


def _cut_to(request: Data, length: int) -> None:
    """Let a request have no more than `length` tokens with K/V, the prompt first."""
    request["prompt_tokens"] = min(request["prompt_tokens"], length)
    request["output_tokens"] = min(request["output_tokens"], length - request["prompt_tokens"] + 1)


def _make_room(cache: Data, length: int) -> None:
    """Let a sequence of that length fit."""
    cache["max_sequence_length"] = max(cache["max_sequence_length"], length)
    cache["num_pages"] = max(cache["num_pages"], 1 - (-length // cache["page_size"]))


def _filled(data: Data) -> Iterator[tuple[Data, Kept]]:
    longest = _longest(data["cache"])
    for at in range(len(requests_of(data)) if len(requests_of(data)) > 1 else 0):
        changed = deepcopy(data)
        for request in requests_of(changed):
            request["prompt_tokens"] = max(request["prompt_tokens"], longest - request["output_tokens"] + 1)
        yield changed, leave_out(changed, [at])


def _shifted(data: Data) -> Iterator[tuple[Data, Kept]]:
    for at, operation in enumerate(operations_of(data)):
        since = step_of(data, operation)
        latest = max(step_of(data, other) for other in operations_of(data))
        for by in SHIFTS:
            if by > max(latest - since, 1):
                break
            changed = deepcopy(data)
            for other in (*requests_of(changed), *changed["faults"]):
                if other["at_step"] > since:
                    other["at_step"] = max(since, other["at_step"] - by)
            kept = leave_out(changed, [at])
            if kept:
                yield changed, kept


def _shrunk(data: Data) -> Iterator[tuple[Data, Kept]]:
    core, cache = data["core"], data["cache"]
    for at, request in enumerate(requests_of(data)):
        pages = -(-(request["prompt_tokens"] + request["output_tokens"] - 1) // cache["page_size"])
        for slots, fewer in ((1, 0), (0, 1), (0, pages), (1, 1), (1, pages)):
            if core["batch_size"] <= slots or cache["num_pages"] - fewer < 2:
                continue
            changed = deepcopy(data)
            changed["core"]["batch_size"] -= slots
            changed["cache"]["num_pages"] -= fewer
            kept = leave_out(changed, [at])
            if kept:
                yield changed, kept


def _delayed(data: Data) -> Iterator[tuple[Data, Kept]]:
    count = len(requests_of(data))
    for at in range(len(operations_of(data))):
        for first in range(1, count):
            if first == at or (count > MOST and first != at + 1):
                continue
            since = requests_of(data)[first]["at_step"]
            for by in SHIFTS:
                changed = deepcopy(data)
                for later in (*requests_of(changed)[first:], *(f for f in changed["faults"] if f["at_step"] >= since)):
                    later["at_step"] += by
                kept = leave_out(changed, [at])
                if kept:
                    yield changed, kept
