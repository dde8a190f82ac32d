"""The scenario: one frozen value that says everything about a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from invariants.catalogue import CATALOGUE
from sim.scenario.base import (
    MAX_COUNT,
    MAX_DURATION_NS,
    WHOLE,
    Count,
    Index,
    Nanoseconds,
    Seconds,
    Section,
    seconds_to_ns,
)
from sim.scenario.checks import contradictions
from sim.scenario.workload_models import WorkloadSettings

Dtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8"]
MeshAxis = Literal["heads", "pages", "page", "head_dim"]
RooflineModel = Literal["llama-3-8b", "llama-3-70b", "gemma-2-9b"]
RooflineDevice = Literal["tpu-v5e", "tpu-v5p", "tpu-v6e", "h100", "h200"]
if TYPE_CHECKING:
    InvariantId = str
else:
    # An enumeration: editors complete it, and a slip gets a suggestion.
    InvariantId = Literal[tuple(name for name, entry in CATALOGUE.items() if entry.active)]


class CoreSettings(Section):
    """The serving core under test and its policy."""

    kind: str = Field(
        default="paged_attention", min_length=1, description="Name in the group kvproof.cores, or module:function."
    )
    batch_size: Count = Field(description="Decode slots.")
    prefill_chunk: Count = Field(description="Prompt tokens that one step prefills at most.")
    preemption: Literal["none", "recompute"] = Field(
        default="recompute", description="What happens when running sequences are short of pages."
    )
    lag: Annotated[int, Field(ge=0, le=2), WHOLE] = Field(
        default=0, description="Steps planned ahead of the oldest outcome not yet seen by the host."
    )
    mix: Literal["mixed", "prefill_first", "decode_first"] = Field(
        default="mixed", description="Whether a step may run prefill and decodes together, or which goes first."
    )
    max_decode_wait: Index = Field(default=4, description="Steps in a row that a running decode waits at most.")
    max_prefill_wait: Index = Field(default=4, description="Steps in a row that a runnable prefill waits at most.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keys that only this core knows.")


class CacheSettings(Section):
    """Shape and dtype of the KV cache."""

    page_size: Count = Field(description="Tokens per page.")
    num_pages: Annotated[int, Field(ge=2, le=MAX_COUNT), WHOLE] = Field(
        description="Pages per layer, the dummy page 0 included."
    )
    max_sequence_length: Count = Field(description="Longest sequence, in tokens with K/V.")
    layers: Count = Field(default=1, description="Attention layers.")
    kv_heads: Count = Field(default=1, description="KV heads per layer.")
    head_dim: Count = Field(default=16, description="Words per K or V vector.")
    dtype: Dtype = Field(default="bfloat16", description="Dtype of K and V.")
    layout: Literal["heads_first", "pages_first"] = Field(
        default="heads_first",
        description="Axis order of a pool: (heads, pages, page, head_dim) or (pages, page, heads, head_dim).",
    )
    quantize: bool = Field(
        default=False, description="Store pages as int8 with one scale per token and head; dtype is the input's."
    )


class BackendSettings(Section):
    """Where the steps run."""

    kind: str = Field(default="jax", min_length=1, description="none, numpy, jax, or a name in kvproof.backends.")
    platform: Literal["cpu", "gpu", "tpu"] = Field(default="cpu", description="JAX platform.")
    mesh: dict[MeshAxis, Count] = Field(
        default_factory=dict, description="Devices per sharded axis of the pool; empty: one device."
    )
    writer: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = Field(
        default=None, description="module:function of a write kernel of your own; null: the built-in one."
    )
    road: Literal["native", "rows"] = Field(
        default="native", description="Metadata from the core's own plan (native) or built from the plan's rows."
    )


class ModelSettings(Section):
    """The model that turns K/V into tokens."""

    kind: Literal["reader", "echo", "tiny"] = Field(
        default="reader",
        description="reader reads through the device's page table what was written; echo nothing; tiny is a decoder.",
    )
    vocab_size: Annotated[int, Field(ge=2, le=MAX_COUNT), WHOLE] = Field(
        default=32_000, description="Token ids, EOS (0) included."
    )
    lanes: Count = Field(default=1, description="Words of each position that the reader compares.")
    query_heads: Count | None = Field(
        default=None, description="Query heads of the tiny decoder; null: twice cache.kv_heads."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), WHOLE] = Field(default=0, description="Of the tiny decoder's weights.")


class FixedCost(Section):
    """Every step takes equally long."""

    kind: Literal["fixed"] = Field(description="One duration for all steps.")
    step_ns: Annotated[int, Field(ge=1, le=MAX_DURATION_NS), WHOLE] = Field(description="Duration of a step in ns.")


class LinearCost(Section):
    """A constant per step and one per token."""

    kind: Literal["linear"] = Field(description="base_ns + per_token_ns * tokens of the step.")
    base_ns: Nanoseconds = Field(description="Duration of a step without tokens, in ns.")
    per_token_ns: Nanoseconds = Field(description="What each token of the step adds, in ns.")


class RooflineCost(Section):
    """The larger of compute time and memory time of a published model on a published device."""

    kind: Literal["roofline"] = Field(description="max(compute, memory) + overhead.")
    model: RooflineModel = Field(description="Decoder whose sizes count.")
    device: RooflineDevice = Field(description="Accelerator whose peak figures count.")
    tensor_parallel: Count = Field(default=1, description="Devices that share the work.")
    overhead_ns: Nanoseconds = Field(default=0, description="Added to every step, in ns.")


class MeasuredCost(Section):
    """What a device really took for such steps: the model that `kvproof calibrate` fitted."""

    kind: Literal["measured"] = Field(description="A calibration file.")
    file: str = Field(min_length=1, description="Made by `kvproof calibrate`; relative to this file.")


CostSettings = Annotated[FixedCost | LinearCost | RooflineCost | MeasuredCost, Field(discriminator="kind")]


class CancelFault(Section):
    """A user gives up: one request is cancelled before a step, or at a time."""

    kind: Literal["cancel"] = Field(description="Cancel one request.")
    request: Index = Field(description="Its id: workload.first_request_id (0) and up, in order of arrival.")
    at_step: Index | None = Field(default=None, description="Before this step is planned, counted from 0.")
    at_seconds: Seconds | None = Field(default=None, description="At this simulated time, in s.")

    @property
    def at_ns(self) -> int | None:
        """`at_seconds` in ns, or None."""
        return None if self.at_seconds is None else seconds_to_ns(self.at_seconds)


class FailFault(Section):
    """A step that never ran: its plan is abandoned and made anew."""

    kind: Literal["fail"] = Field(description="Fail one step.")
    at_step: Index | None = Field(default=None, description="This step, counted from 0.")
    at_seconds: Seconds | None = Field(default=None, description="The first step planned at or after this time, in s.")

    @property
    def at_ns(self) -> int | None:
        """`at_seconds` in ns, or None."""
        return None if self.at_seconds is None else seconds_to_ns(self.at_seconds)


class CancelStorm(Section):
    """Many users give up: sim.workload.concrete_faults turns it into CancelFaults, from the stream "cancels"."""

    kind: Literal["cancel_storm"] = Field(description="Cancel a share of all requests.")
    fraction: float = Field(gt=0.0, le=1.0, description="Chance of each request to be cancelled.")
    max_delay_seconds: Seconds = Field(description="Cancelled at a random time up to this long after arrival, in s.")


class Disturbance(Section):
    """Something that a host may do at any time and that must make no difference to what the core promises."""

    kind: Literal["fork", "poll", "stall"] = Field(
        description="fork: a fork of the core takes its place, and the original plans on its own; poll: pending() "
        "and snapshot() are read, and an idle core is asked again; stall: the oldest step in flight ends first."
    )
    at_step: Index = Field(description="Before this step is planned, counted from 0.")


class ResubmitFault(Section):
    """A client asks twice: a request is submitted again while it is unfinished, and must be refused."""

    kind: Literal["resubmit"] = Field(description="Submit an unfinished request again; a gone one is left alone.")
    request: Index = Field(description="Its id: workload.first_request_id (0) and up, in order of arrival.")
    at_step: Index = Field(description="Before this step is planned, counted from 0.")


ConcreteFault = CancelFault | FailFault | Disturbance | ResubmitFault
"""A fault that happens at one moment."""

Fault = Annotated[CancelFault | FailFault | CancelStorm | Disturbance | ResubmitFault, Field(discriminator="kind")]


class InvariantSettings(Section):
    """How often the auditor looks, and what a violation does to the run."""

    every: Count = Field(default=1, description="Check the cheap invariants every n steps.")
    full_every: Count = Field(
        default=256,
        description="Run the full checks every n steps: the core's state, and the pool (of a large one the next part).",
    )
    device_every: Count = Field(default=1, description="Read back from the device every n steps.")
    stop: Literal["first", "never"] = Field(default="first", description="End the run at the first violation, or not.")
    only: Annotated[tuple[InvariantId, ...], Field(strict=False)] | None = Field(
        default=None, description="Check these only; null: all."
    )
    deep: bool = Field(
        default=False, description="Also check what only a second run can judge; it takes a dozen more runs."
    )
    hang_seconds: Seconds = Field(
        default=10.0,
        description="A call of the core that takes longer hangs and ends the run, in real s; 0: none does.",
    )


class CountRange(Section):
    """Bounds on a count, both included."""

    min: Index = Field(default=0, description="At least this many.")
    max: Index | None = Field(default=None, description="At most this many; null: no bound.")


def _count_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "word"
    if isinstance(value, dict | CountRange):
        return "range"
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else None


_COUNT_FORM = Discriminator(
    _count_form, custom_error_type="count_form", custom_error_message="expected a whole number or {min: ..., max: ...}"
)
_ALL_FORM = Discriminator(
    _count_form,
    custom_error_type="count_form",
    custom_error_message="expected 'all', a whole number or {min: ..., max: ...}",
)
Expected = Annotated[Annotated[Index, Tag("number")] | Annotated[CountRange, Tag("range")], _COUNT_FORM]
ExpectedOrAll = Annotated[
    Annotated[Literal["all"], Tag("word")] | Annotated[Index, Tag("number")] | Annotated[CountRange, Tag("range")],
    _ALL_FORM,
]


class LatencyBounds(Section):
    """Upper bounds on one latency, in s: a service level objective."""

    mean: Seconds | None = Field(default=None, description="Bound on the mean, in s.")
    p50: Seconds | None = Field(default=None, description="Bound on the median, in s.")
    p90: Seconds | None = Field(default=None, description="Bound on the 90th percentile, in s.")
    p95: Seconds | None = Field(default=None, description="Bound on the 95th percentile, in s.")
    p99: Seconds | None = Field(default=None, description="Bound on the 99th percentile, in s.")
    p99_9: Seconds | None = Field(default=None, description="Bound on the 99.9th percentile, in s.")
    max: Seconds | None = Field(default=None, description="Bound on the largest, in s.")


class FirstViolation(Section):
    """The violation that a minimal scenario was shrunk to."""

    id: str = Field(
        min_length=1,
        description="Its invariant; crash where the core or backend raised, hang where a call never returned.",
    )
    cause: str = Field(
        default="", description="Of a crash the class that was raised, of a hang the call; empty: any will do."
    )
    step: Annotated[int, Field(ge=-1), WHOLE] = Field(description="The newest step when it was found; -1: none yet.")
    trace_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] = Field(description="The run's rolling hash.")
    versions: dict[str, str] = Field(default_factory=dict, description="Packages that it was found with.")


class Expectations(Section):
    """What the run must show to pass; latencies are objectives with an exit code of their own."""

    violations: Expected | None = Field(
        default=None, description="Invariant violations; null: 0, or at least 1 where `violated` names some."
    )
    violated: Annotated[tuple[InvariantId, ...], Field(strict=False)] = Field(
        default=(), description="Exactly these invariants must break."
    )
    first: FirstViolation | None = Field(
        default=None, description="The run must break like this: the same invariant first, at the same step."
    )
    finished: ExpectedOrAll | None = Field(
        default=None, description="Finished requests; all: every one that was neither cancelled nor rejected."
    )
    cancelled: Expected | None = Field(default=None, description="Cancelled requests.")
    rejected: Expected | None = Field(default=None, description="Requests refused at submission.")
    preemptions: Expected | None = Field(default=None, description="Preemptions.")
    steps: Expected | None = Field(default=None, description="Steps of the run.")
    time_to_first_token_seconds: LatencyBounds | None = Field(default=None, description="First token - arrival.")
    inter_token_latency_seconds: LatencyBounds | None = Field(default=None, description="Each gap between tokens.")
    time_per_output_token_seconds: LatencyBounds | None = Field(
        default=None, description="(last - first token) / (tokens - 1), per request."
    )
    e2e_request_latency_seconds: LatencyBounds | None = Field(default=None, description="End - arrival.")


class Scenario(Section):
    """Everything about a run: equal scenarios give equal runs."""

    schema_: Literal["kvproof/v1"] = Field(default="kvproof/v1", alias="schema", description="Format of this file.")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)] = Field(
        description="Names the run folder."
    )
    description: str = Field(default="", description="What the scenario is for, in one line.")
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] = Field(
        default=0, description="Every random draw comes from it."
    )
    core: CoreSettings = Field(description="The serving core under test.")
    cache: CacheSettings = Field(description="The KV cache.")
    backend: BackendSettings = Field(default_factory=BackendSettings, description="Where the steps run.")
    workload: WorkloadSettings = Field(description="Who asks for what, and when.")
    model: ModelSettings = Field(default_factory=ModelSettings, description="The model.")
    cost: CostSettings = Field(description="How long a step takes in simulated time.")
    faults: Annotated[tuple[Fault, ...], Field(strict=False)] = Field(
        default=(), description="What goes wrong on purpose outside the core."
    )
    plant: str | None = Field(default=None, min_length=1, description="Name of a bug to plant in the code under test.")
    invariants: InvariantSettings = Field(default_factory=InvariantSettings, description="What is checked, how often.")
    expect: Expectations = Field(default_factory=Expectations, description="What the run must show.")

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if problems := contradictions(self):
            text = "; ".join(f"{'.'.join(map(str, where))}: {what}" for where, what in problems)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "problems": problems})
        return self
