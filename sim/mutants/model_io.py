"""Planted bugs in model input, output and sampling (MI)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_NATIVE = "backends.jax_roads:native_step"
_ENGINE = "paged_attention.engine:PagedAttentionEngine"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MI02",
        "The tokens of a step go to the requests in the slots of the newest plan.",
        ("O1", "S3"),
        edits=(
            Edit(
                f"{_ENGINE}.apply",
                "books.note_tokens(flight, outcome)",
                "books.note_tokens(books.flights[-1] if books.flights else flight, outcome)",
            ),
        ),
    ),
    Mutant(
        "MI04",
        "The random key of a row is that of its slot, not of its request.",
        ("O1",),
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
        "MI06",
        "A slot keeps the sampling parameters of whoever sat there first.",
        ("O1",),
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
    Mutant("MI11", "Padded query starts are 0 in place of the total.", ("S8",), waits_for="packed query starts"),
)
