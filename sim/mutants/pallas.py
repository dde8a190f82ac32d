"""Planted bugs in the Pallas page writer (MW)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_WRITER = "backends.pallas_writer"
_DRIVER = "pallas-writer"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MW01",
        "The Pallas writer puts a decode one row too far within its window.",
        ("K1", "K2", "K3"),
        where="device",
        edits=(
            Edit(
                f"{_WRITER}:write_slots",
                "low, low + (position >= 0))",
                "(low + 1) % height, (low + 1) % height + (position >= 0))",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "MW02",
        "The Pallas writer takes each slot's page from the table of the slot before.",
        ("K1", "K2", "K3"),
        where="device",
        edits=(Edit(f"{_WRITER}:write_slots", "(_entries)(table, ", "(_entries)(jnp.roll(table, 1, axis=0), "),),
        driver=_DRIVER,
    ),
    Mutant(
        "MW03",
        "The Pallas writer writes a chunk's padding behind its last token.",
        ("K2",),
        where="device",
        edits=(
            Edit(
                f"{_WRITER}:write_chunk",
                "jnp.clip(length - position[0], 0, num_rows)",
                "num_rows",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "MW04",
        "The Pallas writer exchanges K and V.",
        ("K7", "K1"),
        where="device",
        edits=(
            Edit(
                f"{_WRITER}:_kernel",
                "held_key, new_key), (value_pages, held_value, new_value)",
                "held_key, new_value), (value_pages, held_value, new_key)",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "MW05",
        "The Pallas writer copies to and from whatever page its table names.",
        ("SEED-25",),
        where="device",
        edits=(Edit(f"{_WRITER}:_kernel", "(page[n] >= 0) & (page[n] < num_pages)", "page[n] >= 0"),),
        driver="contract:pallas_guard",
    ),
    Mutant(
        "MW06",
        "The Pallas writer overwrites the rows of a window that lie before its own.",
        ("K3", "K1", "K2"),
        where="device",
        edits=(Edit(f"{_WRITER}:_kernel", "(row >= low[n]) & (row < high[n])", "row < high[n]"),),
        driver=_DRIVER,
    ),
    Mutant(
        "MW07",
        "The Pallas writer does not wait for what it puts back.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                f"{_WRITER}:_kernel",
                "for copy in copies(nth, put_back=True):\n                copy.wait()",
                "pass",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "MW08",
        "The Pallas writer takes the page of a chunk's first token for all of the chunk.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(f"{_WRITER}:write_chunk", "first + nth)", "first + 0 * nth)"),),
        driver=_DRIVER,
    ),
)
