"""Planted bugs in the scheduler, the books and the rows, beyond the catalogue's (KS)."""

from __future__ import annotations

from typing import Final

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_SCHEDULER: Final = "paged_attention.scheduler:InferenceScheduler"
_BOOKS: Final = "paged_attention.books:Books"
_ENGINE: Final = "paged_attention.engine:PagedAttentionEngine"
_PLANNING: Final = "paged_attention.planning"
_SLOTS: Final = "paged_attention.slots:SlotTable"
_ROWS: Final = "paged_attention.rows:mixed_rows"
_REFUSAL: Final = "paged_attention.sequences:refusal"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "KS01",
        "An abandoned step sets the waits back to zero, so that a decode may wait twice as long.",
        ("S12",),
        edits=(
            Edit(
                f"{_PLANNING}:take_back",
                "books.scheduler.decode_wait, books.scheduler.prefill_wait = flight.waits",
                "books.scheduler.decode_wait = books.scheduler.prefill_wait = 0",
            ),
        ),
    ),
    Mutant(
        "KS02",
        "What an abandoned step was to tell the device is forgotten.",
        ("K3", "K1", "T1"),
        where="device",
        edits=(Edit(f"{_PLANNING}:take_back", "_keep_untold(books, flight)", "pass"),),
    ),
    Mutant(
        "KS03",
        "Of the sequences that have their last row in one step only the first is ended.",
        ("O3",),
        edits=(Edit(f"{_ENGINE}.apply", "for sequence in flight.last_rows:", "for sequence in flight.last_rows[:1]:"),),
    ),
    Mutant(
        "KS04",
        "Of the EOS tokens of one step only the first is seen.",
        ("O3",),
        edits=(
            Edit(
                f"{_ENGINE}.apply",
                "outcome.eos.nonzero()[0].tolist()",
                "outcome.eos.nonzero()[0].tolist()[:1]",
            ),
        ),
    ),
    Mutant(
        "KS05",
        "A preempted request counts as submitted anew: the next victim is chosen by that.",
        ("S10",),
        edits=(
            Edit(
                f"{_BOOKS}.preempt",
                "sequence.prefill = self._initial(",
                "sequence.order, self._next_order = self._next_order, self._next_order + 1\n"
                "    sequence.prefill = self._initial(",
            ),
        ),
    ),
    Mutant(
        "KS06",
        "A prompt that leaves room for exactly one token gets none: the limit is one too low.",
        ("T6", "S6", "P10", "O3"),
        edits=(
            Edit(
                f"{_BOOKS}.enter",
                "self.metadata.max_sequences - len(request.prompt) + 1)",
                "max(1, self.metadata.max_sequences - len(request.prompt)))",
            ),
        ),
    ),
    Mutant(
        "KS07",
        "Under lag the token of an older step is fed to a slot that has already gone on.",
        ("S3",),
        edits=(
            Edit(
                f"{_BOOKS}.note_tokens",
                "newest = slots[table.last_step[slots] == outcome.step]",
                "newest = slots",
            ),
        ),
    ),
    Mutant(
        "KS08",
        "A preempted prefill stays the active one.",
        ("S7", "S10"),
        edits=(Edit(f"{_BOOKS}.preempt", "self.prefilling = None", "pass"),),
    ),
    Mutant(
        "KS09",
        "Queued decodes join by the pages that were free before, without counting what each of them takes.",
        ("S5", "P6"),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_joins",
                "if pages > spare:",
                "if pages > spare and not draft.num_joins:",
            ),
        ),
    ),
    Mutant(
        "KS10",
        "A request that was preempted may generate max_tokens from there on.",
        ("P10", "O3", "S4"),
        edits=(
            Edit(
                f"{_BOOKS}.join",
                "remaining=sequence.limit - sequence.planned",
                "remaining=sequence.limit - 1",
            ),
        ),
    ),
    Mutant(
        "KS11",
        "A slot's capacity in tokens stays that of whoever sat there before, where it was larger.",
        ("S5", "P6"),
        edits=(
            Edit(
                f"{_SCHEDULER}._join",
                "self._capacity[task.slot] = len(task.page_indices) * self._page_size",
                "self._capacity[task.slot] = max(\n"
                "            self._capacity[task.slot], len(task.page_indices) * self._page_size)",
            ),
        ),
    ),
    Mutant(
        "KS12",
        "The list of running slots is not made anew when one of them stops.",
        ("S7", "S4"),
        edits=(
            Edit(
                f"{_SLOTS}._change",
                "self._seated = self._tables",
                "self._seated = None if advance else self._seated\n    self._tables",
            ),
        ),
    ),
    Mutant(
        "KS13",
        "Table rows are taken by their number in the step, not by slot.",
        ("T1",),
        edits=(
            Edit(
                f"{_SLOTS}.tables",
                "self.pages.take(seated.slots, axis=0)",
                "self.pages.take(np.arange(len(seated.slots)), axis=0)",
            ),
            Edit(
                _ROWS,
                "table.pages.take(seated.lanes, axis=0)",
                "table.pages.take(np.arange(len(seated.lanes)) - 1, axis=0)",
            ),
        ),
    ),
    Mutant(
        "KS14",
        "The pages of ended sequences come back only when nothing is in flight.",
        ("P10",),
        edits=(
            Edit(
                f"{_ENGINE}.apply",
                "if not sequence.gave_back:",
                "if not sequence.gave_back and not books.flights:",
            ),
        ),
    ),
    Mutant(
        "KS15",
        "A request that ends by max_tokens is said to have reached the maximum length.",
        ("O3",),
        edits=(
            Edit(
                f"{_ENGINE}.apply",
                "cut_short = sequence.limit < sequence.request.max_tokens",
                "cut_short = sequence.limit <= sequence.request.max_tokens",
            ),
        ),
    ),
    Mutant(
        "KS16",
        "A prompt for which the pool has exactly the pages is left waiting.",
        ("S11",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "if self.manager.pages_for(_num_prompt_tokens(head)) <= free:",
                "if self.manager.pages_for(_num_prompt_tokens(head)) < free:",
            ),
        ),
    ),
    Mutant(
        "KS17",
        "A prefill starts where its first chunk fits, though its whole prompt must.",
        ("S11",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "if self.manager.pages_for(_num_prompt_tokens(head)) <= free:",
                "if self._chunk_pages(head) <= free:",
            ),
        ),
    ),
    Mutant(
        "KS18",
        "Abandoning the last chunk of a prompt leaves it in line for a slot as well.",
        ("S7", "S6"),
        edits=(Edit(f"{_PLANNING}:_uncount_prefill", "books.prefilled.remove(sequence)", "pass"),),
    ),
    Mutant(
        "KS19",
        "Abandoning a chunk does not take back its tokens, only its number.",
        ("S2",),
        edits=(
            Edit(f"{_PLANNING}:_uncount_prefill", "sequence.fed = int(flight.plan.start[0])", "pass"),
            Edit(
                f"{_PLANNING}:_uncount_prefill",
                "sequence.prefill.chunk_idx -= 1",
                "sequence.prefill.chunk_idx -= sequence.fed < sequence.num_fed_tokens",
            ),
        ),
    ),
    Mutant(
        "KS20",
        "Abandoning a step that yields a sequence's first token counts that token as planned.",
        ("S4", "S3", "O3"),
        edits=(Edit(f"{_PLANNING}:_uncount_prefill", "sequence.planned -= int(flight.plan.samples[0])", "pass"),),
    ),
    Mutant(
        "KS21",
        "A cancelled request that was prefilled stays in line for a slot.",
        ("crash",),
        edits=(Edit(f"{_BOOKS}.leave", "self.scheduler.decodes_queue.remove(sequence.task)", "pass"),),
    ),
    Mutant(
        "KS22",
        "Two errors that cancel out at lag 0: tokens are noted one place early in the history, and read from there.",
        ("S3",),
        edits=(
            Edit(f"{_SLOTS}.__init__", "self.history.shape[1] + 1", "self.history.shape[1]"),
            Edit(f"{_BOOKS}.preempt", "first = sequence.num_fed_tokens + 1", "first = sequence.num_fed_tokens"),
            Edit(
                f"{_BOOKS}._note_first_token",
                "self.slots.history[sequence.slot, sequence.num_fed_tokens] = token",
                "self.slots.history[sequence.slot, sequence.num_fed_tokens - 1] = token",
            ),
        ),
    ),
    Mutant(
        "KS23",
        "Two errors that nearly cancel out: a request's need is one token too many, and its pages are rounded down.",
        ("S13",),
        edits=(
            Edit(_REFUSAL, "length + request.max_tokens - 1", "length + request.max_tokens"),
            Edit(_REFUSAL, "need = -(-min(", "need = (min("),
        ),
    ),
    Mutant(
        "KS24",
        "Two errors that hide each other in most steps: a page too many at exact multiples, and growth one token late.",
        ("P6",),
        edits=(
            Edit(
                "paged_attention.pages:HBMPageManager.pages_for",
                "-(-num_tokens // self._metadata.page_size)",
                "num_tokens // self._metadata.page_size + 1",
            ),
            Edit(f"{_SCHEDULER}._growing_slots", "self._capacity <= positions", "self._capacity < positions"),
        ),
    ),
    Mutant(
        "KS25",
        "Of those who wait for a slot only one joins in a step.",
        ("S11",),
        edits=(Edit(f"{_SCHEDULER}._draft_joins", "_slots(batch), ", "range(1), "),),
        driver="host-prefill-first",
    ),
    Mutant(
        "KS26",
        "Whoever is prefilled waits for a slot until nothing is in flight.",
        ("S11",),
        edits=(Edit(f"{_ENGINE}.plan", "while books.prefilled:", "while books.prefilled and not books.flights:"),),
        driver="host-handover",
    ),
    Mutant(
        "KS27",
        "Every chunk is one token shorter than it could be, and pages are granted for that.",
        ("L1",),
        edits=(
            Edit(
                _ROWS,
                "count = min(chunk, total - start)",
                "count = min(max(1, chunk - 1), total - start)",
            ),
            Edit(
                f"{_SCHEDULER}._chunk_pages",
                "(request.chunk_idx + 1) * request.chunk_size",
                "(request.chunk_idx + 1) * max(1, request.chunk_size - 1)",
            ),
        ),
        driver="host-crowded",
    ),
    Mutant(
        "KS28",
        "A newcomer who ends before everybody else does not bring the next end forward.",
        ("O3",),
        edits=(Edit(f"{_SLOTS}.join", "self._first_end = min(self._first_end, end)", "pass"),),
        driver="host-crowded",
    ),
    Mutant(
        "KS29",
        "An abandoned step does not bring back the end that it had passed.",
        ("S7", "S4", "O3"),
        edits=(Edit(f"{_SLOTS}.restore", "self._first_end = self.turns", "pass"),),
        driver="host-handover",
    ),
)
