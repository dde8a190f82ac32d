"""Planted bugs in the rules SEED-01 to SEED-32: the behaviour that each forbids.

A rule about calls that no scenario makes is broken before the eyes of a contract (`sim.mutants.contracts`), and the
rule itself is then what is violated.
"""

from __future__ import annotations

from typing import Final

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_SCHEDULER: Final = "paged_attention.scheduler:InferenceScheduler"
_BOOKS: Final = "paged_attention.books:Books"
_ENGINE: Final = "paged_attention.engine:PagedAttentionEngine"
_METADATA: Final = "paged_attention.metadata:PagedAttentionCacheMetaData"
_MODEL_IO: Final = "paged_attention.model_io"
_ROWS: Final = "paged_attention.rows:mixed_rows"
_REFUSAL: Final = "paged_attention.sequences:refusal"
_LIMIT: Final = "min(request.max_tokens, self.metadata.max_sequences - len(request.prompt) + 1)"

_PAGES_OF_EACH_CHUNK: Final = """\
left = _num_prompt_tokens(active) - active.chunk_idx * active.chunk_size
        missing = self.manager.pages_for(min(active.chunk_size, left))"""

_TAKE_AND_RETURN: Final = """\
count = draft.num_prefill_pages
        pages = self.manager.alloc_hbm_pages(count + 1) or self.manager.alloc_hbm_pages(count)
        self.manager.free_hbm_pages(pages[count:])
        del pages[count:]"""

_TOKEN_BY_SLOT: Final = """\
mine = (table.last_step[slots] == outcome.step) | (table.key[slots] != seated.key[kept])
        newest = slots[mine]"""

_END_BY_SLOT: Final = """\
first = flight.plan.num_rows - len(flight.seated.slots)
    if row >= first:
        return self.in_slot[flight.seated.slots[row - first]]"""

_FIRST_SHAPE_WINS: Final = """\
return _parts(vars(_parts).setdefault(self.batch_size, self))"""

_CLAMPED_CHUNK: Final = "start = min(request.chunk_idx * shape.chunk_size, len(request.token_ids) - shape.chunk_size)"


def _contract(name: str, rule: str, sentence: str, contract: str, *edits: Edit) -> Mutant:
    return Mutant(name, sentence, (rule,), edits=edits, driver=f"contract:{contract}")


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "SEED-01",
        "Every chunk of a prefill is written from the start of the sequence, not from its own.",
        ("K1",),
        where="device",
        edits=(Edit("paged_attention.writes:write_prefill_jax", "start = position[0]", "start = position[0] * 0"),),
    ),
    Mutant(
        "SEED-02",
        "The first token comes from the end of the padded chunk, not from the last real token.",
        ("K2", "O1"),
        where="device",
        edits=(
            Edit(
                f"{_MODEL_IO}:ModelIOProcessor.prepare_model_input",
                "xp.minimum(ongoing_prefill.length, positions[0][-1] + 1)",
                "positions[0][-1] + 1",
            ),
        ),
    ),
    Mutant(
        "SEED-02b",
        "The first chunk of a prompt yields the first token, whatever is still to come.",
        ("S3",),
        edits=(
            Edit(
                _ROWS,
                "samples = int(start + count == total)",
                "samples = int(start == 0)",
            ),
        ),
    ),
    Mutant(
        "SEED-03",
        "A slot without a sequence writes to page -1, which is the last page of the pool.",
        ("K2",),
        where="device",
        edits=(
            Edit(
                "paged_attention.writes:write_decodes_jax",
                "page = jnp.where(live, page, num_pages)",
                "page = jnp.where(live, page, -1)",
            ),
        ),
    ),
    Mutant(
        "SEED-03b",
        "A slot that is given back keeps its row of pages.",
        ("T2",),
        edits=(Edit("paged_attention.scheduler:release_slot", "batch.page_table[slot] = DUMMY_PAGE", "pass"),),
    ),
    Mutant(
        "SEED-04",
        "What a step yielded is applied to whoever sits in the slot now: its token, and its end.",
        ("S3", "O3"),
        edits=(
            Edit(f"{_BOOKS}.sequence_of", "first = flight.plan.num_rows - len(flight.seated.slots)", _END_BY_SLOT),
            Edit(
                f"{_BOOKS}.note_tokens",
                "kept = (table.key[slots] == seated.key).nonzero()[0]",
                "kept = (table.key[slots] >= 0).nonzero()[0]",
            ),
            Edit(
                f"{_BOOKS}.note_tokens",
                "newest = slots[table.last_step[slots] == outcome.step]",
                _TOKEN_BY_SLOT,
            ),
            Edit(f"{_BOOKS}.note_tokens", "table.history[newest, table.position[newest]]", "tokens[mine]"),
        ),
    ),
    Mutant(
        "SEED-05",
        "The pages of an ended sequence are free at once, though a step in flight still writes to them.",
        ("P10", "P1", "P11"),
        edits=(
            Edit(
                f"{_BOOKS}.give_back",
                "if self.flights and last_step >= self.flights[0].plan.step:",
                "if self.flights and last_step < 0:",
            ),
        ),
    ),
    Mutant(
        "SEED-05b",
        "The device is not told that a sequence had its last row, and writes on in its slot.",
        ("K2", "T6"),
        where="device",
        edits=(
            Edit(
                "paged_attention.planning:_count_decodes",
                "books.untold.releases.append(slot)",
                "pass",
            ),
            Edit(f"{_BOOKS}.give_back", "if slot not in self.untold.releases:", "if slot < 0:"),
        ),
    ),
    Mutant(
        "SEED-06",
        "The maximum length ends no sequence.",
        ("O3", "S4"),
        edits=(Edit(f"{_BOOKS}.enter", _LIMIT, "request.max_tokens"),),
    ),
    Mutant(
        "SEED-07",
        "A prompt that is too long is cut without a word.",
        ("S13",),
        edits=(
            Edit(_REFUSAL, "if length > longest:", "if length < 0:"),
            Edit(f"{_BOOKS}.enter", _LIMIT, f"max(1, {_LIMIT})"),
            Edit(
                f"{_BOOKS}.enter",
                "self._initial(request, request.prompt, order)",
                "self._initial(request, request.prompt[: self.metadata.max_sequences], order)",
            ),
        ),
    ),
    Mutant(
        "SEED-07b",
        "A request that needs more pages than the pool has is queued all the same.",
        ("S13",),
        edits=(Edit(_REFUSAL, "if need > pool:", "if need > pool + longest:"),),
    ),
    Mutant(
        "SEED-08",
        "A request yields one token more than max_tokens.",
        ("P10", "O3", "S4"),
        edits=(
            Edit(
                f"{_BOOKS}.enter",
                "min(request.max_tokens, ",
                "min(request.max_tokens + 1, ",
            ),
        ),
    ),
    _contract(
        "SEED-09",
        "SEED-09",
        "top_p drops the token that crosses the threshold.",
        "sampler",
        Edit("paged_attention.sampling:sample", "(before < threshold)", "(reached < threshold)"),
    ),
    _contract(
        "SEED-09b",
        "SEED-09",
        "Temperature 0 draws at random.",
        "sampler",
        Edit("paged_attention.sampling:sample", "xp.where(temperature > 0, drawn, 0)", "drawn"),
    ),
    Mutant(
        "SEED-10",
        "The first token of a request is sampled with nobody's parameters: the seed of its prefill is left out.",
        ("O11", "O1"),
        where="device",
        edits=(
            Edit(
                "paged_attention.step_news:_pack_chunk",
                'view(packed, parts[f"prefill_{name}"])[:] = getattr(request.sampling_params, name)',
                "pass",
            ),
        ),
    ),
    Mutant(
        "SEED-10b",
        "A slot keeps the sampling seed of whoever sat there before.",
        ("O11", "O1"),
        where="device",
        edits=(
            Edit(
                "paged_attention.sampling:SamplingParams.insert_decode_state",
                "put_rows(getattr(self, n), insert_slots, getattr(source, n))",
                'getattr(self, n) if n == "seed" else put_rows(getattr(self, n), insert_slots, getattr(source, n))',
            ),
        ),
    ),
    _contract(
        "SEED-11",
        "SEED-11",
        "The chunk size of the first step is kept for every later one.",
        "chunk-sizes",
        Edit("paged_attention.step_news:StepShape.parts", "return _parts(self)", _FIRST_SHAPE_WINS),
    ),
    _contract(
        "SEED-12",
        "SEED-12",
        "A padding bucket that is no multiple of the chunk ends in a chunk that is moved back to fit.",
        "padding-buckets",
        Edit(
            "paged_attention.requests:InitialSequenceRequest.create",
            "padded = -(-padded // chunk_size) * chunk_size",
            "padded = max(padded, chunk_size)",
        ),
        Edit("paged_attention.step_news:_pack_chunk", "start = request.chunk_idx * shape.chunk_size", _CLAMPED_CHUNK),
    ),
    Mutant(
        "SEED-13",
        "Each chunk gets whole pages of its own, and the partly filled page of the chunk before is lost.",
        ("P6",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "missing = self._chunk_pages(active) - int(np.count_nonzero(active.page_indices))",
                _PAGES_OF_EACH_CHUNK,
            ),
        ),
    ),
    Mutant(
        "SEED-14",
        "Where one sequence is at a page boundary, a free page for every running one is asked for.",
        ("S10", "S11"),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_decodes",
                "spare = free - len(draft.growing_slots)",
                "spare = free - (len(_map(batch)) if draft.growing_slots else 0)",
            ),
        ),
    ),
    Mutant(
        "SEED-14b",
        "A sequence gets its next page one token before it needs it.",
        ("P6",),
        edits=(
            Edit(
                f"{_SCHEDULER}._growing_slots",
                "(self._capacity <= positions)",
                "((self._capacity <= positions + 1) & (positions >= 0))",
            ),
        ),
    ),
    Mutant(
        "SEED-15",
        "A plan that fails for want of pages keeps those that it has handed out by then.",
        ("P9", "P1"),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_decodes",
                "if not may_preempt:",
                "if not may_preempt:\n        self._grow(draft.growing_slots[:free], batch)",
            ),
        ),
    ),
    Mutant(
        "SEED-16",
        "Want of pages raises, though a preemption policy is configured.",
        ("crash",),
        edits=(Edit(f"{_SCHEDULER}._draft_decodes", 'if self.policy.preemption == "none":', "if free >= 0:"),),
    ),
    _contract(
        "SEED-16b",
        "SEED-16",
        "Without a preemption policy somebody is preempted all the same.",
        "no-policy",
        Edit(f"{_SCHEDULER}._draft_decodes", 'if self.policy.preemption == "none":', "if free < 0:"),
    ),
    Mutant(
        "SEED-17",
        "An EOS as the very first token is not seen: the request becomes a decode.",
        ("O3",),
        edits=(
            Edit(
                f"{_ENGINE}.apply",
                "sequence = books.sequence_of(flight, row)",
                "sequence = books.sequence_of(flight, row) if flight.plan.slot[row] >= 0 else None",
            ),
        ),
    ),
    Mutant(
        "SEED-18",
        "A sequence that joins before the host knows its first token is one position further on the device.",
        ("K1", "T6"),
        where="device",
        edits=(
            Edit(
                f"{_MODEL_IO}:ModelIOProcessor.prepare_model_output",
                "xp.where(complete[0], FREE_POSITION, attn_meta.prefill_length)",
                "xp.where(complete[0], FREE_POSITION, attn_meta.prefill_length + 1)",
            ),
        ),
    ),
    _contract(
        "SEED-19",
        "SEED-19",
        "Pages are taken back unseen: twice, or from somebody who does not own them.",
        "pages",
        Edit(
            "paged_attention.pages:HBMPageManager.free_hbm_pages",
            "if not (distinct <= self._owned and len(distinct) == len(returned)):",
            "if min(returned, default=0) < 0:",
        ),
    ),
    Mutant(
        "SEED-20",
        "With nothing to do a plan is made all the same, and the loop spins.",
        ("S11",),
        edits=(
            Edit(
                f"{_SCHEDULER}.create_plan",
                "if draft is None or not (draft.run_decodes or draft.prefill):",
                "if draft is None:",
            ),
        ),
    ),
    _contract(
        "SEED-21",
        "SEED-21",
        "Shutting down forgets those who wait, and leaves the others their pages and slots.",
        "shutdown",
        Edit(
            f"{_ENGINE}.shutdown",
            "for request in list(self.books.sequences)",
            'for request, s in list(self.books.sequences.items()) if s.state == "waiting"',
        ),
    ),
    Mutant(
        "SEED-22",
        "Cancelling a request whose last row is in flight does not give back what it holds.",
        ("R3", "P10"),
        edits=(
            Edit(
                f"{_ENGINE}.cancel",
                "elif not sequence.gave_back:",
                'elif not sequence.gave_back and sequence.state != "draining":',
            ),
        ),
    ),
    Mutant(
        "SEED-22b",
        "Cancelling a request in its prefill frees its pages a second time, with the next end.",
        ("P5", "R3"),
        edits=(
            Edit(
                f"{_ENGINE}.cancel",
                "books.leave(sequence)",
                'books.spent += [sequence] if sequence.state == "prefill" else []\n            books.leave(sequence)',
            ),
            Edit(f"{_ENGINE}.apply", "if not sequence.gave_back:", "if sequence.state != 'joining':"),
            Edit(
                f"{_BOOKS}.give_back",
                "self.manager.free_hbm_pages(freed.pages)",
                "freed.pages and self.manager.free_hbm_pages(freed.pages)",
            ),
        ),
    ),
    Mutant(
        "SEED-23",
        "A prefill waits for as long as there are decodes.",
        ("S12",),
        edits=(Edit(f"{_SCHEDULER}._draft", " and self.prefill_wait < self.policy.max_prefill_wait", ""),),
    ),
    _contract(
        "SEED-24",
        "SEED-24",
        "An empty prompt is accepted.",
        "refusals",
        Edit(_REFUSAL, "if length == 0:", "if length < 0:"),
        Edit("paged_attention.requests:_refuse", "if length == 0:", "if length < 0:"),
    ),
    _contract(
        "SEED-25",
        "SEED-25",
        "Nobody looks at a page id before it is written to.",
        "page-ids",
        Edit("paged_attention.writes:check_pages", "if wrong.size:", "if wrong.size > pages.size:"),
    ),
    _contract(
        "SEED-25b",
        "SEED-25",
        "What a step tells the device may name pages outside the pool.",
        "page-ids",
        Edit("paged_attention.step_news:_check_pages", ">= num_pages:", ">= 2**31:"),
    ),
    _contract(
        "SEED-26",
        "SEED-26",
        "A share of the memory above 1 is accepted.",
        "metadata",
        Edit(f"{_METADATA}.__post_init__", "_require_share(self.hbm_utilization)", "pass"),
    ),
    _contract(
        "SEED-26b",
        "SEED-26",
        "Metadata for fewer pages than one sequence needs is made.",
        "metadata",
        Edit(f"{_METADATA}.create", "if num_pages < num_pages_per_sequence + 1:", "if num_pages < 1:"),
    ),
    _contract(
        "SEED-27",
        "SEED-27",
        "All batches of a process share one lock.",
        "locks",
        Edit(
            "paged_attention.batch:ActiveSequenceBatch.create",
            "active_slot_requests_map={},",
            'active_slot_requests_map={}, context_lock=vars(pytree.register).setdefault("lock", threading.Lock()),',
        ),
    ),
    Mutant(
        "SEED-28",
        "A sequence and its decode task share one page list, which both extend.",
        ("T1", "P13", "P7"),
        edits=(Edit(f"{_BOOKS}.queue_decode", "page_indices=list(sequence.pages)", "page_indices=sequence.pages"),),
    ),
    Mutant(
        "SEED-29",
        "A sequence reads one position beyond its end, which at a page edge lies in the dummy page.",
        ("O1", "K4", "K5"),
        where="device",
        edits=(
            Edit(
                "backends.jax_reader:PageReader.wrong_words",
                "(length + self._page_size - 1) // self._page_size",
                "(length + self._page_size) // self._page_size * (length > 0)",
            ),
            Edit("backends.jax_reader:PageReader._count", "(position < end)", "(position <= end)"),
        ),
    ),
    Mutant(
        "SEED-30",
        "A prefill takes one page more than it needs and returns it.",
        ("P13",),
        edits=(
            Edit(
                f"{_SCHEDULER}._commit",
                "pages = self.manager.alloc_hbm_pages(draft.num_prefill_pages)",
                _TAKE_AND_RETURN,
            ),
        ),
    ),
    _contract(
        "SEED-31",
        "SEED-31",
        "Rows at one position draw the same number whatever their seeds.",
        "sampler",
        Edit(
            "paged_attention.sampling:uniform",
            "xp.asarray(seed).astype(xp.uint32) +",
            "xp.asarray(seed).astype(xp.uint32) * xp.uint32(0) +",
        ),
    ),
    Mutant(
        "SEED-32",
        "Prefills start without a slot to come, so that the queue of those who wait for one grows without bound.",
        ("S11",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "elif self.prefill_queue and len(_slots(batch)) > len(self.decodes_queue):",
                "elif self.prefill_queue:",
            ),
        ),
    ),
    _contract(
        "SEED-32b",
        "SEED-32",
        "Steps are planned ahead of their outcomes without bound.",
        "pipeline",
        Edit(f"{_ENGINE}.plan", "if len(books.flights) > self.lag:", "if len(books.flights) > 64:"),
    ),
)
