"""A small valid scenario as plain data, and ways to change it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from sim.scenario import Scenario

SMALL: dict[str, Any] = {
    "schema": "kvproof/v1",
    "name": "small",
    "seed": 5,
    "core": {"batch_size": 4, "prefill_chunk": 8},
    "cache": {"page_size": 4, "num_pages": 33, "max_sequence_length": 64, "kv_heads": 2},
    "workload": {
        "arrivals": {"kind": "poisson", "request_rate": 10.0},
        "prompt_tokens": {"kind": "uniform", "min": 1, "max": 20},
        "output_tokens": {"kind": "uniform", "min": 1, "max": 10},
        "num_requests": 50,
    },
    "cost": {"kind": "fixed", "step_ns": 1000},
}


def changed(**keys: Any) -> dict[str, Any]:
    """SMALL with other values; `workload__num_requests=3` reaches inside."""
    data = deepcopy(SMALL)
    for path, value in keys.items():
        *parents, last = path.split("__")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return data


def small(**keys: Any) -> Scenario:
    """The scenario of `changed`."""
    return Scenario.model_validate(changed(**keys))


def ids_from(first: int, scenario: Scenario) -> Scenario:
    """The same scenario with requests numbered from `first` on, and its faults with them."""
    data = scenario.model_dump(by_alias=True)
    by = first - data["workload"]["first_request_id"]
    data["workload"]["first_request_id"] = first
    data["faults"] = [{**f, "request": f["request"] + by} if "request" in f else f for f in data["faults"]]
    return Scenario.model_validate(data)
