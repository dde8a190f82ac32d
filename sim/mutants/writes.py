"""Planted bugs in cache writes and reads (MK)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_DECODES = "paged_attention.writes:write_decodes_jax"
_PREFILL = "paged_attention.writes:write_prefill_jax"
_SCATTER = "paged_attention.writes:_scatter"
_MODEL = "backends.jax_step:ScriptedModel"
_VIEW = "paged_attention.cache:PagedAttentionCacheView"
_DECODER = "backends.jax_tiny:DecoderModel"
_MERGE = "paged_attention.model_io:merge_news"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MK01",
        "A decode writes one offset too far within its page.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(_DECODES, "position % page_size", "(position + 1) % page_size"),),
        driver="device-starved",
    ),
    Mutant(
        "MK02",
        "A decode takes the page of the position after its own.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(_DECODES, "position // page_size", "(position + 1) // page_size"),),
        driver="device-starved",
    ),
    Mutant(
        "MK03",
        "A chunk is written from offset 0 of its first page, wherever it starts.",
        ("K1", "K2"),
        where="device",
        edits=(
            Edit(
                _PREFILL,
                "start = position[0]",
                "start, length = position[0] // page_size * page_size, length - position[0] % page_size",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MK04",
        "K and V are exchanged on their way into the cache.",
        ("K7", "K1"),
        where="device",
        edits=(
            Edit(
                f"{_VIEW}._write",
                "(self._stored(key), self._stored(value))",
                "(self._stored(value), self._stored(key))",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MK06",
        "Every turn of the layer loop writes the first layer's vectors into the first layer's pages.",
        ("K9", "K1", "K3"),
        where="device",
        edits=(Edit(f"{_MODEL}._write", "in enumerate(views)\n    ]", "in enumerate(views[:1])\n    ] + views[1:]"),),
        driver="device-starved",
    ),
    Mutant(
        "MK08",
        "A slot without a live sequence writes into page 1.",
        ("K2",),
        where="device",
        edits=(Edit(_DECODES, "jnp.where(live, page, num_pages)", "jnp.where(live, page, 1)"),),
        driver="device-starved",
    ),
    Mutant(
        "MK09",
        "A slot without a live sequence writes into the first place of slot 0's first page.",
        ("K2",),
        where="device",
        edits=(
            Edit(_DECODES, "jnp.where(live, page, num_pages)", "jnp.where(live, page, table[0, 0])"),
            Edit(_DECODES, "position % page_size", "jnp.where(live, position, 0) % page_size"),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MK10",
        "Padding writes NaN into the dummy page, and attention masks by adding.",
        ("K5",),
        where="deep",
        waits_for="attention in floating point",
    ),
    Mutant(
        "MK11",
        "Scattered tokens are added to what lies in their place.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(_SCATTER, ".at[index].set(", ".at[index].add("),),
        driver="device-lag",
    ),
    Mutant(
        "MK12",
        "A page id past the end is clipped onto the last page.",
        ("K2",),
        where="device",
        edits=(Edit(_SCATTER, 'mode="drop"', 'mode="clip"'),),
        driver="device-lag",
    ),
    Mutant(
        "MK14",
        "A chunk replaces whole pages, and clobbers what an earlier chunk wrote to the first of them.",
        ("K2",),
        where="device",
        edits=(Edit(_PREFILL, "jnp.where(mask, old, new)", "new"),),
        driver="device-starved",
    ),
    Mutant(
        "MK15",
        "The part of a chunk behind a page boundary goes to the page before it.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(_PREFILL, "logical = (start + row) // page_size", "logical = start // page_size + 0 * row"),),
        driver="device-starved",
    ),
    Mutant(
        "MK16",
        "Attention leaves out the newest token.",
        ("K1", "K3", "O2"),
        where="device",
        edits=(Edit(f"{_DECODER}._attend", "<= position[..., None]", "< position[..., None]"),),
        driver="device-tiny",
    ),
    Mutant(
        "MK17",
        "Attention reads one place beyond the newest token.",
        ("O1",),
        where="device",
        edits=(Edit(f"{_MODEL}._sample", "jnp.where(yields, position, 0)", "jnp.where(yields, position + 1, 0)"),),
        driver="device-starved",
    ),
    Mutant(
        "MK19",
        "A step uses the device's page table as it was before the step's news.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(_MERGE, "state, chunk = (merge", "stale = decodes_state.page_table\n    state, chunk = (merge"),
            Edit(
                _MERGE,
                "shape.has_decodes, decodes_state,",
                "shape.has_decodes, decodes_state.replace(page_table=stale),",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MK20",
        "The position that goes into a token's K/V starts anew in each chunk.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                f"{_MODEL}.step",
                "kv_id(base[0], prefill.prefill_position, jnp)",
                "kv_id(base[0], prefill.prefill_position - prefill.prefill_position[0], jnp)",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MK21",
        "What is fed again after a preemption keeps the positions that follow the old ones.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                "paged_attention.books:Books.preempt",
                "self.scheduler.requeue_prefill_request(sequence.prefill)",
                "sequence.prefill.positions = sequence.prefill.positions + len(sequence.generated)\n"
                "    self.scheduler.requeue_prefill_request(sequence.prefill)",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MK22",
        "The scale of a quantised token is written one offset behind its values.",
        ("K7", "K1"),
        where="device",
        edits=(
            Edit(
                _SCATTER,
                "pool.at[index]",
                "pool.at[index if pool.ndim > 3 else layout.index(page, offset + 1)]",
            ),
        ),
        driver="device-int8",
    ),
    Mutant(
        "MK23",
        "Rope rounds to bfloat16 before it adds its two terms.",
        ("K1", "K3", "O2"),
        where="device",
        edits=(
            Edit(
                f"{_DECODER}._rope",
                "(a * cos - b * sin)",
                "((a * cos).astype(jnp.bfloat16).astype(jnp.int32) - b * sin)",
            ),
        ),
        driver="device-tiny",
    ),
    Mutant(
        "MK25",
        "What is compiled is keyed without the page size: views keep that of the first cache in the process.",
        ("O4",),
        where="deep",
        edits=(
            Edit(
                "backends.jax_device:JaxBackend.open",
                "self._pools: Pools =",
                # A key without sizes, in the table of programs that is emptied when the bug comes and goes.
                "key = replace(cache, lag=0, page_size=1, num_pages=2, max_sequence_length=1, batch_size=1)\n"
                "    key = replace(key, prefill_chunk=1)\n"
                "    shared = vars(programs_for(key, model, devices.platform, tuple(devices.mesh.items())))\n"
                "    first = shared.setdefault('first', self._programs.model.cache_tree)\n"
                "    object.__setattr__(self._programs.model, 'cache_tree', first)\n"
                "    self._pools: Pools =",
            ),
        ),
        driver="deep-jax",
    ),
    Mutant(
        "MK26",
        "The page that holds the first token of the window is freed.",
        ("K4",),
        where="deep",
        waits_for="sliding windows",
    ),
)
