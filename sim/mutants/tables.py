"""Planted bugs in page tables and slots (MT)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_BATCH = "paged_attention.batch:ActiveSequenceBatch"
_SCHEDULER = "paged_attention.scheduler:InferenceScheduler"
_TELL = "if untold.releases or untold.joins or untold.pages:\n        _tell(books, native)"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MT01",
        "A slot's row is not cleared: only the pages of whoever comes next are written over it.",
        ("T2", "K4"),
        edits=(
            Edit(f"{_BATCH}.insert_from_task", "table[slot, len(task.page_indices) :] = DUMMY_PAGE", "pass"),
            Edit("paged_attention.scheduler:release_slot", "batch.page_table[slot] = DUMMY_PAGE", "pass"),
        ),
    ),
    Mutant(
        "MT02",
        "A page is appended to its row one entry too early, over the last one.",
        ("T1",),
        edits=(Edit(f"{_SCHEDULER}._grow", "batch.page_table[slot, logical]", "batch.page_table[slot, logical - 1]"),),
    ),
    Mutant(
        "MT03",
        "A page is appended to its row, but the row's page count is not raised.",
        ("T1", "S5"),
        edits=(
            Edit(
                "paged_attention.planning:take_in",
                "num_pages[slot] = first_page + 1",
                "num_pages[slot] = first_page",
            ),
        ),
    ),
    Mutant(
        "MT05",
        "A row that moves to fill a hole leaves its sampling parameters behind.",
        ("O11", "T4"),
        waits_for="rows that move",
    ),
    Mutant(
        "MT07",
        "A plan's table is filled for all of its decode rows but the last.",
        ("T1", "P3"),
        edits=(
            Edit(
                "paged_attention.slots:SlotTable.tables",
                "num_pages.setflags(",
                "pages[-1:] = 0\n        num_pages.setflags(",
            ),
            Edit(
                "paged_attention.rows:mixed_rows",
                "    for array in (columns, tokens, pages):\n",
                "    pages[-1:] *= not native.schedule_decodes\n    for array in (columns, tokens, pages):\n",
            ),
        ),
    ),
    Mutant(
        "MT08",
        "The device is told of new pages only in steps in which somebody joins.",
        ("K3", "K1", "T1", "O1"),
        where="device",
        edits=(Edit("paged_attention.step_news:pack", "    if updates:\n", "    if updates and tasks:\n"),),
        driver="device-starved",
    ),
    Mutant(
        "MT09",
        "The device is told of a new page one step after the one that writes to it.",
        ("K3", "K1", "T1", "O1"),
        where="device",
        edits=(
            Edit(
                "paged_attention.planning:next_step",
                _TELL,
                f"""\
late = [(int(slots.key[update.slot]), update) for update in native.decodes_state_page_updates]
    native.decodes_state_page_updates.clear()
    {_TELL}
    books.untold.pages += late""",
            ),
        ),
        driver="device-starved",
    ),
    Mutant(
        "MT10",
        "A victim's slot is free, but the victim is still mapped to it.",
        ("T3",),
        edits=(
            Edit(
                "paged_attention.books:Books.preempt",
                'sequence.pages = "waiting", NOBODY, None, []',
                'sequence.pages = "waiting", slot, None, []',
            ),
        ),
        driver="host-starved",
    ),
    Mutant(
        "MT12",
        "A row's place in the table is computed with floor(max length / page size) entries a row.",
        ("T1", "P7"),
        edits=(
            Edit(
                f"{_SCHEDULER}._grow",
                "batch.page_table[slot, logical] = page",
                "batch.page_table.reshape(-1)[slot * (self.max_seq_len // page_size) + logical] = page",
            ),
        ),
        driver="host-lag-two",
    ),
    Mutant(
        "MT13",
        "Entries past the end of a row are -1 in place of the dummy page.",
        ("T2", "K2"),
        edits=(
            Edit(
                f"{_BATCH}.insert_from_task",
                "table[slot, len(task.page_indices) :] = DUMMY_PAGE",
                "table[slot, len(task.page_indices) :] = -1",
            ),
        ),
    ),
)
