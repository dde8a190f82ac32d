"""Planted bugs of the device road that the catalogues leave out (KK)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_DECODES = "paged_attention.writes:write_decodes_jax"
_PREFILL = "paged_attention.writes:write_prefill_jax"
_SCATTER = "paged_attention.writes:_scatter"
_MODEL = "backends.jax_step:ScriptedModel"
_VIEW = "paged_attention.cache:PagedAttentionCacheView"
_IO = "paged_attention.model_io"
_NEWS = "paged_attention.step_news"
_OUTPUT = f"{_IO}:ModelIOProcessor.prepare_model_output"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "KK01",
        "A chunk's last page is not written where the chunk fills it in part only.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(_PREFILL, "(tail < num_real)", "(tail < 0)"),),
        driver="device-starved",
    ),
    Mutant(
        "KK02",
        "The pages that a chunk fills are counted as if it began at a page boundary.",
        ("K2", "K1", "K3"),
        where="device",
        edits=(Edit(_PREFILL, "(num_real - head) // page_size", "num_real // page_size"),),
        driver="device-starved",
    ),
    Mutant(
        "KK03",
        "A chunk's padding rows are written behind its last token.",
        ("K2",),
        where="device",
        edits=(Edit(_PREFILL, "(rows < num_real)", "(rows < num_rows)"),),
        driver="device-starved",
    ),
    Mutant(
        "KK04",
        "The real rows of a chunk are counted from the start of the prompt, so that a last chunk writes its padding.",
        ("K2",),
        where="device",
        edits=(Edit(_PREFILL, "jnp.clip(length - start, 0, num_rows)", "jnp.clip(length, 0, num_rows)"),),
        driver="device-starved",
    ),
    Mutant(
        "KK05",
        "The token and head axes of V are exchanged by a reshape in place of a transpose.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                _SCATTER,
                "layout.from_tokens(rows)",
                "(layout.from_tokens(rows) if pool is pools[0] else rows.reshape(rows.shape[1], rows.shape[0], -1))",
            ),
        ),
        driver="device-lag",
    ),
    Mutant(
        "KK06",
        "Every head gets the vector of head 0.",
        ("K7", "K1", "K3"),
        where="device",
        edits=(
            Edit(
                f"{_VIEW}._stored",
                "return tokens.astype(self.key_pages.dtype)",
                "return tokens[:, :1].repeat(tokens.shape[1], 1).astype(self.key_pages.dtype)",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "KK07",
        "A new decode is put into the slot of its row in the news, not into its own.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(f"{_NEWS}:_pack_tasks", '["insert_slots"][row] = task.slot', '["insert_slots"][row] = row'),),
        driver="device-starved",
    ),
    Mutant(
        "KK08",
        "A released slot keeps its position on the device as if somebody sat there.",
        ("T6", "S8"),
        where="device",
        edits=(Edit(f"{_IO}:_released", "xp.where(gone, FREE_POSITION, batch.positions)", "batch.positions"),),
        driver="device-int8",
    ),
    Mutant(
        "KK09",
        "A released slot keeps its page table on the device.",
        ("T5", "T2"),
        where="device",
        edits=(Edit(f"{_IO}:_released", "xp.where(gone[:, None], DUMMY_PAGE, batch.page_table)", "batch.page_table"),),
        driver="device-starved",
    ),
    Mutant(
        "KK10",
        "A new decode takes up the oldest first token that the device holds, whoever's it is.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(f"{_NEWS}:_held", "prefill_outputs[task.id]", "next(iter(prefill_outputs.values()))"),),
        driver="device-lag",
    ),
    Mutant(
        "KK11",
        "The position that a slot goes on at is fed back one step late.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(f"{_IO}:feed_back", "output.decodes_next_position", "output.decodes_next_position - 1"),),
        driver="device-starved",
    ),
    Mutant(
        "KK12",
        "Attention reads the pool as it was before the step's writes.",
        ("O1",),
        where="device",
        edits=(Edit(f"{_MODEL}.step", "self._sample(views,", "self._sample(self.views(pools),"),),
        driver="device-starved",
    ),
    Mutant(
        "KK13",
        "Page ids are narrowed to int8 before a decode writes.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                _DECODES,
                "entry[:, None], axis=1)[:, 0]",
                "entry[:, None], axis=1)[:, 0].astype(jnp.int8).astype(jnp.int32)",
            ),
        ),
        driver="device-wide",
    ),
    Mutant(
        "KK14",
        "Page ids are narrowed to uint8 before a chunk is written.",
        ("K1", "K2", "K3"),
        where="device",
        edits=(Edit(_PREFILL, "table.shape[0] - 1)]", "table.shape[0] - 1)].astype(jnp.uint8).astype(jnp.int32)"),),
        driver="device-wide",
    ),
    Mutant(
        "KK15",
        "Only the first page update of a step reaches the device.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                f"{_NEWS}:pack",
                "[: len(updates)] = [getattr(update, name) for update in updates]",
                "[:1] = [getattr(update, name) for update in updates[:1]]",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "KK16",
        "A padding row of the news is inserted into slot 0.",
        ("T6", "K1", "K3"),
        where="device",
        edits=(Edit(f"{_NEWS}:_nothing_new", 'view(packed, parts["insert_slots"])[:] = shape.batch_size', ""),),
        driver="device-starved",
    ),
    Mutant(
        "KK17",
        "A padding page update clears the first page of slot 0.",
        ("O1", "T1"),
        where="device",
        edits=(Edit(f"{_NEWS}:_nothing_new", 'view(packed, parts["update_slots"])[:] = shape.batch_size', ""),),
        driver="device-starved",
    ),
    Mutant(
        "KK18",
        "A slot whose EOS has come runs on until the host tells it to stop.",
        ("K2",),
        where="device",
        edits=(Edit(_OUTPUT, "xp.where(live & ~completes,", "xp.where(live,"),),
        driver="device-lag",
    ),
    Mutant(
        "KK19",
        "A sequence whose first token is its EOS joins the decodes on the device.",
        ("K2",),
        where="device",
        edits=(
            Edit(_OUTPUT, "xp.where(complete[0], FREE_POSITION, attn_meta.prefill_length)", "attn_meta.prefill_length"),
        ),
        driver="device-lag",
    ),
    Mutant(
        "KK20",
        "On the road of rows a sequence that has just ended is executed once more.",
        ("K2",),
        where="device",
        edits=(Edit("backends.jax_roads:rows_step", "(packed[:, _POSITION] >= eos)", "(packed[:, _POSITION] > eos)"),),
        driver="device-rows",
    ),
    Mutant(
        "KK21",
        "The length of a chunk's sequence is the end of the padded chunk.",
        ("O1", "K2"),
        where="device",
        edits=(
            Edit(
                f"{_IO}:ModelIOProcessor.prepare_model_input",
                "xp.minimum(ongoing_prefill.length, positions[0][-1] + 1)",
                "positions[0][-1] + 1",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "KK22",
        "A page update lands one entry early in the table, on the sequence's page before it.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                f"{_NEWS}:update_batch",
                'page_update_page_idxs=news["update_page_idxs"]',
                'page_update_page_idxs=abs(news["update_page_idxs"] - 1)',
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "KK23",
        "Rows are handed to the device without the page that only the longest of them has.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                "backends.jax_roads:pack_rows",
                "min(plan.table.shape[1], num_pages)",
                "int(plan.num_pages[chosen].max()) - 1",
            ),
        ),
        driver="device-rows",
    ),
    Mutant(
        "KK24",
        "The decodes that run beside a chunk are read through the chunk's page table.",
        ("O1",),
        where="device",
        edits=(
            Edit(
                f"{_MODEL}._sample",
                "table.append(decodes.decodes_page_table)",
                "table.append(0 * decodes.decodes_page_table + (table[0] if table else decodes.decodes_page_table))",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "KK25",
        "All heads of a token share the scale of its last head.",
        ("K1", "K3"),
        where="device",
        edits=(
            Edit(
                "paged_attention.quantize:Int8PerTokenHead.quantize",
                "step = xp.where",
                "scale = xp.broadcast_to(scale[..., -1:], scale.shape)\n    step = xp.where",
            ),
        ),
        driver="device-int8",
    ),
    Mutant(
        "KK26",
        "Query heads take turns over the K/V heads, where each K/V head has a group of neighbours.",
        ("K1", "K3", "O2"),
        where="device",
        edits=(
            Edit(
                "backends.jax_tiny:DecoderModel._attend",
                "query.reshape(sequences, rows, self.spec.kv_heads, -1, head_dim)",
                "query.reshape(sequences, rows, -1, self.spec.kv_heads, head_dim).swapaxes(2, 3)",
            ),
        ),
        driver="device-tiny",
    ),
    Mutant(
        "KK27",
        "Every device holds all heads of the cache.",
        ("K10",),
        where="device",
        edits=(
            Edit(
                "paged_attention.cache:page_sharding",
                "partition_manager.partition_spec(axes, shape))",
                "PartitionSpec())",
            ),
        ),
        driver="mesh-two",
    ),
)
