"""Planted bugs in the scheduler and in the books that follow it (MS)."""

from __future__ import annotations

from typing import Final

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_SCHEDULER: Final = "paged_attention.scheduler:InferenceScheduler"
_BOOKS: Final = "paged_attention.books:Books"
_ENGINE: Final = "paged_attention.engine:PagedAttentionEngine"
_PLANNING: Final = "paged_attention.planning"
_ROWS: Final = "paged_attention.rows:mixed_rows"
_CHUNK: Final = "count = min(chunk, total - start)"
_ROOM: Final = "len(prefilling.pages) * books.metadata.page_size - prefilling.fed"
_REQUEUE: Final = "self.scheduler.requeue_prefill_request(sequence.prefill)"
_BACK_TO_QUEUE: Final = 'sequence.state, sequence.slot, sequence.task, sequence.pages = "waiting", NOBODY, None, []'
_FED_AGAIN: Final = "tokens = np.concatenate((sequence.request.prompt, np.array(sequence.generated, np.int32)))"

_READMIT_IN_THE_SAME_PLAN: Final = """\
if draft is None:
        return None
    if draft.victims:
        freed = sum(len(_pages_of(victim)) for victim in draft.victims)
        left = free + freed - len(draft.growing_slots) - draft.num_joins
        return self._draft_prefill(draft, None if active in draft.victims else active, batch, left)
    if False:"""

_SWAP_WITH_A_VICTIM: Final = """\
queue = self.scheduler.prefill_queue
    head = None if queue.empty() else queue.peek()
    if head is not None and self.sequences[head.id].admission:
        queue.get_nowait()
        queue.put_first(sequence.prefill)
        queue.put_first(head)
    else:
        self.scheduler.requeue_prefill_request(sequence.prefill)"""

_BY_NAME: Final = """\
by_name = {str(request.id): request for request in self.prefill_queue}
        head = by_name[min(by_name)]"""

_TAKE_FROM_ANYWHERE: Final = """\
request = draft.prefill
        if draft.prefill_is_new:
            self.prefill_queue.remove(request)"""

_FORGET_A_WAITING_ONE_HALF: Final = """\
sequence = books.sequences.get(request)
        if sequence is not None and sequence.state != "waiting":
            del books.sequences[request]"""

_GIVE_BACK_THE_OLD_SLOT: Final = """\
books.scheduler.prefill_queue.remove(sequence.prefill)
            if sequence.task is not None and sequence.task.slot >= 0:
                from paged_attention.scheduler import release_slot

                release_slot(books.batch, sequence.task.slot)"""

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MS01",
        "A prefill chunk takes one token more than the budget of a step.",
        ("S1",),
        edits=(Edit(_ROWS, _CHUNK, "count = min(chunk + 1, total - start)"),),
    ),
    Mutant(
        "MS02",
        "What growing decodes take is not subtracted from what a prefill may spend in the same step.",
        ("P6", "S5", "S11"),
        edits=(Edit(f"{_SCHEDULER}._draft", "free -= len(draft.growing_slots)\n", "pass\n"),),
    ),
    Mutant(
        "MS03",
        "A victim that was about to grow keeps its claim on a page, so that one victim too many is chosen.",
        ("S10",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_preemption",
                "growing.discard(victim.slot)",
                "free -= victim.slot in growing\n            growing.discard(victim.slot)",
            ),
        ),
        driver="host-crowded",
    ),
    Mutant(
        "MS05",
        "The oldest holder is preempted in place of the newest.",
        ("S10",),
        edits=(Edit(f"{_SCHEDULER}._draft_preemption", "reverse=True", "reverse=False"),),
    ),
    Mutant(
        "MS06",
        "A preempted request goes to the tail of the queue.",
        ("S9",),
        edits=(
            Edit(
                f"{_SCHEDULER}.requeue_prefill_request",
                "self.prefill_queue.put_first(request)",
                "self.prefill_queue.put(request)",
            ),
        ),
    ),
    Mutant(
        "MS07",
        "A preempted request goes on from where it stood, though its pages are gone.",
        ("S2", "R1"),
        edits=(
            Edit(
                f"{_BOOKS}.admit",
                'sequence.state, sequence.fed = "prefill", 0',
                'sequence.state, sequence.fed = "prefill", min(sequence.fed, sequence.num_fed_tokens - 1)',
            ),
        ),
    ),
    Mutant(
        "MS08",
        "A preemption drops the tokens that were generated in the slot.",
        ("S3", "R2"),
        edits=(
            Edit(
                f"{_BOOKS}.preempt",
                "sequence.generated += table.history[slot, first : first + num_new].tolist()",
                "sequence.planned = len(sequence.generated)",
            ),
        ),
    ),
    Mutant(
        "MS10",
        "A preempted request is fed its prompt alone, without the tokens that it has generated.",
        ("S3", "R2"),
        edits=(Edit(f"{_BOOKS}.preempt", _FED_AGAIN, "tokens = sequence.request.prompt"),),
    ),
    Mutant(
        "MS11",
        "Two victims that wait at once change places in the queue.",
        ("S9",),
        edits=(Edit(f"{_BOOKS}.preempt", _REQUEUE, _SWAP_WITH_A_VICTIM),),
    ),
    Mutant(
        "MS12",
        "A plan that preempts admits the next request with the pages just won.",
        ("S9", "S10"),
        edits=(Edit(f"{_SCHEDULER}._draft", "if draft is None or draft.victims:", _READMIT_IN_THE_SAME_PLAN),),
    ),
    Mutant(
        "MS14",
        "A head of the queue that does not fit is overtaken by the first request that does.",
        ("S9",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "head = self.prefill_queue.peek()",
                "fit = (r for r in self.prefill_queue if self.manager.pages_for(_num_prompt_tokens(r)) <= free)\n"
                "        head = next(fit, self.prefill_queue.peek())",
            ),
            Edit(
                f"{_SCHEDULER}._commit",
                "request = self.prefill_queue.get_nowait() if draft.prefill_is_new else draft.prefill",
                _TAKE_FROM_ANYWHERE,
            ),
        ),
    ),
    Mutant(
        "MS15",
        "The waiting queue is last in, first out.",
        ("S9",),
        edits=(
            Edit(
                f"{_SCHEDULER}.enqueue_prefill_request",
                "self.prefill_queue.put(request)",
                "self.prefill_queue.put_first(request)",
            ),
        ),
    ),
    Mutant(
        "MS16",
        "Waiting requests are taken in the order of their ids as text, so that 10 comes before 9.",
        ("S9", "S11"),
        edits=(
            Edit(f"{_SCHEDULER}._draft_prefill", "head = self.prefill_queue.peek()", _BY_NAME),
            Edit(
                f"{_SCHEDULER}._commit",
                "request = self.prefill_queue.get_nowait() if draft.prefill_is_new else draft.prefill",
                _TAKE_FROM_ANYWHERE,
            ),
        ),
        driver="host-decode-first",
    ),
    Mutant(
        "MS17",
        "The last chunk of a prompt is not cut to what is left of it.",
        ("S4",),
        edits=(
            Edit(_ROWS, _CHUNK, "count = chunk"),
            Edit(
                _ROWS,
                "samples = int(start + count == total)",
                "samples = int(start + count >= total)",
            ),
        ),
    ),
    Mutant(
        "MS18",
        "A last chunk of exactly the chunk size is not recognised as the last, and samples nothing.",
        ("S3",),
        edits=(
            Edit(
                _ROWS,
                "samples = int(start + count == total)",
                "samples = int(start + count == total and count < chunk)",
            ),
        ),
    ),
    Mutant(
        "MS20",
        "A prefill without pages for its next chunk is scheduled all the same, with as few tokens as fit: none.",
        ("S1",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "if missing <= free:",
                "missing = missing if missing <= free else 0\n        if active:",
            ),
            Edit(
                f"{_PLANNING}:next_step",
                "books.prefill_chunk",
                f"min(books.prefill_chunk, {_ROOM})",
            ),
        ),
    ),
    Mutant(
        "MS21",
        "Whether a request can ever fit is decided by its prompt alone.",
        ("S13",),
        edits=(
            Edit(
                "paged_attention.sequences:refusal",
                "min(length + request.max_tokens - 1, longest)",
                "min(length, longest)",
            ),
        ),
    ),
    Mutant(
        "MS23",
        "A request that ends at its prefill goes on to wait for a slot.",
        ("S6", "O3", "P10"),
        edits=(
            Edit(f"{_PLANNING}:_count_prefill", "if sequence.planned == sequence.limit:", "if sequence.limit < 1:"),
        ),
    ),
    Mutant(
        "MS24",
        "Cancelling a waiting request takes it out of the queue but not out of the map.",
        ("S6",),
        edits=(
            Edit(f"{_ENGINE}.cancel", "sequence = books.sequences.pop(request, None)", _FORGET_A_WAITING_ONE_HALF),
            Edit(f"{_ENGINE}.snapshot", "order.__getitem__", "lambda request: order.get(request, -1)"),
        ),
    ),
    Mutant(
        "MS25",
        "Cancelling a request in its prefill frees its pages at once, though a chunk of it is in flight.",
        ("P10", "P1", "P11"),
        edits=(
            Edit(
                f"{_BOOKS}.give_back",
                "if self.flights and last_step",
                'if sequence.state != "prefill" and self.flights and last_step',
            ),
        ),
    ),
    Mutant(
        "MS26",
        "Cancelling a preempted request gives back the slot that it held before, whoever sits there now.",
        ("T3", "T1", "T6"),
        edits=(
            Edit(
                f"{_BOOKS}.preempt",
                _BACK_TO_QUEUE,
                'sequence.state, sequence.slot, sequence.pages = "waiting", NOBODY, []',
            ),
            Edit(f"{_BOOKS}.admit", "sequence.admission += 1", "sequence.admission += 1\n    sequence.task = None"),
            Edit(
                f"{_ENGINE}.cancel",
                "books.scheduler.prefill_queue.remove(sequence.prefill)",
                _GIVE_BACK_THE_OLD_SLOT,
            ),
        ),
    ),
    Mutant(
        "MS28",
        "Prefills go first for as long as there are any: decodes wait without bound.",
        ("S12",),
        edits=(Edit(f"{_SCHEDULER}._draft", " and self.decode_wait < self.policy.max_decode_wait", ""),),
    ),
    Mutant(
        "MS29",
        "A lone request that arrives while nothing runs is not planned until another one arrives.",
        ("S11",),
        edits=(
            Edit(
                f"{_SCHEDULER}._draft_prefill",
                "elif self.prefill_queue and",
                "elif self.prefill_queue.qsize() > (not draft.run_decodes) and",
            ),
        ),
    ),
    Mutant(
        "MS31",
        "An abandoned step leaves the decodes' counts advanced.",
        ("S2",),
        edits=(Edit(f"{_PLANNING}:_uncount_decodes", "books.slots.restore(", "_ = ("),),
    ),
    Mutant(
        "MS32",
        "The slot that would make the batch whole again is not given back: after a burst one slot idles for ever.",
        ("S11",),
        edits=(
            Edit(
                "paged_attention.scheduler:release_slot",
                "_slots(batch).put(slot)",
                "_slots(batch).qsize() + 1 < len(batch.positions) and _slots(batch).put(slot)",
            ),
        ),
    ),
)
