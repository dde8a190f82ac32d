"""Planted bugs in places that the catalogues leave out: pages and slots (KP), the scheduler (KS)."""

from __future__ import annotations

from sim.mutants import own_schedule
from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_BOOKS = "paged_attention.books:Books"
_SLOTS = "paged_attention.slots:SlotTable"
_SCHEDULER = "paged_attention.scheduler:InferenceScheduler"

PAGES: tuple[Mutant, ...] = (
    Mutant(
        "KP01",
        "When one step is applied every fence opens, those of later steps too.",
        ("P11",),
        edits=(Edit(f"{_BOOKS}.unfence", "due for due in self.fences if due <= step", "due for due in self.fences"),),
        driver="host-lag-two",
    ),
    Mutant(
        "KP02",
        "A fence opens one step after the step that it waited for.",
        ("P10",),
        edits=(Edit(f"{_BOOKS}.unfence", "due <= step", "due < step"),),
        driver="host-lag-two",
    ),
    Mutant(
        "KP03",
        "A last row that never ran stays due for release, so that its sequence loses its pages while it still decodes.",
        ("S7",),
        edits=(
            Edit(
                "paged_attention.planning:take_back",
                "books.spent = [sequence for sequence in books.spent if sequence not in flight.last_rows]",
                "pass",
            ),
        ),
        driver="host-lag-one",
    ),
    Mutant(
        "KP04",
        "A step that is taken back does not give its decodes the token back that they had left.",
        ("O3", "S7", "T6"),
        edits=(
            Edit(
                f"{_SLOTS}.restore",
                "self.turns -= 1",
                "pass",
            ),
        ),
        driver="host-lag-one",
    ),
    Mutant(
        "KP05",
        "Whoever is seated does not run until the next change in the slots: the list of running slots is stale.",
        ("S12", "S11"),
        edits=(
            Edit(
                f"{_SLOTS}._change",
                "self._seated = self._tables",
                "self._seated = self._seated if advance else None\n    self._tables",
            ),
        ),
    ),
    Mutant(
        "KP06",
        "The slot of a sequence whose last row has run is not put back into the free slots.",
        ("S11", "L6"),
        edits=(
            Edit(
                "paged_attention.scheduler:release_slot",
                "    _map(batch).pop(slot, None)\n    _slots(batch).put(slot)",
                "    if _map(batch).pop(slot, None) is not None:\n        _slots(batch).put(slot)",
            ),
        ),
        driver="host-one-slot",
    ),
    Mutant(
        "KP07",
        "A slot counts the pages of its last occupant until its new one grows.",
        ("P6", "S5"),
        edits=(
            Edit(
                f"{_SCHEDULER}._join",
                "self._capacity[task.slot] = len(task.page_indices) * self._page_size",
                "self._capacity[task.slot] = max(self._capacity[task.slot], self._page_size)",
            ),
        ),
    ),
    Mutant(
        "KP08",
        "A victim takes along its tokens from one position too early, and loses its newest.",
        ("S3", "R2"),
        edits=(Edit(f"{_BOOKS}.preempt", "first = sequence.num_fed_tokens + 1", "first = sequence.num_fed_tokens"),),
        driver="host-starved",
    ),
    Mutant(
        "KP09",
        "Whoever leaves a slot is fenced for the last step of its prefill, not for its last decode.",
        ("P11", "P1"),
        edits=(
            Edit(
                f"{_BOOKS}.give_back",
                'if sequence.state == "running":',
                'if sequence.state == "joining":',
            ),
        ),
        driver="host-lag-two",
    ),
    Mutant(
        "KP10",
        "A fence waits for the oldest step in flight, not for the last one that may touch its pages.",
        ("P11",),
        edits=(
            Edit(
                f"{_BOOKS}.give_back",
                "self.fences.setdefault(last_step, [])",
                "self.fences.setdefault(self.flights[0].plan.step, [])",
            ),
        ),
        driver="host-lag-two",
    ),
    Mutant(
        "KP11",
        "A sequence that joins with a new page is granted all its pages again.",
        ("P1",),
        edits=(
            Edit(
                "paged_attention.planning:take_in",
                "task.page_indices[len(sequence.pages) :]",
                "list(task.page_indices)",
            ),
        ),
    ),
    Mutant(
        "KP12",
        "The pages that a step which never ran was to tell the device of are never told.",
        ("K3", "K1", "O1"),
        where="device",
        edits=(
            Edit(
                "paged_attention.planning:_keep_untold",
                "for update in native.decodes_state_page_updates:",
                "for update in []:",
            ),
        ),
        driver="device-lag",
    ),
    Mutant(
        "KP13",
        "The row of a slot is cleared only where a victim leaves it, not at an ordinary end.",
        ("T2",),
        edits=(
            Edit(
                "paged_attention.scheduler:release_slot",
                "batch.page_table[slot] = DUMMY_PAGE",
                "batch.page_table[slot] = DUMMY_PAGE if slot in _map(batch) else batch.page_table[slot]",
            ),
        ),
        driver="host-one-slot",
    ),
    Mutant(
        "KP14",
        "A cancelled sequence that had begun to drain leaves its slot's position behind.",
        ("T6",),
        edits=(
            Edit(
                f"{_SLOTS}.clear",
                "NOBODY, NOBODY, slot, 1, 1, NOBODY,",
                "NOBODY, NOBODY, slot, 1, 1, max(self.position[slot], NOBODY),",
            ),
            Edit("paged_attention.scheduler:release_slot", "batch.positions[slot] = -1", "pass"),
        ),
    ),
    Mutant(
        "KP15",
        "Usage is quoted as a share of all pages, the dummy included.",
        ("M3",),
        edits=(Edit("sim.metrics:page_figures", "(recorder.policy.num_pages - 1)", "recorder.policy.num_pages"),),
    ),
)

RARELY_BROKEN: tuple[Mutant, ...] = (
    Mutant(
        "KP16",
        "The chunks of a prompt are fed again and again for the first hundred steps.",
        ("S6", "S7", "L2"),
        edits=(
            Edit(
                "paged_attention.planning:_count_prefill",
                "sequence.prefill.chunk_idx += 1\n    sequence.fed += count",
                "sequence.prefill.chunk_idx += step > 100\n    sequence.fed += count if step > 100 else 0",
            ),
        ),
    ),
    Mutant(
        "KP17",
        "A prompt is preempted and admitted again twice before its first chunk runs.",
        ("S10", "L4"),
        edits=(
            Edit(
                "paged_attention.planning:take_in",
                "effects.append(books.admit(native.prefill_request))\n",
                "effects.append(books.admit(native.prefill_request))\n"
                "            for _ in range(2):\n"
                "                effects += books.preempt(books.prefilling)\n"
                "                books.scheduler.prefill_queue.get_nowait()\n"
                "                effects.append(books.admit(native.prefill_request))\n",
            ),
        ),
    ),
    Mutant(
        "KP18",
        "Cancelling a request that is gone is told as a cancel.",
        ("R4",),
        edits=(
            Edit(
                "paged_attention.engine:PagedAttentionEngine.cancel",
                "return ()",
                'return (Effect("cancelled", request, 0),)',
            ),
        ),
    ),
    Mutant(
        "KP19",
        "The sum of stays leaves out one of the requests that are there.",
        ("M2",),
        edits=(Edit("sim.record:Recorder._live_changed", "self._live * (", "max(self._live - 1, 0) * ("),),
    ),
    Mutant(
        "KP20",
        "Refused requests are counted as arrived and as live.",
        ("M5",),
        edits=(Edit("sim.record:Recorder.rejected", "self.count_of_state[LIVE] -= 1", "pass"),),
    ),
)
"""Bugs of the statements that other bugs break only in passing."""

MUTANTS: tuple[Mutant, ...] = (*PAGES, *RARELY_BROKEN, *own_schedule.MUTANTS)
