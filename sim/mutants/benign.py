"""Legal variants of our own code, declared as such: whoever complains about one is wrong."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_MANAGER = "paged_attention.pages:HBMPageManager"
_SCHEDULER = "paged_attention.scheduler:InferenceScheduler"
_ENGINE = "paged_attention.engine:PagedAttentionEngine"

_GROWTH = "updates = self._grow(draft.growing_slots, batch) if draft.run_decodes and draft.growing_slots else []"


def _declared(what: str) -> Edit:
    """What the core says of itself beyond the usual."""
    return Edit(f"{_ENGINE}.policy", "mix=own.mix,", f"mix=own.mix, {what},")


def _policy(what: str) -> Edit:
    """The core runs another scheduling policy than it was asked for, and says so."""
    return Edit(
        f"{_ENGINE}.__init__",
        "prefill_chunk, policy, free_pages",
        f"prefill_chunk, __import__('dataclasses').replace(policy, {what}), free_pages",
    )


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "benign-lifo",
        "Free pages are a stack: the page given back last is handed out first.",
        edits=(
            Edit(
                f"{_MANAGER}.alloc_hbm_pages",
                "self._available_hbm_pages.take(n)",
                "[self._available_hbm_pages.pop() for _ in range(n)]",
            ),
            Edit(
                f"{_MANAGER}.__init__",
                "range(DUMMY_PAGE + 1, metadata.num_pages_per_layer)",
                "range(metadata.num_pages_per_layer - 1, DUMMY_PAGE, -1)",
            ),
            Edit(f"{_MANAGER}.free_pages", "list(self._available_hbm_pages)", "list(self._available_hbm_pages)[::-1]"),
            _declared('free_list="lifo"'),
        ),
        benign=True,
    ),
    Mutant(
        "benign-lowest-page",
        "The lowest free page is handed out first.",
        edits=(
            Edit(
                f"{_MANAGER}.alloc_hbm_pages",
                "self._available_hbm_pages.take(n)",
                "sorted(self._available_hbm_pages)[:n]\n    for page in pages:\n"
                "        self._available_hbm_pages.remove(page)",
            ),
            Edit(f"{_MANAGER}.free_pages", "list(self._available_hbm_pages)", "sorted(self._available_hbm_pages)"),
            _declared('free_list="lowest"'),
        ),
        benign=True,
    ),
    Mutant(
        "benign-any-page",
        "Free pages are handed out in an order of their own, which is declared to be nobody's business.",
        edits=(
            Edit(
                f"{_MANAGER}.free_hbm_pages",
                "extend(returned)",
                "extend(sorted(returned, key=lambda page: page * 7 % 13))",
            ),
            _declared('free_list="any"'),
        ),
        benign=True,
    ),
    Mutant(
        "benign-highest-slot",
        "Slots are handed out from the last one down.",
        edits=(
            Edit(
                "paged_attention.batch:ActiveSequenceBatch.create",
                "available_slots=Fifo(range(slots))",
                "available_slots=Fifo(range(slots - 1, -1, -1))",
            ),
        ),
        benign=True,
    ),
    Mutant(
        "benign-newest-slot",
        "The slot that was given back last is taken first.",
        edits=(
            Edit("paged_attention.scheduler:release_slot", "_slots(batch).put(slot)", "_slots(batch).put_first(slot)"),
        ),
        benign=True,
    ),
    Mutant(
        "benign-prefill-first",
        "Prefills go first, for up to seven steps in a row.",
        edits=(_policy("mix='prefill_first', max_decode_wait=7"),),
        benign=True,
    ),
    Mutant(
        "benign-decode-first",
        "Decodes go first, and a prefill waits for at most one step.",
        edits=(_policy("mix='decode_first', max_prefill_wait=1"),),
        benign=True,
    ),
    Mutant(
        "benign-no-wait",
        "Prefills are declared to go first, with no wait allowed: every step is mixed.",
        edits=(_policy("mix='prefill_first', max_decode_wait=0"),),
        benign=True,
    ),
    Mutant(
        "benign-first-chunk",
        "A prefill starts as soon as the pages of its first chunk are free.",
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "self.manager.pages_for(_num_prompt_tokens(head)) <= free",
                "self._chunk_pages(head) <= free",
            ),
            _declared('admission_pages="chunk"'),
        ),
        benign=True,
    ),
    Mutant(
        "benign-whole-prompt",
        "A prompt gets all of its pages at its admission, declared as lookahead.",
        edits=(
            Edit(
                f"{_SCHEDULER}._chunk_pages",
                "self.manager.pages_for(min(end, _num_prompt_tokens(request)))",
                "self.manager.pages_for(max(min(end, 0), _num_prompt_tokens(request)))",
            ),
            _declared("lookahead=meta.max_sequences"),
        ),
        benign=True,
    ),
    Mutant(
        "benign-early-page",
        "A decode gets its next page one token early where the pages are free, declared as lookahead.",
        edits=(
            Edit(
                f"{_SCHEDULER}._growing_slots",
                "    return (self._capacity <= positions).nonzero()[0].tolist()",
                "    need = self._capacity <= positions\n"
                "    soon = (positions >= 0) & (positions + 1 < self.max_seq_len)\n"
                "    early = need | (soon & (self._capacity <= positions + 1))\n"
                "    chosen = early if np.count_nonzero(early) <= self.manager.num_available_pages else need\n"
                "    return chosen.nonzero()[0].tolist()",
            ),
            _declared("lookahead=1"),
        ),
        benign=True,
    ),
    Mutant(
        "benign-largest-victim",
        "The holder of the most pages is preempted, declared as the core's own choice.",
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_preemption",
                "sorted(holders, key=_order, reverse=True)",
                "sorted(holders, key=lambda holder: (len(_pages_of(holder)), _order(holder)), reverse=True)",
            ),
            _declared('victim="any"'),
        ),
        benign=True,
    ),
    Mutant(
        "benign-no-fence",
        "Pages are free at once, since the device runs its steps in order, and no fence is declared.",
        edits=(
            Edit(
                "paged_attention.books:Books.give_back",
                "if self.flights and last_step >= self.flights[0].plan.step:",
                "if last_step is None:",
            ),
            _declared("fence=False"),
        ),
        benign=True,
    ),
    Mutant(
        "benign-joins-first",
        "Those that join are given their pages before the decodes that grow.",
        edits=(
            Edit(
                f"{_SCHEDULER}._commit",
                f"    {_GROWTH}\n",
                "",
            ),
            Edit(
                f"{_SCHEDULER}._commit",
                "    prefill, new_pages = self._no_prefill, _NO_PAGES",
                f"    {_GROWTH}\n    prefill, new_pages = self._no_prefill, _NO_PAGES",
            ),
            Edit(
                "paged_attention.planning:take_in",
                "    for update in native.decodes_state_page_updates:\n",
                "    def grow():\n      for update in native.decodes_state_page_updates:\n",
            ),
            Edit(
                "paged_attention.planning:take_in",
                "    if native.schedule_prefill:\n",
                "    grow()\n    if native.schedule_prefill:\n",
            ),
        ),
        benign=True,
    ),
    Mutant(
        "benign-growth-downwards",
        "Decodes that grow are given their pages from the last slot down.",
        edits=(Edit(f"{_SCHEDULER}._growing_slots", "nonzero()[0].tolist()", "nonzero()[0].tolist()[::-1]"),),
        benign=True,
    ),
    Mutant(
        "benign-ends-downwards",
        "Sequences that end in one step are ended from the last row up.",
        edits=(
            Edit(f"{_ENGINE}.apply", "outcome.eos.nonzero()[0].tolist()", "outcome.eos.nonzero()[0].tolist()[::-1]"),
        ),
        benign=True,
    ),
    Mutant(
        "benign-shortest-first",
        "The shortest prompt is admitted first and an unfinished prefill is the first victim, both by declared choice.",
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "self.prefill_queue.peek()",
                "min(self.prefill_queue, key=_num_prompt_tokens)",
            ),
            Edit(
                f"{_SCHEDULER}._commit",
                "self.prefill_queue.get_nowait() if draft.prefill_is_new else draft.prefill",
                "draft.prefill\n        if draft.prefill_is_new:\n            self.prefill_queue.remove(request)",
            ),
            # An old prompt may be admitted late: were it kept, nobody could be left to run.
            Edit(
                f"{_SCHEDULER}._draft_preemption",
                "sorted(holders, key=_order, reverse=True)",
                "sorted(holders, key=lambda holder: (holder is active, _order(holder)), reverse=True)",
            ),
            _declared('admission="any", victim="any"'),
        ),
        benign=True,
    ),
    Mutant(
        "benign-buckets",
        "What the device is told in a step is padded to powers of two.",
        where="device",
        edits=(Edit("paged_attention.step_news:bucket", "width *= 8", "width *= 2"),),
        benign=True,
    ),
)
