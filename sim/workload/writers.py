"""Trace writers: arrivals into each format that the readers know."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

from sim.scenario.workload_models import TraceFormat
from sim.workload.arrival import Arrival

AZURE_ORIGIN = datetime(2024, 1, 1, 9, 0, 0)
"""Wall time of 0 ns in azure traces (naive, as in the public files)."""
MOONCAKE_PAGE = 512
"""Prompt tokens that one prefix hash of a mooncake trace stands for."""


def write_trace(form: TraceFormat, path: str | Path, arrivals: Iterable[Arrival]) -> None:
    """Write arrivals (in order of time); times are rounded down to what the format can say.

    azure: 100 ns; burstgpt: s; mooncake: ms; vidur and jsonl: ns.
    """
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        file.writelines(_LINES[form](iter(arrivals)))


def _azure(arrivals: Iterator[Arrival]) -> Iterator[str]:
    yield "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    for arrival in arrivals:
        seconds, rest = divmod(arrival.time_ns, 10**9)
        clock = AZURE_ORIGIN + timedelta(seconds=seconds)
        yield f"{clock:%Y-%m-%d %H:%M:%S}.{rest // 100:07d},{arrival.prompt_tokens},{arrival.output_tokens}\r\n"


def _burstgpt(arrivals: Iterator[Arrival]) -> Iterator[str]:
    yield "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    for arrival in arrivals:
        prompt, output = arrival.prompt_tokens, arrival.output_tokens
        yield f"{arrival.time_ns // 10**9},ChatGPT,{prompt},{output},{prompt + output},Conversation log\n"


def _vidur(arrivals: Iterator[Arrival]) -> Iterator[str]:
    yield "arrived_at,num_prefill_tokens,num_decode_tokens\n"
    for arrival in arrivals:
        seconds, rest = divmod(arrival.time_ns, 10**9)
        yield f"{seconds}.{rest:09d},{arrival.prompt_tokens},{arrival.output_tokens}\n"


def _mooncake(arrivals: Iterator[Arrival]) -> Iterator[str]:
    """A prompt without prefix hashes gets fresh ones: it shares nothing."""
    fresh = 1_000_000_000
    for arrival in arrivals:
        hashes = list(arrival.prefix_hashes)
        if not hashes:
            pages = -(-arrival.prompt_tokens // MOONCAKE_PAGE)
            hashes = list(range(fresh, fresh + pages))
            fresh += pages
        item = {
            "timestamp": arrival.time_ns // 10**6,
            "input_length": arrival.prompt_tokens,
            "output_length": arrival.output_tokens,
            "hash_ids": hashes,
        }
        yield json.dumps(item) + "\n"


def _jsonl(arrivals: Iterator[Arrival]) -> Iterator[str]:
    for arrival in arrivals:
        item: dict[str, object] = {
            "arrival_time_ns": arrival.time_ns,
            "prompt_tokens": arrival.prompt_tokens,
            "output_tokens": arrival.output_tokens,
        }
        if arrival.prefix_hashes:
            item["hash_ids"] = list(arrival.prefix_hashes)
        yield json.dumps(item) + "\n"


_LINES: dict[TraceFormat, Callable[[Iterator[Arrival]], Iterator[str]]] = {
    "azure": _azure,
    "burstgpt": _burstgpt,
    "vidur": _vidur,
    "mooncake": _mooncake,
    "jsonl": _jsonl,
}
