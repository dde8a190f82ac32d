"""Planted bugs of a real decoder on the pages: RoPE, what attention sees, which logits, whose parameters."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_MODEL = "backends.jax_tiny:DecoderModel"
_DRIVER = "device-tiny"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "OD20",
        "RoPE counts a chunk's positions from the chunk's start.",
        ("K1", "O2"),
        where="device",
        edits=(
            Edit(
                "backends.jax_tiny:_positions",
                "[prefill.prefill_position]",
                "[prefill.prefill_position - prefill.prefill_position[0]]",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "OD21",
        "Queries are turned to the position behind their own.",
        ("K1", "O2"),
        where="device",
        edits=(Edit(f"{_MODEL}._attention", "self._rope(query, place)", "self._rope(query, place + 1)"),),
        driver=_DRIVER,
    ),
    Mutant(
        "OD22",
        "Attention leaves out the newest token.",
        ("K1", "O2"),
        where="device",
        edits=(Edit(f"{_MODEL}._attend", "<= position[..., None]", "< position[..., None]"),),
        driver=_DRIVER,
    ),
    Mutant(
        "OD23",
        "Attention sees one place beyond the newest token.",
        ("K1", "O2"),
        where="device",
        edits=(Edit(f"{_MODEL}._attend", "<= position[..., None]", "<= position[..., None] + 1"),),
        driver=_DRIVER,
    ),
    Mutant(
        "OD24",
        "Query heads take their kv_head in turn, not in groups.",
        ("K1", "O2"),
        where="device",
        edits=(
            Edit(
                f"{_MODEL}._attend",
                "query.reshape(sequences, rows, self.spec.kv_heads, -1, head_dim)",
                "query.reshape(sequences, rows, -1, self.spec.kv_heads, head_dim).swapaxes(2, 3)",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "OD25",
        "A decode attends through the page table of the slot beside its own.",
        ("K1", "O2"),
        where="device",
        edits=(
            Edit(f"{_MODEL}._attention", "decodes.decodes_page_table", "jnp.roll(decodes.decodes_page_table, 1, 0)"),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "OD26",
        "Tokens are drawn from the logits of the row before.",
        ("O2",),
        where="device",
        edits=(Edit(f"{_MODEL}.step", "x[sampled_rows(attn_meta)]", "x[sampled_rows(attn_meta) - 1]"),),
        driver=_DRIVER,
    ),
    Mutant(
        "OD27",
        "Temperatures are those of the row before.",
        ("O1",),
        where="device",
        edits=(
            Edit(
                f"{_MODEL}._sample",
                "sample(logits, fed.params, position)",
                "sample(logits, fed.params.replace(temperature=jnp.roll(fed.params.temperature, 1)), position)",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "OD28",
        "top_p is not looked at.",
        ("O1",),
        where="device",
        edits=(
            Edit(
                "paged_attention.sampling:sample",
                "kept = ((before < threshold) | (top_p >= 1)) & (weight > 0)",
                "kept = weight > 0",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "OD29",
        "The random number is that of the position before.",
        ("O1",),
        where="device",
        edits=(
            Edit(
                "paged_attention.sampling:sample",
                "uniform(params.seed, positions)",
                "uniform(params.seed, positions - 1)",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "OD30",
        "An EOS that was drawn does not end the sequence on the device.",
        ("O3",),
        where="device",
        edits=(Edit(f"{_MODEL}._sample", "token == EOS_TOKEN", "token < UNKNOWN_TOKEN"),),
        driver=_DRIVER,
    ),
    Mutant(
        "OD31",
        "The last layer is not written by decodes.",
        ("K9",),
        where="device",
        edits=(
            Edit(
                f"{_MODEL}._attention",
                "if decodes is not None:\n        view =",
                "if decodes is not None and weights is not self.weights.layers[-1]:\n        view =",
            ),
        ),
        driver=_DRIVER,
    ),
    Mutant(
        "OD32",
        "K is rounded to float8 on its way into the pages.",
        ("K7",),
        where="device",
        edits=(
            Edit(
                f"{_MODEL}._stored",
                "vectors.astype(jnp.float32)",
                "vectors.astype(jnp.float32).astype(jnp.float8_e4m3fn)",
            ),
        ),
        driver=_DRIVER,
    ),
)
