"""What the ledger writes down of each admission, request and step in flight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32
from numpy.typing import NDArray

from invariants.shadow import Cells
from paged_attention.plan import Request, StepOutcome, StepPlan

State = Literal["waiting", "prefill", "joining", "running", "draining", "gone"]


@dataclass(slots=True, eq=False)
class Admission:
    """One start of a request: the pages it holds and how much of it is computed."""

    request: int
    number: int
    feed: int
    """Tokens that its prefill feeds: the prompt, and after a preemption what was generated before."""
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    position: int = 0
    """c(r) while it holds no slot; `Ledger.computed` knows both cases."""
    high: int = 0
    """The furthest end that was ever planned and then abandoned: pages up to there may stay."""
    released: bool = False
    tokens: Cells | None = None
    """What its tokens are at each position, once it was asked for."""

    def __str__(self) -> str:
        """As messages name it."""
        return f"request {self.request}, admission {self.number}"


@dataclass(slots=True, eq=False)
class Live:
    """A request that is neither finished nor cancelled."""

    request: Request
    order: int
    """Its rank by submission."""
    last: int
    """The position of its last token if no EOS ends it: its limit is in tokens, last = prompt + limit - 1."""
    submitted_ns: int
    state: State = "waiting"
    admissions: int = 0
    admission: Admission | None = None
    known: int = 0
    """Tokens that may be fed on the next admission: prompt and generated."""
    best: int = 0
    """High-water mark of c(r) over all admissions."""
    tokens: NDArray[np.int32] | None = None
    eos_position: int = -1
    admitted_ns: int | None = None
    first_token_ns: int | None = None
    sampled_admission: int = 0
    """The newest admission whose first token the host has seen."""
    waits_since_step: int = 0
    """Steps planned when it began to wait."""
    wait_bound: int = 0
    """Rows of work that were left then, its own included."""
    extra_at: int = 0
    """Work that preemptions and abandoned steps had added by then."""
    prefill_step: int = -1
    """The newest step with a prefill row of it."""
    progress_at: int = -1
    """The progress count at its last preemption."""
    id: int = field(init=False)
    prompt: int = field(init=False)
    """Prompt tokens."""

    def __post_init__(self) -> None:
        """Asked for at every event, so kept."""
        self.id, self.prompt = self.request.id, len(self.request.prompt)

    @property
    def first_outcome_seen(self) -> bool:
        """Whether the first token of this admission is known to the host."""
        return self.sampled_admission == self.admissions


Prefill = tuple[int, Live, Admission, int, int]
"""(row, request, admission, start, count) of a prefill row."""


@dataclass(slots=True, eq=False)
class Flight:
    """A step that was planned and is not yet applied or abandoned, as the ledger saw it."""

    plan: StepPlan
    prefills: list[Prefill]
    first: int
    """Row of the first decode."""
    slots: Int[np.ndarray, " decodes"]
    start: Int32[np.ndarray, " decodes"]
    at: Int[np.ndarray, " decodes"]
    """Where in the ledger's flat tokens the token of each decode row belongs."""
    joins: int
    """The ledger's count of joins when the step was planned."""
    draining: list[Live]
    """Requests whose last row this is."""
    gauges: tuple[int, ...] = ()
    """metrics.GAUGES by the auditor's own books, when the step was planned."""
    outcome: StepOutcome | None = None
    eos: list[Live] = field(default_factory=list)
