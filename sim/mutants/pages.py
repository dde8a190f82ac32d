"""Planted bugs in the page manager (MP)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_MANAGER = "paged_attention.pages:HBMPageManager"
_SCHEDULER = "paged_attention.scheduler:InferenceScheduler"
_BOOKS = "paged_attention.books:Books"

_SHARING = "prefix sharing"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MP01",
        "The pool starts at page 0, so that the dummy is handed out.",
        ("P3",),
        edits=(Edit(f"{_MANAGER}.__init__", "Fifo(range(DUMMY_PAGE + 1,", "Fifo(range(DUMMY_PAGE,"),),
    ),
    Mutant(
        "MP02",
        "The pool ends one page too late, so that a page that does not exist is handed out.",
        ("P8", "P2"),
        edits=(Edit(f"{_MANAGER}.__init__", "metadata.num_pages_per_layer)", "metadata.num_pages_per_layer + 1)"),),
    ),
    Mutant(
        "MP04",
        "Freeing pages forgets the last one.",
        ("P2", "P1", "P12"),
        edits=(Edit(f"{_MANAGER}.free_hbm_pages", "extend(returned)", "extend(returned[:-1])"),),
    ),
    Mutant(
        "MP05",
        "A sequence that ends gives back its full pages only and forgets a partly filled last one.",
        ("P10", "P2"),
        edits=(
            Edit(
                f"{_BOOKS}.give_back",
                "pages=tuple(sequence.pages))",
                """pages=tuple(
            sequence.pages[: (len(sequence.request.prompt) + sequence.limit - 1) // self.metadata.page_size]
            if sequence.state == "draining"
            else sequence.pages
        ))""",
            ),
        ),
        driver="host-lag-one",
    ),
    Mutant(
        "MP06",
        "A request that was preempted once is given back twice when it ends.",
        ("P5",),
        edits=(
            Edit(
                "paged_attention.engine:PagedAttentionEngine.apply",
                "if not sequence.gave_back:",
                "if not sequence.gave_back or sequence.admission > 1:",
            ),
        ),
        driver="host-prefill-first",
    ),
    Mutant(
        "MP08",
        "The page count is n // page_size + 1: one too many where the last page is full.",
        ("P6", "S11"),
        edits=(
            Edit(
                f"{_MANAGER}.pages_for",
                "-(-num_tokens // self._metadata.page_size)",
                "num_tokens // self._metadata.page_size + 1",
            ),
        ),
    ),
    Mutant(
        "MP09",
        "The page count is n // page_size: none for a partly filled last page.",
        ("P6", "S5"),
        edits=(
            Edit(
                f"{_MANAGER}.pages_for",
                "-(-num_tokens // self._metadata.page_size)",
                "num_tokens // self._metadata.page_size",
            ),
        ),
    ),
    Mutant(
        "MP10",
        "A decode grows one token too late: after it has written past its last page.",
        ("S5", "P6", "K1"),
        edits=(Edit(f"{_SCHEDULER}._growing_slots", "self._capacity <= positions", "self._capacity < positions"),),
    ),
    Mutant(
        "MP11",
        "A further chunk is given all pages of the prompt so far, not those that it lacks.",
        ("P6",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "self._chunk_pages(active) - int(np.count_nonzero(active.page_indices))",
                "self._chunk_pages(active)",
            ),
        ),
    ),
    Mutant(
        "MP12",
        "A prompt that does not fit keeps the pages that were popped before that was found out.",
        ("P9", "P2"),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "        if self.manager.pages_for(_num_prompt_tokens(head)) <= free:",
                """        short = self.manager.pages_for(_num_prompt_tokens(head)) > free
        if short and free > 0:
            self.manager.alloc_hbm_pages(free)
        if not short:""",
            ),
        ),
        driver="host-starved",
    ),
    Mutant(
        "MP14",
        "The last free page is never used: a prompt that fits exactly is not admitted.",
        ("S11",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill", "_num_prompt_tokens(head)) <= free", "_num_prompt_tokens(head)) < free"
            ),
        ),
        driver="host-starved",
    ),
    Mutant(
        "MP15",
        "A prompt is admitted that needs one page more than is free.",
        ("S11", "P6"),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "_num_prompt_tokens(head)) <= free",
                "_num_prompt_tokens(head)) <= free + 1",
            ),
        ),
        driver="host-starved",
    ),
    Mutant(
        "MP16",
        "The pages that decodes grow by are set aside twice before a prompt is admitted.",
        ("S11",),
        edits=(
            Edit(f"{_SCHEDULER}._draft", "free -= len(draft.growing_slots)", "free -= 2 * len(draft.growing_slots)"),
        ),
        driver="host-starved",
    ),
    Mutant("MP18", "A freed page keeps a reference.", ("P4", "P2"), waits_for=_SHARING),
    Mutant("MP19", "A hit on a cached page leaves it in the free list.", ("P1",), waits_for=_SHARING),
    Mutant(
        "MP20",
        "Pages are freed head first, so that a prefix loses its head before its tail.",
        ("P13", "X5"),
        waits_for=_SHARING,
    ),
    Mutant("MP22", "The hash of a page leaves out its parent's.", ("X3", "O1"), waits_for=_SHARING),
    Mutant("MP23", "A hit covers the whole prompt and leaves no token to compute.", ("X4", "S1"), waits_for=_SHARING),
    Mutant("MP25", "A partly filled page enters the prefix cache.", ("X2", "X3"), waits_for=_SHARING),
    Mutant("MP26", "The hash leaves out the salt and the adapter.", ("X7",), waits_for=_SHARING),
    Mutant(
        "MP27",
        "Pages go to the free list although a step in flight still writes to them.",
        ("P11", "P1", "K1"),
        edits=(
            Edit(
                f"{_BOOKS}.give_back",
                "if self.flights and last_step >= self.flights[0].plan.step:",
                "if self.flights and last_step > self.flights[-1].plan.step:",
            ),
        ),
        driver="host-lag-two",
    ),
    Mutant(
        "MP29",
        "Freed pages pass through a set, so that their order is the set's.",
        ("P13",),
        edits=(Edit(f"{_MANAGER}.free_hbm_pages", "extend(returned)", "extend(set(returned))"),),
    ),
    Mutant(
        "MP30",
        "Page ids are cut to eight bits.",
        ("P3", "P1", "P8"),
        edits=(
            Edit(
                f"{_MANAGER}.alloc_hbm_pages",
                "self._available_hbm_pages.take(n)",
                "[page & 0xFF for page in self._available_hbm_pages.take(n)]",
            ),
        ),
        driver="host-many-pages",
    ),
    Mutant(
        "MP31",
        "The usage gauge counts pages behind the fence as owned.",
        ("M3",),
        edits=(
            Edit(
                "sim.record:Recorder._freed", "self.pages_owned -= count", "self.pages_owned -= 0 if fenced else count"
            ),
            Edit(
                "sim.record:Recorder._take",
                "self.pages_fenced -= self._pages(now_ns, effect.pages, FREE)",
                "self.pages_fenced -= self._pages(now_ns, effect.pages, FREE); self.pages_owned -= len(effect.pages)",
            ),
        ),
        driver="host-lag-two",
    ),
)
