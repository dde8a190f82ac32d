"""A small planner for the tests: random but legal steps over a pool, as neutral plans. It shares no code with the core.

Sequences come, are prefilled in chunks, decode and go; pages are drawn at random from those that are free.
"""

from dataclasses import dataclass, field

import numpy as np

from backends.protocol import CacheSpec
from paged_attention.fingerprint import kv_base, kv_id
from paged_attention.plan import ModelRows, StepPlan


@dataclass
class Sequence:
    request: int
    prompt: int
    output: int
    eos_position: int = -1
    fed: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.prompt + self.output - 1


class Planner:
    def __init__(self, cache: CacheSpec, seed: int, max_prefills: int = 1, eos: bool = False) -> None:
        self.cache = cache
        self.random = np.random.default_rng(seed)
        self.free = list(range(1, cache.num_pages))
        self.slots = list(range(cache.batch_size))
        self.live: list[Sequence] = []
        self.step = 0
        self.next_request = 0
        self.max_prefills = max_prefills
        self.eos = eos

    def plan(self) -> tuple[StepPlan, ModelRows]:
        self._leave()
        rows = []
        self._arrive()
        prefills = [s for s in self.live if s.slot < 0][: self.max_prefills]
        for sequence in prefills:
            count = min(self.cache.prefill_chunk, sequence.prompt - sequence.fed)
            if self.random.random() < 0.3:
                count = int(self.random.integers(1, count + 1))
            rows.append((sequence, -1, count))
        decodes = sorted((s for s in self.live if s.slot >= 0), key=lambda s: s.slot)
        rows += [(sequence, sequence.slot, 1) for sequence in decodes]
        for sequence, _, count in rows:
            need = -(-(sequence.fed + count) // self.cache.page_size) - len(sequence.pages)
            for _ in range(need):
                sequence.pages.append(self.free.pop(int(self.random.integers(len(self.free)))))
        plan, facts = self._values(rows)
        for sequence, _, count in rows:
            sequence.fed += count
            if sequence.slot < 0 and sequence.fed == sequence.prompt:
                sequence.slot = self.slots.pop(int(self.random.integers(len(self.slots))))
        self.step += 1
        return plan, facts

    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pages, offsets, kv_ids) of every token that must lie in the cache now."""
        pages, offsets, ids = [], [], []
        for sequence in self.live:
            end = sequence.fed if sequence.eos_position < 0 else min(sequence.fed, sequence.eos_position)
            position = np.arange(end)
            pages.append(np.array(sequence.pages, np.int32)[position // self.cache.page_size])
            offsets.append((position % self.cache.page_size).astype(np.int32))
            ids.append(kv_id(kv_base(np.full(end, sequence.request), np.full(end, 1)), position))
        joined = [np.concatenate(part) if part else np.zeros(0, np.int32) for part in (pages, offsets, ids)]
        return joined[0], joined[1], joined[2].astype(np.uint32)

    def _leave(self) -> None:
        for sequence in [s for s in self.live if s.fed == s.length and s.slot >= 0]:
            self.live.remove(sequence)
            self.slots.append(sequence.slot)
            self.free += sequence.pages

    def _arrive(self) -> None:
        while len(self.live) < self.cache.batch_size:
            longest = self.cache.max_sequence_length
            prompt = int(self.random.integers(1, longest))
            output = int(self.random.integers(1, longest - prompt + 2))
            held = sum(-(-s.length // self.cache.page_size) for s in self.live)
            if held + -(-(prompt + output - 1) // self.cache.page_size) > self.cache.num_pages - 1:
                break
            sequence = Sequence(self.next_request, prompt, output)
            if self.eos and self.random.random() < 0.5:
                sequence.eos_position = int(self.random.integers(prompt, prompt + output))
            self.live.append(sequence)
            self.next_request += 1

    def _values(self, rows: list) -> tuple[StepPlan, ModelRows]:
        sequences = [sequence for sequence, _, _ in rows]

        def ints(values) -> np.ndarray:
            return np.array(list(values), np.int32)

        num_pages = ints(len(s.pages) for s in sequences)
        table = np.zeros((len(rows), max(num_pages, default=0)), np.int32)
        for row, sequence in enumerate(sequences):
            table[row, : len(sequence.pages)] = sequence.pages
        request, count = ints(s.request for s in sequences), ints(count for _, _, count in rows)
        start = ints(s.fed for s in sequences)
        samples = ints(s.fed + count >= s.prompt for s, _, count in rows)
        plan = StepPlan(
            step=self.step,
            request=request,
            admission=np.ones_like(request),
            slot=ints(slot for _, slot, _ in rows),
            start=start,
            count=count,
            samples=samples,
            tokens=np.ones(int(count.sum()), np.int32),
            num_pages=num_pages,
            table=table,
            effects=(),
        )
        facts = ModelRows(
            kv_base=kv_base(request, np.ones_like(request)),
            token_seed=(request * 7919).astype(np.uint32),
            eos_position=ints(s.eos_position for s in sequences),
        )
        return plan, facts
