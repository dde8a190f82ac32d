"""Backends side by side: the same plans, and then the same outcomes, slots and words outside the dummy page."""

from collections import deque

import numpy as np

from backends.jax_device import JaxBackend
from backends.none import NoneBackend
from backends.numpy_oracle import NumpyBackend
from backends.protocol import CacheSpec, DeviceSpec, ModelSpec
from paged_attention.engine import PagedAttentionEngine
from paged_attention.fingerprint import kv_base
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.plan import ModelRows, Request
from paged_attention.scheduler import SchedulingPolicy
from tests.backends.planner import Planner
from tests.device import ONE_DEVICE


def cache_spec(**changes) -> CacheSpec:
    sizes = {
        "layers": 2,
        "kv_heads": 2,
        "num_pages": 12,
        "page_size": 4,
        "head_dim": 8,
        "dtype": "bfloat16",
        "max_sequence_length": 22,
        "batch_size": 4,
        "prefill_chunk": 6,
    }
    return CacheSpec(**(sizes | changes))


def opened(backend, cache, model=None, devices=None):
    own = ONE_DEVICE if isinstance(backend, JaxBackend) else DeviceSpec()
    backend.open(cache, model or ModelSpec(vocab_size=100), devices or own)
    return backend


def assert_same_step(plan, rows, backends) -> list:
    """Execute on all of them; their outcomes, slots that ran, and words must agree with the first one's."""
    outcomes = [backend.execute(plan, rows).result() for backend in backends]
    cache_pages = np.arange(1, backends[0]._cache.num_pages, dtype=np.int32)
    slots = plan.slot[plan.slot >= 0]
    evidence = [backend.evidence(slots, cache_pages) for backend in backends]
    for outcome, found in zip(outcomes[1:], evidence[1:], strict=True):
        assert outcome.token.tolist() == outcomes[0].token.tolist()
        assert outcome.eos.tolist() == outcomes[0].eos.tolist()
        if found is not None:
            for name in ("positions", "rows", "keys", "values"):
                assert np.array_equal(getattr(found, name), getattr(evidence[0], name)), name
    return outcomes


def run_planner(cache, seed, steps, backends, max_prefills=1, eos=True) -> Planner:
    """Random steps from neutral rows; after each, every token that must lie in the cache lies there."""
    planner = Planner(cache, seed, max_prefills, eos)
    for _ in range(steps):
        plan, rows = planner.plan()
        if plan.num_rows:
            assert_same_step(plan, rows, backends)
            for backend in backends:
                assert backend.verify(*planner.places()) == ()
    return planner


def engine_for(cache, lag, mix="mixed") -> PagedAttentionEngine:
    metadata = PagedAttentionCacheMetaData(
        batch_size=cache.batch_size,
        num_hidden_layers=cache.layers,
        num_pages_per_layer=cache.num_pages,
        num_pages_per_sequence=-(-cache.max_sequence_length // cache.page_size),
        max_sequences=cache.max_sequence_length,
        page_size=cache.page_size,
        num_kv_heads=cache.kv_heads,
        kv_head_dim_size=cache.head_dim,
        hbm_utilization=1.0,
    )
    policy = SchedulingPolicy(preemption="recompute", mix=mix)
    return PagedAttentionEngine(metadata, prefill_chunk=cache.prefill_chunk, policy=policy, lag=lag)


class EngineRun:
    """Our engine under random requests, cancels, abandoned steps and EOS ends, before any backends."""

    def __init__(self, cache, seed, lag, mix="mixed", num_requests=12, lengths=(21, 11)) -> None:
        self.random = np.random.default_rng(seed)
        self.engine = engine_for(cache, lag, mix)
        self.cache, self.lag = cache, lag
        self.eos: dict[int, int] = {}
        self.num_requests = num_requests
        self.max_prompt, self.max_output = lengths
        self.in_flight = deque()
        self.steps = self.preemptions = 0

    def steps_to_run(self):
        """Yield (plan, rows); send the outcome back into the generator."""
        while len(self.eos) < self.num_requests or self.engine.pending() or self.in_flight:
            self._submit_or_cancel()
            plan = self.engine.plan() if len(self.in_flight) <= self.lag else None
            if plan is not None and self.random.random() < 0.05:
                self.engine.abandon(plan.step)
                continue
            if plan is not None:
                self.steps += 1
                self.preemptions += sum(effect.kind == "preempted" for effect in plan.effects)
                self.in_flight.append((yield plan, self._facts(plan)))
            if self.in_flight and (plan is None or len(self.in_flight) > self.lag):
                self.engine.apply(self.in_flight.popleft())

    def run(self, execute) -> None:
        steps = self.steps_to_run()
        try:
            step = next(steps)
            while True:
                step = steps.send(execute(*step))
        except StopIteration:
            return

    def _submit_or_cancel(self) -> None:
        if len(self.eos) < self.num_requests and self.random.random() < 0.5:
            request = len(self.eos)
            prompt, output = (int(self.random.integers(1, most + 1)) for most in (self.max_prompt, self.max_output))
            ids = np.arange(1, prompt + 1, dtype=np.int32)
            self.engine.submit(Request(request, ids, output, seed=seed_of(request)))
            ends = self.random.random() < 0.5
            self.eos[request] = int(self.random.integers(prompt, prompt + output)) if ends else -1
        if self.eos and self.random.random() < 0.03:
            self.engine.cancel(int(self.random.integers(len(self.eos))))

    def _facts(self, plan) -> ModelRows:
        return ModelRows(
            kv_base=kv_base(plan.request, plan.admission),
            token_seed=seed_of(plan.request.astype(np.uint32)).astype(np.uint32),
            eos_position=np.array([self.eos[request] for request in plan.request.tolist()], np.int32),
        )


def seed_of(request):
    return request * 31 + 7


__all__ = [
    "DeviceSpec",
    "EngineRun",
    "JaxBackend",
    "NoneBackend",
    "NumpyBackend",
    "assert_same_step",
    "cache_spec",
    "opened",
    "run_planner",
]
