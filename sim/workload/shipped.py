"""The small traces of scenarios/traces: made up, in the shapes of public ones, one for each format.

`python -m sim.workload.shipped FOLDER` writes them again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from sim.scenario.workload_models import GammaArrivals, LognormalTokens, PoissonArrivals, TraceFormat
from sim.streams import stream
from sim.workload.arrival import Arrival
from sim.workload.lengths import lengths
from sim.workload.times import arrival_times
from sim.workload.writers import MOONCAKE_PAGE, write_trace

SEED = 2024


def write_shipped(folder: str | Path) -> None:
    """Write every shipped trace into an existing folder."""
    for name, (form, arrivals) in shipped_traces().items():
        write_trace(form, Path(folder) / name, arrivals)


def shipped_traces() -> dict[str, tuple[TraceFormat, Iterable[Arrival]]]:
    """File name to format and arrivals."""
    code = GammaArrivals(kind="gamma", request_rate=3.0, burstiness=0.2)
    chat = PoissonArrivals(kind="poisson", request_rate=5.0)
    sparse = PoissonArrivals(kind="poisson", request_rate=0.02)
    long_in, short_out = _lognormal(1500, 1.0, 7000), _lognormal(28, 0.8, 400)
    chat_in, chat_out = _lognormal(400, 0.9, 3000), _lognormal(120, 0.7, 800)
    return {
        "azure-small.csv": ("azure", _drawn("azure", code, long_in, short_out, 200)),
        "burstgpt-small.csv": ("burstgpt", _with_failures(_drawn("burstgpt", sparse, chat_in, chat_out, 100))),
        "vidur-small.csv": ("vidur", _drawn("vidur", chat, chat_in, chat_out, 200)),
        "mooncake-small.jsonl": ("mooncake", _conversations(60)),
        "timed-small.jsonl": ("jsonl", _drawn("jsonl", chat, chat_in, chat_out, 200)),
    }


def _lognormal(mean: float, sigma: float, longest: int) -> LognormalTokens:
    return LognormalTokens(kind="lognormal", mean=mean, sigma=sigma, min=4, max=longest)


def _seed(name: str) -> int:
    """A seed for each trace, so that no two share their draws."""
    return int(stream(SEED, name).integers(2**32))


def _drawn(
    name: str,
    arrivals: GammaArrivals | PoissonArrivals,
    prompt: LognormalTokens,
    output: LognormalTokens,
    count: int,
) -> Iterator[Arrival]:
    seed = _seed(name)
    times = islice(arrival_times(arrivals, seed), count)
    prompts, outputs = lengths(prompt, seed, "prompt_tokens", 0), lengths(output, seed, "output_tokens", 1)
    for request, (time_ns, asked, answered) in enumerate(zip(times, prompts, outputs, strict=False)):
        yield Arrival(time_ns, request, asked, answered)


def _with_failures(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """Every twentieth call failed and yielded nothing, as some do in the public trace."""
    for arrival in arrivals:
        yield arrival._replace(output_tokens=0) if arrival.request % 20 == 19 else arrival


def _conversations(count: int) -> Iterator[Arrival]:
    """Chats whose every turn repeats all that was said before: equal prefix hashes where whole pages are equal."""
    seed = _seed("mooncake")
    random = stream(seed, "conversations")
    arrivals = PoissonArrivals(kind="poisson", request_rate=1.0)
    said: list[tuple[tuple[int, ...], int]] = []
    fresh = 0
    asked = lengths(_lognormal(900, 0.9, 6000), seed, "prompt_tokens", 0)
    answered = lengths(_lognormal(120, 0.8, 600), seed, "output_tokens", 1)
    for request, time_ns in enumerate(islice(arrival_times(arrivals, seed), count)):
        hashes, before = (), 0
        if said and random.random() < 0.6:
            hashes, before = said.pop(int(random.integers(len(said))))
        prompt, output = before + next(asked), next(answered)
        pages, shared = -(-prompt // MOONCAKE_PAGE), before // MOONCAKE_PAGE
        hashes = (*hashes[:shared], *range(fresh, fresh + pages - shared))
        fresh += pages - shared
        said.append((hashes, prompt))
        yield Arrival(time_ns, request, prompt, output, hashes)


if __name__ == "__main__":
    write_shipped(sys.argv[1])
