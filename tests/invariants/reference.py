"""A small honest core, device and driver; a test hands the auditor their story with one thing changed.

Everything here is written for readability from docs/protocol.md alone and shares no code with what is judged elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from invariants.auditor import GAUGES, AuditConfig, Auditor, Totals
from paged_attention import fingerprint
from paged_attention.plan import (
    EOS_TOKEN,
    UNKNOWN_TOKEN,
    CacheBuffers,
    CoreSnapshot,
    DeclaredPolicy,
    Effect,
    Evidence,
    ModelRows,
    Request,
    ShardedArray,
    StepInput,
    StepOutcome,
    StepPlan,
    WrongPlace,
)

VOCAB = 50


def ints(values):
    return np.array(list(values), np.int32)


@dataclass(eq=False)
class Sequence:
    request: Request
    order: int
    last: int
    tokens: list[int]
    known: int
    state: str = "waiting"
    number: int = 0
    feed: int = 0
    done: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)

    @property
    def id(self):
        return self.request.id


class TinyCore:
    """First come, first served; recompute the newest; one prefill chunk and all decodes in each step."""

    def __init__(self, policy: DeclaredPolicy) -> None:
        self.policy = policy
        self.free = deque(range(1, policy.num_pages))
        self.waiting: list[Sequence] = []
        self.prefill: Sequence | None = None
        self.joining: list[Sequence] = []
        self.slots: list[Sequence | None] = [None] * policy.batch_size
        self.live: dict[int, Sequence] = {}
        self.flights: dict[int, list[tuple[Sequence, int, int, int, bool]]] = {}
        self.fences: dict[tuple[int, int], tuple[int, ...]] = {}
        self.step = 0
        self.order = 0

    def pages_for(self, tokens):
        return -(-tokens // self.policy.page_size)

    def submit(self, request):
        policy, prompt = self.policy, len(request.prompt)
        need = min(prompt + request.max_tokens - 1, policy.max_sequence_length)
        if not prompt or request.max_tokens < 1 or prompt > policy.max_sequence_length:
            raise ValueError(f"prompt of {prompt} tokens, maximum {policy.max_sequence_length}")
        if self.pages_for(need) > policy.num_pages - 1:
            raise ValueError(f"{need} tokens do not fit")
        limit = min(request.max_tokens, policy.max_sequence_length - prompt + 1)
        sequence = Sequence(request, self.order, prompt + limit - 1, request.prompt.tolist(), prompt)
        self.order += 1
        self.live[request.id] = sequence
        self.waiting.append(sequence)
        return (Effect("submitted", request.id, 0),)

    # ---- planning

    def plan(self):
        effects: list[Effect] = []
        short = self._growth([x for x in self.slots if x and x.state == "running"]) > len(self.free)
        if short and self.flights:
            return None
        while self._growth([x for x in self.slots if x and x.state == "running"]) > len(self.free):
            effects += self._preempt()
        decodes = [x for x in self.slots if x and x.state == "running"]
        for sequence in decodes:
            effects += self._grow(sequence, sequence.done + 1)
        for sequence in list(self.joining):
            if None not in self.slots or self._growth([sequence]) > len(self.free):
                break
            effects += self._join(sequence)
            decodes.append(sequence)
        rows = []
        chunk = self.prefill
        if chunk is None and self.waiting and not any(e.kind == "preempted" for e in effects):
            chunk = self._admit(effects)
        if chunk is not None:
            end = min(chunk.done + self.policy.prefill_chunk, chunk.feed)
            if self.pages_for(end) - len(chunk.pages) <= len(self.free):
                effects += self._grow(chunk, end)
                rows.append((chunk, chunk.number, chunk.done, end - chunk.done, end == chunk.feed))
        for sequence in sorted(decodes, key=lambda x: x.slot):
            rows.append((sequence, sequence.number, sequence.done, 1, True))
        return self._plan(rows, effects) if rows else None

    def _growth(self, sequences):
        return sum(max(0, self.pages_for(x.done + 1) - len(x.pages)) for x in sequences)

    def _grow(self, sequence, tokens):
        count = self.pages_for(tokens) - len(sequence.pages)
        if count <= 0:
            return []
        pages = tuple(self.free.popleft() for _ in range(count))
        first = len(sequence.pages)
        sequence.pages += pages
        return [Effect("allocated", sequence.id, sequence.number, first_page=first, pages=pages)]

    def _join(self, sequence):
        self.joining.remove(sequence)
        sequence.slot = self.slots.index(None)
        self.slots[sequence.slot] = sequence
        sequence.state = "running"
        return [
            Effect("joined", sequence.id, sequence.number, sequence.slot),
            *self._grow(sequence, sequence.done + 1),
        ]

    def _admit(self, effects):
        head = self.waiting[0]
        free_slots = self.slots.count(None) - len(self.joining)
        if self.pages_for(head.known) > len(self.free) or free_slots < 1:
            return None
        self.waiting.pop(0)
        head.state, head.number, head.feed, head.done = "prefill", head.number + 1, head.known, 0
        head.pages = []
        self.prefill = head
        effects.append(Effect("admitted", head.id, head.number))
        return head

    def _preempt(self):
        victim = max((x for x in self.live.values() if x.pages), key=lambda x: x.order)
        told = Effect("preempted", victim.id, victim.number, victim.slot, reason="pages")
        freed = self._release(victim)
        self._leave_queues(victim)
        victim.state, victim.done = "waiting", 0
        self.waiting.insert(0, victim)
        return [told, freed]

    def _plan(self, rows, effects):
        for sequence, _, start, count, samples in rows:
            sequence.done = start + count
            if not samples:
                continue
            sequence.known = sequence.done + 1
            if sequence.done == sequence.last:
                sequence.state = "draining"
                self.prefill = None if self.prefill is sequence else self.prefill
            elif sequence.state == "prefill":
                sequence.state = "joining"
                self.prefill = None
                self.joining.append(sequence)
        self.flights[self.step] = rows
        tokens = []
        for sequence, _, start, count, _ in rows:
            tokens += [
                sequence.tokens[p] if p < len(sequence.tokens) else UNKNOWN_TOKEN for p in range(start, start + count)
            ]
        num_pages = [len(r[0].pages) for r in rows]
        table = np.zeros((len(rows), max(num_pages)), np.int32)
        for i, row in enumerate(rows):
            table[i, : num_pages[i]] = row[0].pages
        plan = StepPlan(
            step=self.step,
            request=ints(r[0].id for r in rows),
            admission=ints(r[1] for r in rows),
            slot=ints(r[0].slot for r in rows),
            start=ints(r[2] for r in rows),
            count=ints(r[3] for r in rows),
            samples=ints(r[4] for r in rows),
            tokens=ints(tokens),
            num_pages=ints(num_pages),
            table=table,
            effects=tuple(effects),
        )
        self.step += 1
        return plan

    # ---- giving back

    def _leave_queues(self, sequence):
        if sequence in self.joining:
            self.joining.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if self.prefill is sequence:
            self.prefill = None

    def _in_flight(self, request, number):
        return any(r[0].id == request and r[1] == number for rows in self.flights.values() for r in rows)

    def _release(self, sequence):
        pages, slot = tuple(sequence.pages), sequence.slot
        if self._in_flight(sequence.id, sequence.number):
            self.fences[sequence.id, sequence.number] = pages
        else:
            self.free.extend(pages)
        if slot >= 0:
            self.slots[slot] = None
        sequence.pages, sequence.slot = [], -1
        return Effect("freed", sequence.id, sequence.number, slot, pages=pages)

    def _open_fences(self):
        effects = []
        for (request, number), pages in list(self.fences.items()):
            if not self._in_flight(request, number):
                del self.fences[request, number]
                self.free.extend(pages)
                effects.append(Effect("unfenced", request, number, pages=pages))
        return effects

    def apply(self, outcome):
        rows = self.flights.pop(outcome.step)
        effects: list[Effect] = []
        ended: list[tuple[Sequence, str]] = []
        for i, (sequence, number, start, count, samples) in enumerate(rows):
            if sequence.id not in self.live or sequence.number != number or not samples:
                continue
            token, position = int(outcome.token[i]), start + count
            sequence.tokens.append(token)
            if outcome.eos[i]:
                ended.append((sequence, "eos"))
            elif position == sequence.last:
                whole = position - len(sequence.request.prompt) + 1 == sequence.request.max_tokens
                ended.append((sequence, "max_tokens" if whole else "length"))
        done = [x for x in self.live.values() if x.state == "draining" and x.pages]
        done += [x for x, _ in ended if x.pages and x not in done]
        for sequence in done:
            effects.append(self._release(sequence))
        for sequence, reason in ended:
            self._leave_queues(sequence)
            del self.live[sequence.id]
            effects.append(Effect("ended", sequence.id, sequence.number, reason=reason))
        return (*effects, *self._open_fences())

    def cancel(self, request):
        sequence = self.live.pop(request, None)
        if sequence is None:
            return ()
        effects = [Effect("cancelled", request, sequence.number, sequence.slot)]
        self._leave_queues(sequence)
        if sequence.pages:
            effects.append(self._release(sequence))
        return tuple(effects)

    def abandon(self, step):
        for sequence, number, start, _, samples in self.flights.pop(step):
            if sequence.id not in self.live or sequence.number != number:
                continue
            sequence.done = start
            if sequence.slot >= 0:
                sequence.state = "running"
                sequence.known -= 1
            else:
                self._leave_queues(sequence)
                sequence.state = "prefill"
                self.prefill = sequence
                sequence.known -= samples
        return tuple(self._open_fences())

    # ---- looking

    def pending(self):
        return {x.id: x.state for x in self.live.values()}

    def snapshot(self):
        policy = self.policy
        rows = np.zeros((policy.batch_size, self.pages_for(policy.max_sequence_length)), np.int32)
        positions = np.full(policy.batch_size, -1, np.int32)
        for slot, sequence in enumerate(self.slots):
            if sequence is not None:
                rows[slot, : len(sequence.pages)] = sequence.pages
                positions[slot] = sequence.done
        queues: dict[str, list[int]] = {n: [] for n in ("prefill", "joining", "running", "draining")}
        for sequence in self.live.values():
            if sequence.state != "waiting":
                queues[sequence.state].append(sequence.id)
        queues["waiting"] = [x.id for x in self.waiting]
        return CoreSnapshot(
            free=ints(self.free),
            fenced=ints(p for pages in self.fences.values() for p in pages),
            rows=rows,
            positions=positions,
            slot_of={x.id: slot for slot, x in enumerate(self.slots) if x is not None},
            pages={(x.id, x.number): ints(x.pages) for x in self.live.values() if x.pages},
            queues={name: ints(q) for name, q in queues.items()},
        )


class TinyDevice:
    """A cache of kv words in NumPy, written through the plan's own table."""

    LAYERS, HEADS, DIM, DTYPE = 2, 2, 4, "bfloat16"

    def __init__(self, policy: DeclaredPolicy, tamper) -> None:
        shape = (self.LAYERS, self.HEADS, policy.num_pages, policy.page_size, self.DIM)
        self.cache = np.zeros((2, *shape), np.uint16)
        self.policy, self.tamper = policy, tamper
        self.requests: dict[int, Request] = {}
        self.ran: StepInput | None = None
        self.salts = fingerprint.salts(self.LAYERS, self.HEADS, self.DIM)
        self.positions = np.full(policy.batch_size, -1, np.int32)
        self.rows = np.zeros((policy.batch_size, -(-policy.max_sequence_length // policy.page_size)), np.int32)

    def write(self, page, offset, kv_id, layers=(0, 1)):
        words = fingerprint.words(np.full((1, 1, 1, 1), kv_id, np.uint32), self.salts, self.DTYPE)
        words = self.tamper("words", words)
        for layer in layers:
            self.cache[:, layer, :, page, offset] = words[layer]

    def execute(self, plan, rows):
        self.ran = self.input_of(plan, rows)
        self.positions[:], self.rows[:] = -1, 0
        tokens, eos = [], []
        writes = []
        for i in range(plan.num_rows):
            start, count, slot = int(plan.start[i]), int(plan.count[i]), int(plan.slot[i])
            end = int(rows.eos_position[i])
            dead = 0 <= end <= start
            for p in range(start, start + count) if not dead else ():
                page = int(plan.table[i, p // self.policy.page_size])
                kv_id = int(fingerprint.kv_id(rows.kv_base[i : i + 1], np.array([p]))[0])
                writes.append((page, p % self.policy.page_size, kv_id, (0, 1)))
            if slot >= 0:
                ends_now = end == start + count
                self.rows[slot, : plan.num_pages[i]] = plan.table[i, : plan.num_pages[i]]
                self.positions[slot] = -1 if dead or ends_now else start + count
            position = start + count
            token = int(fingerprint.token(rows.token_seed[i : i + 1], np.array([position]), VOCAB)[0])
            if not plan.samples[i] or dead:
                token = -1
            elif position == end:
                token = EOS_TOKEN
            tokens.append(token)
            eos.append(int(token == EOS_TOKEN))
        for write in self.tamper("writes", writes):
            self.write(*write)
        return StepOutcome(plan.step, ints(tokens), ints(eos))

    def verify(self, pages, offsets, kv_ids, limit=8):
        shape = (len(pages), 1, 1, 1, 1)
        expected = fingerprint.words(kv_ids.reshape(shape), self.salts[None], self.DTYPE)
        found = np.moveaxis(self.cache[:, :, :, pages, offsets], 3, 0).swapaxes(1, 2)
        wrong = np.argwhere((expected != found).any(axis=-1))[:limit]
        return tuple(
            WrongPlace(
                int(layer),
                "KV"[kind],
                int(head),
                int(pages[i]),
                int(offsets[i]),
                tuple(found[i, layer, kind, head].tolist()),
                tuple(expected[i, layer, kind, head].tolist()),
            )
            for i, layer, kind, head in wrong
        )

    def input_of(self, plan, rows):
        """The step's rows, prefill first, as [prefill][slots], each sampled at its last token."""
        chunk, slots = self.policy.prefill_chunk if (plan.slot < 0).any() else 0, self.policy.batch_size
        first = int(chunk > 0)
        at = ints(0 if s < 0 else s + first for s in plan.slot.tolist())
        lengths, last = np.zeros(first + slots, np.int32), np.zeros(first + slots, np.int32)
        begin = ints([0] * first + [chunk + s for s in range(slots)])
        params = {n: np.zeros(first + slots, np.float32) for n in ("temperature", "top_p")}
        params["max_tokens"] = np.zeros(first + slots, np.int32)
        params["seed"] = np.zeros(first + slots, np.uint32)
        for row, i in enumerate(at.tolist()):
            dead = 0 <= int(rows.eos_position[row]) <= int(plan.start[row])
            request = self.requests.get(int(plan.request[row]))
            if i >= len(lengths) or request is None:
                continue
            lengths[i] = 0 if dead else int(plan.count[row])
            last[i] = begin[i] + int(plan.count[row]) - 1
            for name, values in params.items():
                values[i] = getattr(request, name)
        starts = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        return StepInput(plan.step, at, starts, begin, last, **params)

    def buffers(self):
        whole = ShardedArray((4, 6), (((0, 2), (0, 6)), ((2, 4), (0, 6))))
        return self.tamper("buffers", CacheBuffers(2, self.cache.nbytes, 0, (whole,)))

    def evidence(self, slots, pages):
        return self.tamper(
            "evidence",
            Evidence(
                slots,
                self.positions[slots].copy(),
                self.rows[slots].copy(),
                pages,
                self.cache[0][:, :, pages],
                self.cache[1][:, :, pages],
                self.ran,
            ),
        )


Tamper = Callable[[str, Any], Any]


def honest(_: str, value: Any) -> Any:
    return value


class World:
    """Drives core, device and auditor as the simulator does; `tamper(what, value)` may change what the auditor sees."""

    def __init__(
        self,
        policy,
        *,
        tamper: Tamper = honest,
        eos=None,
        config=None,
        device=True,
        vocab: int | None = VOCAB,
        core=None,
        step_ns=10,
    ) -> None:
        self.core = core or TinyCore(policy)
        self.step_ns = step_ns
        self.tamper = tamper
        self.eos = eos or {}
        self.auditor = Auditor(policy, config or AuditConfig(full_every=1), vocab)
        self.device = TinyDevice(policy, tamper)
        self.with_device = device
        self.now = 0
        self.flights: deque[tuple[StepPlan, StepOutcome, tuple[int, ...]]] = deque()
        self.series: list[tuple[int, ...]] = []
        self.scheduled = 0
        self.counts = {"arrived": 0, "finished": 0, "cancelled": 0, "rejected": 0}
        self.times: dict[int, dict[str, Any]] = {}
        self.stays = 0

    def _snapshot(self):
        return self.tamper("snapshot", self.core.snapshot())

    def submit(self, request_id, prompt, max_tokens):
        seed = 1000 + request_id
        request = Request(request_id, ints((7 * i + request_id) % VOCAB for i in range(prompt)), max_tokens, seed=seed)
        refusal, effects = None, ()
        self.device.requests[request_id] = request
        try:
            effects = self.core.submit(request)
        except ValueError as error:
            refusal = str(error)
        effects, refusal = self.tamper("submit", (effects, refusal))
        self.counts["arrived"] += 1
        self.counts["rejected"] += refusal is not None
        self.times[request_id] = {
            "arrival_ns": self.now,
            "admitted_ns": None,
            "first_token_ns": None,
            "output_tokens": 0,
        }
        self.auditor.submitted(self.now, request, effects, refusal)

    def cancel(self, request_id):
        effects = self.tamper("cancel", self.core.cancel(request_id))
        self.auditor.cancelled(self.now, request_id, effects)
        self._gone(effects)

    def rows(self, plan):
        base = fingerprint.kv_base(plan.request, plan.admission)
        eos = ints(self.eos.get(r, -1) for r in plan.request.tolist())
        return ModelRows(base, (1000 + plan.request).astype(np.uint32), eos)

    def plan(self, *, abandon=False):
        """Plan, and dispatch or abandon; False: there was no plan."""
        plan = self.core.plan()
        if plan is None:
            if not self.flights:
                self.auditor.idle(self.now, self._snapshot)
            return False
        for effect in plan.effects:
            if effect.kind == "admitted" and self.times[effect.request]["admitted_ns"] is None:
                self.times[effect.request]["admitted_ns"] = self.now
        told = self.tamper("plan", plan)
        self.scheduled += plan.num_tokens
        self.auditor.planned(self.now, told, self._snapshot)
        gauges = self.gauges(plan)
        self.auditor.measured(self.now, told.step, self.tamper("gauges", gauges))
        if abandon:
            self.scheduled -= plan.num_tokens
            self.auditor.abandoned(self.now, plan.step, self.core.abandon(plan.step))
            self.now += 1
            return True
        rows = self.rows(told)
        outcome = self.device.execute(told, rows)
        self.auditor.dispatched(self.now, told, rows, self.device if self.with_device else None)
        self.flights.append((told, self.tamper("outcome", outcome), gauges))
        return True

    def gauges(self, plan):
        """What a recorder would note of the step, asked of the core itself."""
        core, snapshot = self.core, self.core.snapshot()
        waiting = len(snapshot.queues["waiting"])
        prefill = int(plan.count[plan.slot < 0].sum())
        return (
            prefill,
            plan.num_tokens - prefill,
            len(core.live) - waiting,
            waiting,
            len(snapshot.slot_of),
            sum(len(p) for p in snapshot.pages.values()),
            len(snapshot.free),
            len(snapshot.fenced),
            sum(x.done for x in core.live.values() if x.pages),
            sum(e.kind == "preempted" for e in plan.effects),
        )

    def complete(self):
        plan, outcome, gauges = self.flights.popleft()
        self.now += self.step_ns
        self.series.append((plan.step, self.now, *gauges))
        self.auditor.executed(self.now, plan, self.tamper("seen", outcome))
        for i, request in enumerate(plan.request.tolist()):
            if request in self.core.live and plan.samples[i]:
                times = self.times[request]
                times["output_tokens"] += 1
                times["first_token_ns"] = times["first_token_ns"] or self.now
        effects = self.tamper("apply", self.core.apply(outcome))
        self.auditor.applied(self.now, plan.step, effects, self._snapshot)
        self._gone(effects)

    def _gone(self, effects):
        for effect in effects:
            if effect.kind in {"ended", "cancelled"} and effect.request in self.times:
                self.counts["finished" if effect.kind == "ended" else "cancelled"] += 1
                times = self.times[effect.request]
                first = times["first_token_ns"]
                gaps = self.now - first if first is not None else 0
                self.stays += self.now - times["arrival_ns"]
                said = self.tamper("done", {**times, "finish_ns": self.now, "itl_sum_ns": gaps})
                self.auditor.request_done(request=effect.request, **said)

    def step(self, *, abandon=False):
        """Fill the pipeline, then complete the oldest step."""
        while len(self.flights) <= self.core.policy.lag and self.plan(abandon=abandon):
            abandon = False
        if self.flights:
            self.complete()

    def drain(self, limit=500):
        for _ in range(limit):
            if not self.core.live and not self.flights:
                break
            self.step()
        self.finish()

    def finish(self):
        self.plan()
        live = len(self.core.live)
        columns = np.array(self.series, np.int64).reshape(-1, 12).T
        series = dict(zip(("step", "end_ns", *GAUGES), columns, strict=True))
        totals = Totals(self.scheduled, live=live, request_ns=self.stays, series=series, **self.counts)
        pending = self.tamper("pending", self.core.pending())
        device = self.device if self.with_device else None
        self.auditor.finished(self.now, pending, self._snapshot, device, self.tamper("totals", totals))

    @property
    def found(self):
        """The ids of what the auditor found, in order."""
        return [v.id for v in self.auditor.violations]


def small_policy(**changes) -> DeclaredPolicy:
    base = {
        "batch_size": 3,
        "page_size": 4,
        "num_pages": 24,
        "max_sequence_length": 40,
        "prefill_chunk": 6,
        "preemption": "recompute",
    }
    return DeclaredPolicy(**(base | changes))
