"""Planted bugs in what a step runs with on the device (MI, MK24), and in what is recorded of it (KG)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_RECORDER = "sim.record:Recorder"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MI01",
        "The token of a chunk is sampled at its first row, not at its last.",
        ("S8", "O2"),
        where="device",
        edits=(
            Edit(
                "paged_attention.model_io:sampled_rows",
                "(attn_meta.prefill_length - 1 - attn_meta.prefill_position[0]).reshape(1)",
                "xp.zeros(1, xp.int32)",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MI11",
        "Query starts of padding are 0 in place of the total.",
        ("S8",),
        where="device",
        edits=(
            Edit(
                "paged_attention.model_io:query_starts",
                "return xp.cumsum(xp.concatenate(counts), dtype=xp.int32)",
                "each = xp.concatenate(counts)\n    return xp.where(each > 0, xp.cumsum(each, dtype=xp.int32), 0)",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MK24",
        "A step does not take over the pools that it is given, so that each step copies them.",
        ("K8",),
        where="device",
        edits=(Edit("backends.jax_programs:Programs._writing", "donate_argnums=donate", "donate_argnums=()"),),
        driver="device-starved",
    ),
    Mutant(
        "KG01",
        "A step is recorded as if it had ended when it started.",
        ("M8",),
        edits=(
            Edit(
                f"{_RECORDER}.executed",
                "self._series.tail += (plan.step, start_ns, end_ns, *gauges)",
                "self._series.tail += (plan.step, start_ns, start_ns, *gauges)",
            ),
        ),
    ),
    Mutant(
        "KG02",
        "The last token of whoever gives back its pages stays counted as live.",
        ("M6",),
        edits=(Edit(f"{_RECORDER}._freed", "self.live_tokens -= written", "self.live_tokens -= max(written - 1, 0)"),),
    ),
    Mutant(
        "KG03",
        "The rows that pad a chunk are drawn as tokens of the step.",
        ("M7",),
        edits=(
            Edit(
                f"{_RECORDER}.planned",
                "prefill_tokens = 0 if plan.slot is self._decodes_only else self._prefill_tokens(plan)",
                "prefill_tokens = 0 if plan.slot is self._decodes_only else self._prefill_tokens(plan)\n"
                "    prefill_tokens += -prefill_tokens % self.policy.prefill_chunk",
            ),
        ),
    ),
)
