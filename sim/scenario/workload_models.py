"""The workload section: when requests arrive, and how long their prompts and outputs are."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag

from sim.scenario.base import WHOLE, Count, Index, Rate, Section

MAX_FIRST_ID = 1_000_000
"""A run keeps a row for every id from 0 on, of some 100 bytes."""

TraceFormat = Literal["azure", "mooncake", "burstgpt", "vidur", "jsonl"]


class ConstantArrivals(Section):
    """One request every 1 / request_rate seconds."""

    kind: Literal["constant"] = Field(description="Evenly spaced arrivals.")
    request_rate: Rate = Field(description="Requests per second.")


class PoissonArrivals(Section):
    """Exponential gaps between requests."""

    kind: Literal["poisson"] = Field(description="Exponential gaps between arrivals.")
    request_rate: Rate = Field(description="Mean requests per second.")


class GammaArrivals(Section):
    """Gamma gaps between requests: shape `burstiness`, mean 1 / request_rate."""

    kind: Literal["gamma"] = Field(description="Gamma gaps between arrivals.")
    request_rate: Rate = Field(description="Mean requests per second.")
    burstiness: float = Field(
        default=1.0, gt=0.0, le=1e6, description="Shape of the gaps: below 1 bursty, 1 Poisson, above 1 regular."
    )


class Stage(Section):
    """A span of time with one rate."""

    request_rate: Annotated[float, Field(ge=0.0, le=1e9)] = Field(description="Mean requests per second; 0: a pause.")
    duration_seconds: Annotated[float, Field(gt=0.0, le=1e9)] = Field(description="How long the stage lasts, in s.")


class StagedArrivals(Section):
    """Poisson arrivals whose rate changes from stage to stage; nothing arrives after the last one."""

    kind: Literal["stages"] = Field(description="Poisson arrivals, one rate per stage.")
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = Field(min_length=1, description="In order of time.")


class ConcurrentArrivals(Section):
    """A closed loop: `concurrency` requests at once, the next arrives when one ends."""

    kind: Literal["concurrent"] = Field(description="Closed loop.")
    concurrency: Count = Field(description="Unfinished requests at any time.")


class TraceArrivals(Section):
    """Arrivals (and lengths, where the workload gives none) read from a trace file."""

    kind: Literal["trace"] = Field(description="Replay of a trace file.")
    format: TraceFormat = Field(description="Format of the file.")
    path: str = Field(min_length=1, description="The file; a relative path starts at the scenario file's folder.")
    time_scale: float = Field(
        default=1.0, ge=0.0, le=1e9, description="Factor on every arrival time: 0.5 is twice as fast."
    )
    limit: Count | None = Field(default=None, description="Read at most this many requests.")


class ScriptedRequest(Section):
    """One request, spelled out."""

    at_step: Index = Field(default=0, description="Submitted before this step is planned, counted from 0.")
    prompt_tokens: Index = Field(description="Tokens of its prompt.")
    output_tokens: Index = Field(description="Its max_tokens.")
    eos_after: Count | None = Field(default=None, description="Its n-th token is an EOS; null: none is.")


class ScriptedArrivals(Section):
    """Every request spelled out, in order of submission, placed by step and not by time.

    Where nothing is left to run before a request's step, it comes at once: no step passes idly.
    """

    kind: Literal["script"] = Field(description="Every request spelled out.")
    requests: Annotated[tuple[ScriptedRequest, ...], Field(strict=False)] = Field(
        min_length=1, description="In order of submission; at_step never falls."
    )


Arrivals = Annotated[
    ConstantArrivals
    | PoissonArrivals
    | GammaArrivals
    | StagedArrivals
    | ConcurrentArrivals
    | TraceArrivals
    | ScriptedArrivals,
    Field(discriminator="kind"),
]


class FixedTokens(Section):
    """The same length for every request."""

    kind: Literal["fixed"] = Field(description="One length for all.")
    value: Count = Field(description="Tokens.")


class UniformTokens(Section):
    """Every length from min to max is equally likely."""

    kind: Literal["uniform"] = Field(description="Whole numbers, equally likely.")
    min: Count = Field(description="Shortest, in tokens.")
    max: Count = Field(description="Longest, in tokens.")


class LognormalTokens(Section):
    """Lognormal lengths, rounded and then clipped to min..max."""

    kind: Literal["lognormal"] = Field(description="Lognormal, rounded, clipped.")
    mean: float = Field(gt=0.0, le=1e9, description="Mean of the distribution before clipping, in tokens.")
    sigma: float = Field(ge=0.0, le=10.0, description="Standard deviation of the logarithm.")
    min: Count = Field(default=1, description="Shorter ones become this, in tokens.")
    max: Count | None = Field(default=None, description="Longer ones become this, in tokens.")


class ZipfTokens(Section):
    """Length min + k - 1 with probability proportional to k ** -exponent, up to max."""

    kind: Literal["zipf"] = Field(description="Zipf over min..max.")
    exponent: float = Field(default=1.0, ge=0.0, le=20.0, description="0: uniform; the larger, the shorter.")
    min: Count = Field(description="Shortest and most likely, in tokens.")
    max: Annotated[int, Field(ge=1, le=10_000_000), WHOLE] = Field(description="Longest, in tokens.")


class EmpiricalTokens(Section):
    """Lengths of randomly drawn rows of a file; prompt and output from one file come from the same row."""

    kind: Literal["empirical"] = Field(description="Drawn from the rows of a file, with replacement.")
    format: TraceFormat = Field(description="Format of the file; arrival times may be missing from vidur and jsonl.")
    path: str = Field(min_length=1, description="The file; a relative path starts at the scenario file's folder.")
    min: Count = Field(default=1, description="Shorter ones become this, in tokens.")
    max: Count | None = Field(default=None, description="Longer ones become this, in tokens.")


Tokens = Annotated[
    FixedTokens | UniformTokens | LognormalTokens | ZipfTokens | EmpiricalTokens, Field(discriminator="kind")
]


def _one_or_some(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return "some"
    return "one" if isinstance(value, int | float) and not isinstance(value, bool) else None


T = TypeVar("T")
OneOrSome = Annotated[
    Annotated[T, Tag("one")] | Annotated[tuple[T, ...], Field(strict=False, min_length=1), Tag("some")],
    Discriminator(
        _one_or_some,
        custom_error_type="one_or_some",
        custom_error_message="expected a number or a list of numbers",
    ),
]
Temperature = Annotated[float, Field(ge=0.0, le=100.0)]
TopP = Annotated[float, Field(gt=0.0, le=1.0)]


class WorkloadSettings(Section):
    """Who asks for what, and when."""

    arrivals: Arrivals = Field(description="When requests arrive.")
    prompt_tokens: Tokens | None = Field(default=None, description="Prompt lengths; null: those of the trace.")
    output_tokens: Tokens | None = Field(default=None, description="Output lengths; null: those of the trace.")
    num_requests: Count | None = Field(
        default=None, description="At most this many; null: as many as the trace or the stages give."
    )
    first_request_id: Annotated[int, Field(ge=0, le=MAX_FIRST_ID), WHOLE] = Field(
        default=0, description="Id of the first request; the others are numbered from there in order of arrival."
    )
    end_by: Literal["max_tokens", "eos"] = Field(
        default="max_tokens",
        description="What ends an output after its drawn length: the request's max_tokens, or an EOS token in its last "
        "place (max_tokens is then larger, and the host learns of the end `lag` steps late). The tiny decoder draws "
        "its EOS itself, within the drawn length; with max_tokens it never draws one.",
    )
    too_long: Literal["reject", "clip"] = Field(
        default="reject",
        description="Requests that can never fit: left to the core's refusal, or cut to what fits before submission.",
    )
    temperature: OneOrSome[Temperature] = Field(
        default=0.0, description="Sampling temperature, 0: greedy; or a list, from which each request draws one."
    )
    top_p: OneOrSome[TopP] = Field(
        default=1.0, description="Nucleus sampling threshold; or a list, from which each request draws one."
    )


def shortest(tokens: Tokens) -> int:
    """The shortest length, in tokens, that can be drawn."""
    return tokens.value if isinstance(tokens, FixedTokens) else tokens.min
