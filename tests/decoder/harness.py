"""Runs of the small decoder, and what each request got in them."""

from collections import defaultdict
from dataclasses import replace

import numpy as np

from paged_attention.decoder_spec import DecoderSpec
from sim.backend_wrapper import BackendWrapper
from sim.scenario import Scenario
from tests.sim.run_parts import logged
from tests.sim.scenario_parts import small

SPEC = DecoderSpec(layers=2, query_heads=4, kv_heads=2, head_dim=8, vocab_size=64, max_positions=64)


def decoding(**keys) -> Scenario:
    """A small scenario of the decoder on the NumPy backend: requests crowd 12 pages and draw their tokens."""
    defaults = {
        "backend__kind": "numpy",
        "cache__num_pages": 13,
        "cache__layers": 2,
        "cache__head_dim": 8,
        "model": {"kind": "tiny", "vocab_size": 64},
        "workload__arrivals": {"kind": "concurrent", "concurrency": 6},
        "workload__num_requests": 8,
        "workload__temperature": [0.0, 0.7, 1.0],
        "workload__top_p": [1.0, 0.9],
        "invariants__full_every": 4,
    }
    return small(**(defaults | keys))


def outputs(scenario: Scenario, **options):
    """A run, and the tokens of each request in order of position, recomputed ones counted once."""
    report, lines = logged(scenario, **options)
    plans, tokens = {}, defaultdict(dict)
    for line in lines:
        if "plan" in line:
            plans[line["plan"]["step"]] = line["plan"]
        elif "outcome" in line:
            plan = plans[line["outcome"]["step"]]
            for row, token in enumerate(line["outcome"]["token"]):
                if token >= 0:
                    tokens[plan["request"][row]][plan["start"][row] + plan["count"][row]] = token
    return report, {request: [by[p] for p in sorted(by)] for request, by in sorted(tokens.items())}


class OtherLogits(BackendWrapper):
    """Says that one row of each step was drawn from other logits."""

    def execute(self, plan, rows):
        pending = self.backend.execute(plan, rows)
        outcome = pending.result()
        digests = outcome.logits.copy()
        digests[-1] ^= np.uint32(1)
        return type(pending)(replace(outcome, logits=digests))


class LayerForgotten(BackendWrapper):
    """Writes nothing to layer 1 in the step that it is told."""

    def execute(self, plan, rows):
        before = self.backend._words[1].copy()
        pending = self.backend.execute(plan, rows)
        if plan.step == 3:
            self.backend._words[1] = before
        return pending


class TokenMisplaced(BackendWrapper):
    """Puts a whole token's K and V of every layer where another one's belong."""

    def execute(self, plan, rows):
        pending = self.backend.execute(plan, rows)
        if plan.step == 3:
            page = plan.table[0, 0]
            self.backend._words[..., page, 0, :] = self.backend._words[..., page, 1, :]
        return pending


def planted(monkeypatch, wrapper) -> None:
    """Have every run use this backend around its own."""
    import sim.build

    make = sim.build.make_backend
    monkeypatch.setattr(sim.build, "make_backend", lambda kind: wrapper(make(kind)))
