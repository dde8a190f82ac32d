"""The whole loop of the classes, in NumPy: plan, build_input, write, read, sample, feed back, apply.

The model's logits depend on every token before, read back through the page table of the step; what each request must
yield is said by the same model without pages, one request at a time.
"""

import dataclasses
from collections import deque

import numpy as np
import pytest

from paged_attention import ActiveSequenceBatch, ModelIOProcessor, ModelOutputBatch, SamplingParams
from paged_attention.cache import PagedAttentionCacheView
from paged_attention.model_io import feed_back, sampled_positions, sampled_rows
from paged_attention.plan import Request, StepOutcome, StepPlan
from paged_attention.sampling import sample
from tests.paged_attention.harness import is_pristine, make_engine

VOCAB, EOS, NOTHING = 9, 0, -7


def logits_after(context: list[int]) -> np.ndarray:
    """What the model says after these tokens; an EOS is a little less likely than the others."""
    logits = np.random.default_rng([token + 8 for token in context]).normal(size=VOCAB).astype(np.float32)
    logits[EOS] -= 1
    return logits


def expected_tokens(request: Request, max_sequences: int) -> list[int]:
    """The request alone, without pages, chunks or slots."""
    tokens = request.prompt.tolist()
    params = SamplingParams(*(np.array([getattr(request, name)]) for name in SamplingParams.tree_leaves))
    for _ in range(min(request.max_tokens, max_sequences - len(tokens) + 1)):
        tokens.append(int(sample(logits_after(tokens)[None], params, np.array([len(tokens)], np.int32))[0]))
        if tokens[-1] == EOS:
            break
    return tokens[len(request.prompt) :]


class Loop:
    """An engine, the device's batch and cache, and what every request has yielded."""

    def __init__(self, lag: int, **sizes: int) -> None:
        self.engine = make_engine(lag=lag, **sizes)
        self.metadata = self.engine.metadata
        self.batch = ActiveSequenceBatch.create(self.metadata, None)
        self.view = PagedAttentionCacheView.init(None, np.int32, self.metadata, 0)
        self.prefill_outputs: dict[int, ModelOutputBatch] = {}
        self.flights: deque[tuple[StepPlan, StepOutcome]] = deque()
        self.tokens: dict[int, list[int]] = {}
        self.ended: set[tuple[int, int]] = set()
        self.num_preempted = self.num_late_rows = 0

    def dispatch(self, plan: StepPlan) -> None:
        """Run a step on the device, and check that the device stands where the host thinks."""
        self.num_preempted += sum(effect.kind == "preempted" for effect in plan.effects)
        step = ModelIOProcessor.build_input(
            plan.native, self.metadata, self.batch, prefill_outputs=self.prefill_outputs
        )
        self._check_positions(plan, step.attn_meta)
        key = step.input_ids[:, None, None]
        chunk = len(key) - (self.metadata.batch_size if plan.native.schedule_decodes else 0)
        self.view = self.view.write_prefill_to_cache(key[:chunk], key[:chunk], step.attn_meta)
        self.view = self.view.write_decodes_to_cache(key[chunk:], key[chunk:], step.attn_meta)
        rows = sampled_rows(step.attn_meta)
        logits = np.stack([self._read(step, row, chunk) for row in rows.tolist()])
        drawn = sample(logits, step.sampling_params, sampled_positions(step.attn_meta))
        output = ModelIOProcessor.prepare_model_output(drawn, drawn == EOS, step.attn_meta, step.sampling_params)
        feed_back(self.batch, output)
        if plan.native.schedule_prefill and plan.samples[0]:
            self.prefill_outputs[plan.native.prefill_request.id] = output
        self.flights.append((plan, self._outcome(plan, output)))

    def _check_positions(self, plan: StepPlan, meta) -> None:
        """Whoever has not ended on the device writes where the plan says; all other slots write nothing."""
        wanted = np.full(self.metadata.batch_size, -1)
        for request, admission, slot, start in zip(plan.request, plan.admission, plan.slot, plan.start, strict=True):
            if slot >= 0:
                late = (int(request), int(admission)) in self.ended
                self.num_late_rows += late
                wanted[slot] = -1 if late else start
        if plan.native.schedule_decodes:
            assert meta.decodes_position.tolist() == wanted.tolist()
            assert not meta.decodes_page_table[~np.isin(np.arange(len(wanted)), plan.slot)].any()

    def _read(self, step, row: int, chunk: int) -> np.ndarray:
        """The logits of a sampled row, from all tokens up to its own, through the page table."""
        meta, last = step.attn_meta, int(step.positions[row])
        table = meta.prefill_page_table if row < chunk else meta.decodes_page_table[row - chunk]
        position = np.arange(last + 1)
        page, offset = table[position // self.metadata.page_size], position % self.metadata.page_size
        return logits_after(self.view.value_pages[0, page, offset, 0].tolist())

    def _outcome(self, plan: StepPlan, output: ModelOutputBatch) -> StepOutcome:
        token, eos = np.full(plan.num_rows, -1, np.int32), np.zeros(plan.num_rows, np.int32)
        for row, slot in enumerate(plan.slot.tolist()):
            if slot >= 0:
                token[row], eos[row] = output.decodes_token_ids[slot], output.decodes_completes[slot]
            elif plan.samples[row]:
                token[row], eos[row] = output.prefill_token_id, output.prefill_complete
            if eos[row]:
                self.ended.add((int(plan.request[row]), int(plan.admission[row])))
        return StepOutcome(plan.step, token, eos)

    def run(self) -> None:
        for _ in range(1000):
            while len(self.flights) <= self.engine.lag and (plan := self.engine.plan()) is not None:
                self.dispatch(plan)
            if not self.flights:
                return
            plan, outcome = self.flights.popleft()
            for request, token in zip(plan.request.tolist(), outcome.token.tolist(), strict=True):
                if token != -1:
                    self.tokens.setdefault(request, []).append(token)
            self.engine.apply(outcome)
        raise AssertionError(f"still unfinished: {dict(self.engine.pending())}")


def requests(seed: int, same_prompt: bool = False) -> list[Request]:
    random = np.random.default_rng(seed)
    return [
        Request(
            id=number,
            prompt=np.arange(1, 6, dtype=np.int32)
            if same_prompt
            else random.integers(1, VOCAB, 1 + number % 9, np.int32),
            max_tokens=1 + int(random.integers(12)),
            temperature=[0.0, 0.7, 1.5][number % 3],
            top_p=[1.0, 0.8][number % 2],
            seed=int(random.integers(2**32)),
        )
        for number in range(12)
    ]


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("mix", ["mixed", "prefill_first", "decode_first"])
@pytest.mark.parametrize("num_pages", [8, 40])
def test_seed_02_03_05_08_10_17_18_under_load_every_request_yields_what_it_yields_alone(
    lag: int, mix: str, num_pages: int
):
    loop = Loop(lag, num_pages=num_pages, max_sequences=14, prefill_chunk=3, mix=mix)
    submitted = [request for request in requests(3) if len(request.prompt) + request.max_tokens <= 15]
    for request in submitted:
        loop.engine.submit(request)
    loop.run()
    assert loop.tokens == {request.id: expected_tokens(request, 14) for request in submitted}
    assert is_pristine(loop.engine)
    assert (loop.num_preempted > 0) == (num_pages == 8)
    assert (loop.num_late_rows > 0) == (lag > 0)


def test_seed_10_31_equal_prompts_draw_the_same_tokens_only_where_their_seeds_are_equal():
    loop = Loop(1, num_pages=40)
    kept = [dataclasses.replace(r, temperature=1.5, top_p=1.0, max_tokens=9) for r in requests(0, same_prompt=True)]
    kept[7] = dataclasses.replace(kept[7], seed=kept[2].seed)
    for request in kept:
        loop.engine.submit(request)
    loop.run()
    yielded = [tuple(loop.tokens[request.id]) for request in kept]
    assert yielded[7] == yielded[2]
    assert len(set(yielded)) > 8
