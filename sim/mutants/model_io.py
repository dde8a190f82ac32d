"""Planted bugs in model input, output and sampling (MI)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_NATIVE = "backends.jax_roads:native_step"
_NOTE = "paged_attention.books:Books.note_tokens"
_ENGINE = "paged_attention.engine:PagedAttentionEngine"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MI02",
        "The tokens of a step go, row by row, to the slots of the plan after it.",
        ("S3",),
        edits=(
            Edit(
                _NOTE,
                "slots, places = seated.slots, seated.next_place + positions",
                "after = self.flights[0].seated if self.flights else seated\n"
                "    slots = after.slots[: len(tokens)]\n"
                "    tokens = tokens[: len(slots)]\n"
                "    places = after.next_place[: len(slots)] + positions[: len(slots)]",
            ),
            Edit(_NOTE, "(table.key[slots] == seated.key)", "(table.key[slots] >= 0)"),
        ),
        driver="host-prefill-first",
    ),
    Mutant(
        "MI04",
        "The random key of a row is that of its slot, not of its request.",
        ("O11", "O1"),
        where="device",
        edits=(
            Edit(
                _NATIVE,
                "jnp.atleast_1d(params.seed).astype(jnp.uint32)",
                "jnp.arange(jnp.atleast_1d(params.seed).shape[0], dtype=jnp.uint32)",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MI05",
        "A request that is fed again after a preemption draws with a new seed.",
        ("O11", "O1"),
        where="device",
        edits=(
            Edit(
                "paged_attention.books:Books.preempt",
                "self.scheduler.requeue_prefill_request(sequence.prefill)",
                "params = sequence.prefill.sampling_params\n"
                "    params.seed = params.seed + np.uint32(sequence.admission)\n"
                "    self.scheduler.requeue_prefill_request(sequence.prefill)",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MI06",
        "A slot keeps the sampling parameters of whoever sat there first.",
        ("O1", "O11"),
        where="device",
        edits=(
            Edit(
                "paged_attention.sampling:SamplingParams.insert_decode_state",
                "put_rows(getattr(self, n), insert_slots, getattr(source, n))",
                "getattr(self, n)",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MI07",
        "An EOS that is the first token is ignored.",
        ("O3",),
        edits=(
            Edit(
                f"{_ENGINE}.apply",
                "outcome.eos.nonzero()[0].tolist()",
                "[r for r in outcome.eos.nonzero()[0].tolist() if flight.plan.slot[r] >= 0]",
            ),
        ),
    ),
    Mutant("MI09", "A stop string that two deltas share is missed.", ("O3",), waits_for="stop strings"),
    Mutant("MI10", "The last delta is dropped where the end comes with it.", ("O10",), waits_for="text deltas"),
    Mutant(
        "MI12",
        "The rows that pad a chunk are counted as scheduled tokens.",
        ("M1",),
        edits=(
            Edit(
                "sim.record:Recorder.planned",
                "self.scheduled_tokens += num_tokens",
                "self.scheduled_tokens += num_tokens + (-prefill_tokens % 8)",
            ),
        ),
    ),
)
