"""What planning a step does to the books, and how an abandoned step is taken back out of them."""

from __future__ import annotations

from paged_attention.books import Books
from paged_attention.plan import Effect, StepPlan
from paged_attention.requests import NextIterationPlan
from paged_attention.rows import decode_rows, mixed_rows
from paged_attention.scheduler import resume_slot, stop_slot
from paged_attention.sequences import Flight, Sequence, grant
from paged_attention.slots import NOBODY


def next_step(books: Books, step: int) -> StepPlan | None:
    """Plan the next step, and count its rows as run; None where nothing can run now.

    NotImplementedError: decodes are short of pages and the policy's preemption is "none"; nothing changed.
    """
    scheduler, prefilling = books.scheduler, books.prefilling
    waits = scheduler.decode_wait, scheduler.prefill_wait
    active = None if prefilling is None else prefilling.prefill
    native = scheduler.create_plan(active, books.batch, may_preempt=not books.flights)
    if native is None:
        return None
    effects = tuple(take_in(books, native))
    untold, slots = books.untold, books.slots
    if native.decodes_state_page_updates:
        slots.forget_tables()
    if untold.releases or untold.joins or untold.pages:
        _tell(books, native)
    seated = slots.seated if native.schedule_decodes else slots.nobody
    last_steps = slots.last_step.copy()
    prefilling, before = None, NOBODY
    if native.schedule_prefill:
        prefilling = books.prefilling
        assert prefilling is not None
        before = prefilling.last_step
        plan = mixed_rows(step, slots, seated, prefilling, books.prefill_chunk, effects, native)
    else:
        plan = decode_rows(step, slots, seated, effects, native)
    last_rows = _count_decodes(books, step) if native.schedule_decodes else []
    if prefilling is not None and _count_prefill(books, step, prefilling, plan.count.item(0)):
        last_rows.append(prefilling)
    if last_rows:
        books.spent += last_rows
    books.flights.append(Flight(plan, native, seated, last_steps, prefilling, before, last_rows, waits))
    return plan


def take_in(books: Books, native: NextIterationPlan) -> list[Effect]:
    """Follow what the scheduler decided; return the changes in the order in which it made them."""
    effects: list[Effect] = []
    num_pages = books.slots.num_pages
    for request in native.preempted:
        effects += books.preempt(books.sequences[int(request)])
    for update in native.decodes_state_page_updates:
        slot, first_page, page = update.slot, update.page_idx, update.mapped_idx
        sequence = books.in_slot[slot]
        assert sequence is not None
        num_pages[slot] = first_page + 1
        sequence.pages.append(page)
        effects.append(Effect("allocated", sequence.request.id, sequence.admission, NOBODY, first_page, (page,)))
    for task in native.new_decodes_requests:
        sequence = books.sequences[int(task.id)]
        effects.append(books.join(sequence, task))
        if len(task.page_indices) > len(sequence.pages):
            effects.append(grant(sequence, task.page_indices[len(sequence.pages) :]))
    if native.schedule_prefill:
        if books.prefilling is None:
            effects.append(books.admit(native.prefill_request))
        assert books.prefilling is not None
        if native.prefill_pages_update.page_indices:
            effects.append(grant(books.prefilling, native.prefill_pages_update.page_indices))
    return effects


def _tell(books: Books, native: NextIterationPlan) -> None:
    """Add to a plan, which nobody else has seen yet, what the device has not been told before."""
    untold, key, token = books.untold, books.slots.key, books.slots.token
    native.released_slots[:0] = untold.releases
    native.new_decodes_requests[:0] = [
        task.replace(prefill_token_id=token[task.slot]) for owner, task in untold.joins if key[task.slot] == owner
    ]
    native.decodes_state_page_updates[:0] = [update for owner, update in untold.pages if key[update.slot] == owner]
    untold.releases.clear()
    untold.joins.clear()
    untold.pages.clear()


def _count_decodes(books: Books, step: int) -> list[Sequence]:
    """Move every decode on by one token; return those whose last row this is."""
    last: list[Sequence] = []
    for slot in books.slots.advance(step):
        sequence = books.in_slot[slot]
        assert sequence is not None
        sequence.state, sequence.planned, sequence.last_step = "draining", sequence.limit, step
        stop_slot(books.batch, slot)
        books.untold.releases.append(slot)
        last.append(sequence)
    return last


def _count_prefill(books: Books, step: int, sequence: Sequence, count: int) -> bool:
    """Move a prefill on by one chunk; return whether that was the sequence's last row of all."""
    assert sequence.prefill.chunk_idx is not None
    sequence.prefill.chunk_idx += 1
    sequence.fed += count
    sequence.last_step = step
    if sequence.fed < sequence.num_fed_tokens:
        return False
    books.prefilling = None
    sequence.planned += 1
    if sequence.planned == sequence.limit:
        sequence.state = "draining"
        return True
    sequence.state = "joining"
    books.prefilled.append(sequence)
    return False


def take_back(books: Books, flight: Flight) -> None:
    """Undo the newest step: positions, counts and waits return; pages, slots and admissions stay where they are."""
    books.scheduler.decode_wait, books.scheduler.prefill_wait = flight.waits
    _uncount_decodes(books, flight)
    _uncount_prefill(books, flight)
    books.spent = [sequence for sequence in books.spent if sequence not in flight.last_rows]
    _keep_untold(books, flight)


def _uncount_decodes(books: Books, flight: Flight) -> None:
    if not flight.native.schedule_decodes:
        return
    plan, num_decodes = flight.plan, len(flight.seated.slots)
    first, first_token = plan.num_rows - num_decodes, plan.num_tokens - num_decodes
    books.slots.restore(flight.seated, plan.start[first:], plan.tokens[first_token:], flight.last_steps)
    for sequence in flight.last_rows:
        if sequence.slot != NOBODY:
            assert sequence.task is not None
            sequence.state = "running"
            resume_slot(books.batch, sequence.task)
            books.untold.releases.remove(sequence.slot)


def _uncount_prefill(books: Books, flight: Flight) -> None:
    sequence = flight.prefilling
    if sequence is None or not books.is_alive(sequence):
        return
    assert sequence.prefill.chunk_idx is not None
    sequence.prefill.chunk_idx -= 1
    sequence.fed = int(flight.plan.start[0])
    sequence.last_step = flight.prefilled_before
    sequence.planned -= int(flight.plan.samples[0])
    if sequence in books.prefilled:
        books.prefilled.remove(sequence)
    sequence.state = "prefill"
    books.prefilling = sequence


def _keep_untold(books: Books, flight: Flight) -> None:
    """Keep what the plan was to tell the device, for the next plan to tell."""
    native, key = flight.native, books.slots.key
    books.untold.releases[:0] = native.released_slots
    for task in native.new_decodes_requests:
        if key[task.slot] != NOBODY:
            books.untold.joins.append((int(key[task.slot]), task))
    for update in native.decodes_state_page_updates:
        if key[update.slot] != NOBODY:
            books.untold.pages.append((int(key[update.slot]), update))
