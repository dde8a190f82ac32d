"""Draws whole scenarios from a number: sizes, policies, requests, cancels, failed steps, disturbances, and extremes.

Half of the draws are uniform; the other half are swarms: some kinds of operation are off, and the rest have weights of
their own, so that rare combinations (nothing but cancels and long prompts, say) come up often (Groce et al., "Swarm
Testing", ISSTA 2012). Everything comes out spelled out: a scenario needs no generator to be run again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from sim.scenario import Scenario

T = TypeVar("T")
PAGE_SIZES: Final = (1, 2, 3, 4, 5, 8)
CHUNKS: Final = (1, 2, 3, 4, 5, 7, 8, 16)
MIXES: Final = ("mixed", "prefill_first", "decode_first")
DISTURBANCES: Final = {"fork": 3, "poll": 8, "resubmit": 6, "stall": 8}
"""What must make no difference, and how often it happens at most."""
KINDS: Final = (
    *("burst", "trickle", "long_prompt", "long_output", "one_token", "eos", "cancel", "fail", "too_long"),
    *DISTURBANCES,
)
"""Kinds of operation, each of which a swarm may leave out."""

FULL_EVERY: Final = (32,) * 11 + (4,) * 4 + (1,)
"""Steps from one look at the core's whole state to the next: a look costs more than a step of these sizes."""

_HEADS: Final = {"layers": 2, "kv_heads": 2, "head_dim": 8}
_READER: Final = {"kind": "reader", "lanes": 2}
DEVICE_SETUPS: Final[tuple[dict[str, dict[str, Any]], ...]] = (
    {
        "core": {"batch_size": 4, "prefill_chunk": 5},
        "cache": {"page_size": 4, "num_pages": 12, "max_sequence_length": 22, "dtype": "bfloat16", **_HEADS},
        "model": _READER,
    },
    {
        "core": {"batch_size": 4, "prefill_chunk": 32},
        "cache": {"page_size": 1, "num_pages": 260, "max_sequence_length": 96, "dtype": "bfloat16", **_HEADS},
        "model": _READER,
    },
    {
        "core": {"batch_size": 4, "prefill_chunk": 6},
        "cache": {
            **{"page_size": 4, "num_pages": 16, "max_sequence_length": 34, "dtype": "bfloat16", "quantize": True},
            **{"layers": 1, "kv_heads": 3, "head_dim": 8},
        },
        "model": {"kind": "reader"},
    },
    {
        "core": {"batch_size": 3, "prefill_chunk": 5},
        "cache": {"page_size": 4, "num_pages": 9, "max_sequence_length": 28, "dtype": "bfloat16", **_HEADS},
        "model": {"kind": "tiny", "vocab_size": 32},
        "workload": {"end_by": "eos", "temperature": [0.0, 0.7, 2.0], "top_p": [1.0, 0.8]},
    },
    {
        "core": {"batch_size": 4, "prefill_chunk": 6},
        "cache": {"page_size": 4, "num_pages": 16, "max_sequence_length": 38, "dtype": "bfloat16", **_HEADS},
        "backend": {"road": "rows"},
        "model": _READER,
    },
    {
        "core": {"batch_size": 2, "prefill_chunk": 4},
        "cache": {"page_size": 2, "num_pages": 9, "max_sequence_length": 12, "dtype": "float32", **_HEADS},
        "model": {"kind": "echo"},
    },
    {
        "core": {"batch_size": 3, "prefill_chunk": 4},
        "cache": {
            **{"page_size": 2, "num_pages": 9, "max_sequence_length": 14, "dtype": "float32", "layout": "pages_first"},
            **{"layers": 1, "kv_heads": 2, "head_dim": 8},
        },
        "model": {"kind": "reader"},
    },
)
"""What runs on a device: every new shape, dtype, model or road compiles anew, so there are few of them."""
SETUP_FOR: Final = 2
"""Scenarios in a row with one of them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a drawn scenario may be."""

    max_requests: int = 24
    max_pages: int = 24
    max_slots: int = 5
    max_length: int = 40
    """Of a sequence, in tokens."""


DEFAULT_LIMITS: Final = Limits()


class Source(Protocol):
    """Where choices come from: Python's generator, or the bytes of a tape."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...

    def randint(self, a: int, b: int) -> int:
        """A whole number from a to b."""
        ...

    def choice(self, seq: Sequence[T]) -> T:
        """One of them."""
        ...


def draw(seed: int, number: int, *, backend: str = "none", limits: Limits = DEFAULT_LIMITS) -> Scenario:
    """Scenario `number` of the search with this seed; the same on every machine."""
    # Python's own generator: thirty small draws cost a tenth of NumPy's.
    source, name = random.Random(f"{seed}:{number}"), f"fuzz-{seed}-{number}"
    if backend == "none":
        return scenario_from(source, name, limits=limits)
    setup = DEVICE_SETUPS[number // SETUP_FOR % len(DEVICE_SETUPS)]
    return _scenario(source, name, {**setup, "backend": {"kind": backend, **setup.get("backend", {})}}, limits)


def scenario_from(source: Source, name: str, *, limits: Limits = DEFAULT_LIMITS) -> Scenario:
    """A scenario that is planned only, drawn from any source of choices."""
    sizes = _host_sizes(source, limits)
    core = {key: sizes.pop(key) for key in ("batch_size", "prefill_chunk")}
    return _scenario(source, name, {"core": core, "cache": sizes, "backend": {"kind": "none"}}, limits)


def _scenario(source: Source, name: str, setup: dict[str, dict[str, Any]], limits: Limits) -> Scenario:
    """The rest of a scenario whose sizes are known."""
    weights = _weights(source)
    if setup.get("model", {}).get("kind") == "tiny":
        weights["eos"] = 0.0  # It draws its own.
    requests = _requests(source, weights, {**setup["core"], **setup["cache"]}, limits)
    policy = {
        "lag": source.choice((0, 0, 1, 2)),
        "mix": source.choice(MIXES),
        "max_decode_wait": source.choice((0, 1, 4)),
        "max_prefill_wait": source.choice((0, 1, 4)),
    }
    return Scenario.model_validate(
        {
            **setup,
            "name": name,
            "seed": source.randint(0, 2**31 - 1),
            "core": {**setup["core"], **policy},
            "workload": {**setup.get("workload", {}), "arrivals": {"kind": "script", "requests": requests}},
            "cost": {"kind": "fixed", "step_ns": 1000},
            "faults": _faults(source, weights, requests),
            "invariants": {"full_every": source.choice(FULL_EVERY)},
            "expect": {"violations": 0, "rejected": {"min": 0}},
        }
    )


def _host_sizes(source: Source, limits: Limits) -> dict[str, int]:
    page_size = source.choice(PAGE_SIZES)
    if source.random() < 0.02:
        return _wide_sizes(source)
    extreme = source.random() < 0.2
    num_pages = source.choice((2, 3, limits.max_pages)) if extreme else source.randint(3, limits.max_pages)
    room = (num_pages - 1) * page_size
    longest = min(limits.max_length, room + source.choice((0, 0, 1, page_size)))
    return {
        "page_size": page_size,
        "num_pages": num_pages,
        "max_sequence_length": source.randint(max(1, longest // 2), max(1, longest)),
        "batch_size": 1 if extreme else source.randint(1, limits.max_slots),
        "prefill_chunk": source.choice(CHUNKS),
    }


def _wide_sizes(source: Source) -> dict[str, int]:
    """More pages than a byte counts, so small that all of them come round."""
    return {
        "page_size": 1,
        "num_pages": source.randint(257, 300),
        "max_sequence_length": 40,
        "batch_size": 8,
        "prefill_chunk": 16,
    }


def _weights(source: Source) -> dict[str, float]:
    """How likely each kind of operation is; 0: it is off in this scenario."""
    if source.random() < 0.5:
        return dict.fromkeys(KINDS, 1.0)
    return {kind: source.choice((0.0, 0.0, 0.5, 1.0, 4.0)) for kind in KINDS}


def _requests(source: Source, weights: dict[str, float], sizes: dict[str, int], limits: Limits) -> list[dict[str, Any]]:
    longest = min(sizes["max_sequence_length"], (sizes["num_pages"] - 1) * sizes["page_size"])
    requests: list[dict[str, Any]] = []
    step = 0
    gap = source.choice((0, 1, 3, 8))
    for _ in range(source.randint(1, limits.max_requests)):
        if source.random() * (weights["burst"] + weights["trickle"] + 0.1) < weights["trickle"]:
            step += source.randint(0, gap)
        prompt, output = _lengths(source, weights, longest, sizes["page_size"], sizes["prefill_chunk"])
        request: dict[str, Any] = {"at_step": step, "prompt_tokens": prompt, "output_tokens": output}
        if output > 1 and source.random() < 0.3 * weights["eos"]:
            request["eos_after"] = source.randint(1, output)
        requests.append(request)
    return requests


def _lengths(source: Source, weights: dict[str, float], longest: int, page_size: int, chunk: int) -> tuple[int, int]:
    if source.random() < 0.04 * weights["too_long"]:
        return source.choice(((0, 1), (longest + 1, 1), (1, 0), (longest, longest)))
    edge = source.choice((page_size, chunk, 2 * page_size)) + source.choice((-1, 0, 1))
    short = source.randint(1, max(1, longest // 4))
    long = source.randint(1, longest)
    prompt = _weighted(source, (short, long, edge), (1.0, weights["long_prompt"], 1.0))
    prompt = min(max(1, prompt), longest)
    room = longest - prompt + 1
    usual = source.randint(1, max(1, room // 3))
    return prompt, _weighted(source, (usual, room, 1), (1.0, weights["long_output"], 0.3 * weights["one_token"]))


def _weighted(source: Source, values: tuple[int, ...], weights: tuple[float, ...]) -> int:
    target = source.random() * sum(weights)
    for value, weight in zip(values, weights, strict=True):
        target -= weight
        if target < 0:
            return value
    return values[0]


def _faults(source: Source, weights: dict[str, float], requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    horizon = requests[-1]["at_step"] + 6 * len(requests)
    faults = _cancels(source, weights["cancel"], requests, horizon)
    if weights["fail"] and source.random() < 0.5:
        for _ in range(source.randint(0, 4)):
            faults.append({"kind": "fail", "at_step": source.randint(0, horizon)})
    for kind, most in DISTURBANCES.items():
        # Off in most runs; where it is on, it strikes now and then.
        if source.random() < 0.15 * weights[kind]:
            steps = sorted(source.randint(0, horizon) for _ in range(source.randint(1, most)))
            faults += [_disturbance(source, kind, step, len(requests)) for step in steps]
    return faults


def _cancels(source: Source, weight: float, requests: list[dict[str, Any]], horizon: int) -> list[dict[str, Any]]:
    """Cancels soon after the request came or at any time, even twice or before it comes."""
    share = source.choice((0.1, 0.1, 0.3, 0.8)) * min(weight, 1.0)
    cancels: list[dict[str, Any]] = []
    for number, request in enumerate(requests):
        if source.random() >= share:
            continue
        came = request["at_step"]
        at = came + source.randint(0, source.choice((2, 10, max(2, horizon - came))))
        if source.random() < 0.05:
            at = source.randint(0, came)
        cancels.append({"kind": "cancel", "request": number, "at_step": at})
        if source.random() < 0.05:
            cancels.append({"kind": "cancel", "request": number, "at_step": at + source.randint(0, 3)})
    return cancels


def _disturbance(source: Source, kind: str, step: int, num_requests: int) -> dict[str, Any]:
    disturbance: dict[str, Any] = {"kind": kind, "at_step": step}
    if kind == "resubmit":
        disturbance["request"] = source.randint(0, num_requests - 1)
    return disturbance
