"""What the engine remembers: of each request, of each step in flight, and of what the device has not been told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.plan import Effect, Ints, Request, StepPlan
from paged_attention.requests import GenerationStepTask, InitialSequenceRequest, NextIterationPlan, SlotPageAssignment
from paged_attention.slots import NOBODY, Seated

State = Literal["waiting", "prefill", "joining", "running", "draining"]
STATES: tuple[State, ...] = ("waiting", "prefill", "joining", "running", "draining")


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and where it stands."""

    request: Request
    order: int
    """Submission number: the older of two sequences keeps its pages longer."""
    limit: int
    """Tokens that it yields unless an EOS ends it: min(max_tokens, max_sequences - prompt + 1)."""
    prefill: InitialSequenceRequest
    """What is fed in this admission: the prompt and the tokens generated before a preemption."""
    state: State = "waiting"
    admission: int = 0
    key: int = NOBODY
    slot: int = NOBODY
    pages: list[int] = field(default_factory=list)
    task: GenerationStepTask | None = None
    """What the scheduler holds of it while it joins or runs."""
    fed: int = 0
    """Tokens of `prefill` whose chunks are planned."""
    planned: int = 0
    """Tokens that it yields in steps planned so far; counted in its slot while it has one."""
    generated: list[int] = field(default_factory=list)
    """Tokens known to the host, but for those in the slot's history."""
    last_step: int = NOBODY
    """The last step that ran it; while it runs, its slot knows."""
    gave_back: bool = False
    """Its last row is planned and its pages and slot are back; only the outcome is awaited."""

    @property
    def num_fed_tokens(self) -> int:
        """Tokens to feed in this admission."""
        assert self.prefill.prompt_token_ids is not None
        return len(self.prefill.prompt_token_ids)


@dataclass(slots=True)
class Flight:
    """A planned step: what `apply` and `abandon` must know of it."""

    plan: StepPlan
    native: NextIterationPlan
    seated: Seated
    """Its decode rows."""
    last_steps: Ints
    """The last_step of each slot before this one."""
    prefilling: Sequence | None
    prefilled_before: int
    """The prefilling sequence's last_step before this one."""
    last_rows: list[Sequence]
    """Sequences whose last row is in this step."""
    waits: tuple[int, int]


@dataclass(slots=True)
class Untold:
    """What the device must still be told: releases since the last plan, and the news of a plan that never ran."""

    releases: list[int] = field(default_factory=list)
    joins: list[tuple[int, GenerationStepTask]] = field(default_factory=list)
    pages: list[tuple[int, SlotPageAssignment]] = field(default_factory=list)
    """Joins and pages come with the key of the admission that they are for."""


def refusal(request: Request, metadata: PagedAttentionCacheMetaData) -> str | None:
    """Say why a request can never run in a cache, or None where it can.

    It needs K/V for min(prompt + max_tokens - 1, max_sequences) tokens: the last token of all is never written.
    """
    longest, pool, length = metadata.max_sequences, metadata.num_pages_per_layer - 1, len(request.prompt)
    if length == 0:
        return "the prompt is empty; at least one token is needed"
    if request.max_tokens < 1:
        return f"max_tokens is {request.max_tokens}; at least 1 is needed"
    if length > longest:
        return f"the prompt has {length} tokens and a sequence at most {longest} (max_sequences)"
    need = -(-min(length + request.max_tokens - 1, longest) // metadata.page_size)
    if need > pool:
        return f"its prompt of {length} and its {request.max_tokens} new tokens need {need} pages; the pool has {pool}"
    return None


def grant(sequence: Sequence, pages: list[int]) -> Effect:
    """Give pages to a sequence, behind those that it has."""
    first = len(sequence.pages)
    sequence.pages += pages
    return Effect("allocated", sequence.request.id, sequence.admission, NOBODY, first, tuple(pages))
